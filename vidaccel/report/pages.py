"""The report of a run as Markdown and as a page, from nothing but its data and its videos."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..patterns import PATTERNS
from .over_steps import over_steps
from .page import Page, Rows, Scene, mp4
from .quality import Frames
from .scene_plots import scene_plots


def markdown(data: dict[str, Any]) -> str:
    """A page that pastes into a pull request or a model card."""
    lines = [f"# {_title(data)}"]
    for title, rows in {**_tables(data), "Calls": _calls(data)}.items():
        if rows:
            head = list(rows[0])
            lines += ["", f"## {title}", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
            lines += [f"| {' | '.join(str(value) for value in row.values())} |" for row in rows]
    lines += ["", "## Notes", "", *(f"- {note}" for note in _notes(data) or ["none"])]
    lines += ["", "## Again", "", "```python", _again(data), "```"]
    lines += ["", "## Recipe and environment", "", "```json"]
    lines += [json.dumps({"recipe": data["recipe"], **data["environment"]}, indent=1), "```", ""]
    return "\n".join(lines)


def html(data: dict[str, Any], videos: Mapping[str, Frames] | None = None, fps: float = 16) -> str:
    """One self-contained page.

    Args:
        data: of the report.
        videos: frames by name, the reference first.
        fps: frames in a second.
    """
    scenes = []
    if videos and data["quality"] is not None:
        reference, name = videos
        found = {name: data["quality"]}
        files = {label: mp4(frames, fps) for label, frames in videos.items()}
        psnr = {name: data["quality"]["psnr"]}
        scenes = [Scene("", fps, data["quality"]["frames"], files, psnr, scene_plots(reference, found))]
    details: dict[str, str | Rows] = {
        "Recipe": json.dumps(data["recipe"], indent=1),
        "Environment": json.dumps(data["environment"], indent=1),
        "Calls": _calls(data),
    }
    page = Page(
        _title(data), scenes, _tables(data), over_steps({"": data}), _notes(data), details, commands=[_again(data)]
    )
    return page.html()


def _title(data: dict[str, Any]) -> str:
    return f"{data['pipeline']}, recipe {data['recipe_hash']}"


def _again(data: dict[str, Any]) -> str:
    """Python that runs the recipe again; the recipe is as JSON has it, which Python would not read as it stands."""
    attention = data["recipe"]["attention"]
    if attention is not None and attention["name"] not in PATTERNS:
        settings = ", ".join(f"{key}={value!r}" for key, value in attention.items() if key != "name")
        return f"vidaccel.accelerate(pipe, ...)  # with a pattern of your own, {attention['name']}({settings})"
    recipe = {key: value for key, value in data["recipe"].items() if key not in ("about", "evidence")}
    text = json.dumps(recipe).replace("\\", "\\\\").replace("'", "\\'")
    return f"vidaccel.accelerate(pipe, recipe=vidaccel.Recipe.from_text('{text}'))"


def _notes(data: dict[str, Any]) -> list[str]:
    return [*data["notes"], *((data["quality"] or {}).get("notes", ()))]


def _tables(data: dict[str, Any]) -> dict[str, Rows]:
    known = {key: value for key, value in data["summary"].items() if value is not None}
    summary = [{"what": key.replace("_", " "), "value": _short(value)} for key, value in known.items()]
    plans = [{key: _short(value) for key, value in plan.items() if key != "notes"} for plan in data["plans"]]
    lost = [{"what": key.replace("_", " "), "value": _short(value)} for key, value in _lost(data).items()]
    titles = {"Quality against the reference": lost, "Summary": summary, "Plans": plans}
    return {title: rows for title, rows in titles.items() if rows}


def _calls(data: dict[str, Any]) -> Rows:
    return [{key: _short(value) for key, value in call.items() if key != "layer_density"} for call in data["calls"]]


def _lost(data: dict[str, Any]) -> dict[str, Any]:
    quality = data["quality"]
    return {} if quality is None else {**quality["mean"], "broken_frames": len(quality["broken_frames"])}


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{k}: {v}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "" if value is None else value
