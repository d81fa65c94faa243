"""Videos side by side: one page that holds them, their differences, how they were made, and how to make them again."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from ..errors import VideoError
from . import plots, quality

SCHEMA = 1


@dataclass(frozen=True, eq=False)
class Entry:
    """One video.

    Attributes:
        label: what the page calls it.
        frames: (f, h, w, 3) bytes.
        mp4: the file, as it is played.
        fps: frames in a second.
        command: what makes it again; None where it does not say.
        record: how it was made: what an mp4 of vidaccel's carries.
        report: `report.json` of its run.
    """

    label: str
    frames: quality.Frames
    mp4: bytes
    fps: float
    command: str | None = None
    record: dict[str, Any] | None = None
    report: dict[str, Any] | None = None


def compare(entries: Sequence[Entry]) -> dict[str, Any]:
    """Quality of every video against the first, as plain data.

    Raises:
        VideoError: fewer than two videos, two of one name, or sizes that differ.
    """
    if len(entries) < 2:
        raise VideoError(f"{len(entries)} video was given; two or more are compared, the first is the reference")
    if len({entry.label for entry in entries}) < len(entries):
        raise VideoError("two videos have the same name; give them names of their own")
    first, *others = entries
    return {
        "schema": SCHEMA,
        "reference": first.label,
        "fps": first.fps,
        "frames": len(first.frames),
        "videos": {entry.label: quality.measure(entry.frames, first.frames) for entry in others},
        "notes": ["LPIPS was not computed: its network's weights come with no package"],
    }


def html(entries: Sequence[Entry], data: dict[str, Any], command: str) -> str:
    """The page: self-contained, and it works from a file.

    Args:
        entries: the videos, the reference first.
        data: from `compare`.
        command: what makes this page again.
    """
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        (resources.files(__package__) / "compare.html").read_text(encoding="utf-8")
    )
    videos = [
        {"label": e.label, "source": f"data:video/mp4;base64,{base64.b64encode(e.mp4).decode()}"} for e in entries
    ]
    strips = {label: found["psnr"] for label, found in data["videos"].items()}
    script = {"fps": data["fps"], "frames": data["frames"], "labels": [e.label for e in entries], "psnr": strips}
    return template.render(
        videos=videos,
        reference=data["reference"],
        summary=[_summary(label, found) for label, found in data["videos"].items()],
        plots=_frame_plots(data) + plots.steps({e.label: e.report["calls"] for e in entries if e.report}),
        made=[_made(entry) for entry in entries],
        commands=[command, *(entry.command for entry in entries if entry.command)],
        notes=data["notes"],
        # `<` would end the script that holds it.
        script=Markup(json.dumps(script).replace("<", "\\u003c")),
    )


def _summary(label: str, found: dict[str, Any]) -> dict[str, Any]:
    mean = found["mean"]

    def short(value: float | None, digits: int = 2) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    return {
        "video": label,
        "PSNR dB": short(mean["psnr_db"]),
        "worst frame": short(mean["psnr_db_worst"]),
        "SSIM": short(mean["ssim"], 4),
        "motion, x reference": short(mean["motion_ratio"], 3),
        "flicker, x reference": short(mean["flicker_ratio"], 3),
        "black or flat frames": len(found["broken_frames"]) or "none",
    }


def _frame_plots(data: dict[str, Any]) -> list[Markup]:
    videos, reference = data["videos"], data["reference"]
    first = next(iter(videos.values()))
    return [
        plots.lines("PSNR against the reference, dB", {label: found["psnr"] for label, found in videos.items()}),
        plots.lines("SSIM against the reference", {label: found["ssim"] for label, found in videos.items()}),
        plots.lines(
            "motion to the next frame, levels of 255",
            {reference: first["motion_reference"], **{label: found["motion"] for label, found in videos.items()}},
        ),
    ]


def _made(entry: Entry) -> dict[str, str]:
    record = entry.record or {}
    recipe, machine = record.get("recipe"), {key: record.get(key) for key in ("versions", "machine") if key in record}
    return {
        "label": entry.label,
        "job": json.dumps(record.get("job"), indent=1, sort_keys=True) if record else "",
        "recipe": json.dumps(recipe, indent=1) if recipe else "",
        "environment": json.dumps(machine, indent=1) if machine else "",
    }
