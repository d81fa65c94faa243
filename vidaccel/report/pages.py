"""The report of a run as Markdown and as a page, from nothing but its data and its videos."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..order import described
from ..patterns import PATTERNS
from .over_steps import over_steps
from .page import Page, Rows, Scene, mp4
from .quality import NAMES, Frames
from .scene_plots import scene_plots

_UNITS = {
    "transformer_ms": ("transformer, s", 1e-3),
    "saved_ms": ("saved by the cache, s", 1e-3),
    "cache_bytes": ("cache, MiB", 2**-20),
}


def markdown(data: dict[str, Any]) -> str:
    """A page that pastes into a pull request or a model card."""
    lines = [f"# {_title(data)}"]
    for title, rows in _tables(data).items():
        lines += ["", f"## {title}", "", *_table(rows)]
    lines += ["", "## Notes", "", *(f"- {note}" for note in _notes(data) or ["none"])]
    lines += ["", "## Again", "", "```python", _again(data), "```"]
    settings = json.dumps({"recipe": data["recipe"], **data["environment"]}, indent=1)
    folded = {"Recipe and environment": ["```json", settings, "```"], "Calls": _table(_calls(data))}
    for title, shown in folded.items():
        lines += ["", "<details>", f"<summary>{title}</summary>", "", *shown, "", "</details>"]
    return "\n".join([*lines, ""])


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
    """What ran on what."""
    recipe = data["recipe"]
    attention, cache = (recipe[part] and recipe[part]["name"] for part in ("attention", "cache"))
    density = "" if recipe["density"] is None else f" {recipe['density']:g}"
    parts = [attention and attention + density, cache]
    return f"{' and '.join(part for part in parts if part)} on {data['pipeline']}"


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
    summary = [{"what": "recipe", "value": data["recipe_hash"]}]
    for key, value in data["summary"].items():
        name, factor = _UNITS.get(key, (key.replace("_", " "), None))
        if value is not None:
            summary.append({"what": name, "value": _short(value * factor if factor else value)})
    plans = [
        {
            key: described(tuple(value)) if key == "tile" and value else _short(value)
            for key, value in plan.items()
            if key != "notes"
        }
        for plan in data["plans"]
    ]
    lost = [{"what": key, "value": _short(value)} for key, value in _lost(data).items()]
    titles = {"Quality against the reference": lost, "Summary": summary, "Plans": plans}
    return {title: rows for title, rows in titles.items() if rows}


def _table(rows: Rows) -> list[str]:
    if not rows:
        return ["none"]
    head = list(rows[0])
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return lines + [f"| {' | '.join(str(value) for value in row.values())} |" for row in rows]


def _calls(data: dict[str, Any]) -> Rows:
    return [{key: _short(value) for key, value in call.items() if key != "layer_density"} for call in data["calls"]]


def _lost(data: dict[str, Any]) -> dict[str, Any]:
    quality = data["quality"]
    if quality is None:
        return {}
    means = {name: mean for key, name in NAMES.items() if (mean := quality["mean"][key]) is not None}
    return means | {"black or flat frames": len(quality["broken_frames"]) or "none"}


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{k}: {v}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "" if value is None else value
