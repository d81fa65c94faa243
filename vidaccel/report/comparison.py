"""Videos side by side: what each lost against the first, over pairs of prompt and seed, and the page that shows it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from markupsafe import Markup

from ..errors import VideoError
from . import plots, quality
from .intervals import mean_interval, share_interval
from .over_steps import over_steps
from .page import Page, Rows, Scene
from .scene_plots import scene_plots

SCHEMA = 2


@dataclass(frozen=True, eq=False)
class Entry:
    """One video.

    Attributes:
        label: what the page calls the run that made it.
        load: gives its frames, (f, h, w, 3) bytes; called once, so that not all videos are in memory together.
        mp4: the file, as it is played.
        fps: frames in a second.
        scene: prompt and seed in words; videos of one scene are compared.
        command: what makes it again; None where it does not say.
        record: how it was made: what an mp4 of vidaccel's carries.
        report: `report.json` of its run.
    """

    label: str
    load: Callable[[], quality.Frames]
    mp4: bytes
    fps: float
    scene: str = ""
    command: str | None = None
    record: dict[str, Any] | None = None
    report: dict[str, Any] | None = None

    @property
    def prompt(self) -> str | None:
        """What it should show, where that is known."""
        job = (self.record or {}).get("job")
        prompt = job.get("prompt") if isinstance(job, dict) else None
        return prompt if isinstance(prompt, str) else None


Judge = Callable[[str, quality.Frames], bool | None]
"""Whether frames show what a prompt says; None where that cannot be told."""


def compare(entries: Sequence[Entry], judge: Judge | None = None) -> dict[str, Any]:
    """Quality of every video against the first one of its scene, as plain data.

    Args:
        entries: the videos; the first one's label is the reference in every scene.
        judge: looks at every video alone.

    Returns:
        "reference", the name of the first run; "scenes", a list of {"name", "fps", "frames", "videos"} with
        `quality.measure` of each other run; "videos", over all scenes, for each run its "mean" values, their 95 %
        "interval" (None for one scene), how many "scenes" and "broken_frames"; "runs", for each run, the "ms" of its
        transformer and how many videos are "right", where that is known; "notes".

    Raises:
        VideoError: fewer than two videos, two of one name, a scene without its reference, or sizes that differ.
    """
    scenes = _scenes(entries)
    labels = list(dict.fromkeys(entry.label for entry in entries))
    reference, *others = labels
    measured: list[dict[str, Any]] = []
    told: dict[str, list[bool]] = {label: [] for label in labels}
    for name, (first, *rest) in scenes.items():
        against = first.load()
        videos = {}
        for entry in (first, *rest):
            frames = against if entry is first else entry.load()
            if entry is not first:
                videos[entry.label] = quality.measure(frames, against)
            if judge and entry.prompt and (right := judge(entry.prompt, frames)) is not None:
                told[entry.label].append(right)
        measured.append({"name": name, "fps": first.fps, "frames": len(against), "videos": videos})
    notes = dict.fromkeys(note for scene in measured for each in scene["videos"].values() for note in each["notes"])
    if len(scenes) == 1:
        notes["One prompt and seed: how far these figures would be off for others cannot be told"] = None
    else:
        notes["After ±: half the width of the 95 % interval of the mean over prompts and seeds"] = None
    rates = sorted({round(entry.fps, 2) for entry in entries})
    if len(rates) > 1:
        notes[
            f"Frames a second differ ({', '.join(f'{rate:g}' for rate in rates)}): figures are of the same frames, but "
            "the players do not stand at the same ones"
        ] = None
    if not any(entry.report for entry in entries):
        notes[
            "No report stands beside these videos, so nothing is known of time: render with --report and their folder"
        ] = None
    timed = _timed(scenes)
    if any(entry.report for entry in entries) and len(timed) < len(scenes):
        of = f"{len(timed)} of {len(scenes)}"
        notes[f"Times are of {of} prompts and seeds: those where every run has a report that has one anywhere"] = None
    return {
        "schema": SCHEMA,
        "reference": reference,
        "scenes": measured,
        "videos": {label: _over([s["videos"][label] for s in measured if label in s["videos"]]) for label in others},
        "runs": {label: {"ms": _ms(timed, label), "right": _share(told[label])} for label in labels},
        "notes": list(notes),
    }


def html(entries: Sequence[Entry], data: dict[str, Any], command: str) -> str:
    """The page: self-contained, and it works from a file.

    Args:
        entries: the videos, the reference first.
        data: from `compare`.
        command: what makes this page again.
    """
    scenes = [
        _shown(found, each, data["reference"])
        for found, each in zip(_scenes(entries).values(), data["scenes"], strict=True)
    ]
    several = len(data["scenes"]) > 1
    reports = {f"{e.label}, {e.scene}" if several else e.label: e.report for e in entries if e.report}
    details: dict[str, str | Rows] = {}
    for entry in entries:
        details[f"How {entry.label}{f', {entry.scene},' if several else ''} was made"] = _made(entry)
    # Runs of many prompts take the same time step by step; one of each is enough to see.
    first: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if entry.report:
            first.setdefault(entry.label, entry.report)
    page = Page(
        " · ".join(data["runs"]),
        scenes,
        {f"Against {data['reference']}": summary(data)},
        [*_pareto(data), *over_steps(first if several else reports)],
        data["notes"],
        details,
        [command, *(entry.command for entry in entries if entry.command)],
        lead=f"{len(scenes)} prompts and seeds" if several else entries[0].prompt or "",
    )
    return page.html()


def summary(data: Mapping[str, Any]) -> Rows:
    """A row for each run, what it gained beside what it lost, for people.

    Args:
        data: from `compare`.
    """
    base = data["runs"][data["reference"]]["ms"]
    several, judged = len(data["scenes"]) > 1, any(run["right"] for run in data["runs"].values())
    rows: list[dict[str, Any]] = []
    for label, run in data["runs"].items():
        found, right = data["videos"].get(label), run["right"]
        row: dict[str, Any] = {"video": label}
        if several:
            row["scenes"] = found["scenes"] if found else len(data["scenes"])
        if base:
            row["transformer, s"] = f"{run['ms'] / 1e3:.4g}" if run["ms"] else ""
            row["times faster"] = f"{base / run['ms']:.2f}" if run["ms"] else ""
        row |= {name: _short(found, key) for key, name in quality.NAMES.items() if key != "lpips" or _has(data, key)}
        row["black or flat frames"] = (found["broken_frames"] or "none") if found else ""
        if judged:
            row["shows its prompt"] = f"{right['right']} of {right['of']}" if right else ""
        rows.append(row)
    return rows


def _scenes(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Videos by scene, the reference of each first."""
    if len(entries) < 2:
        raise VideoError(f"{len(entries)} video was given; two or more are compared, the first is the reference")
    if len({(entry.scene, entry.label) for entry in entries}) < len(entries):
        raise VideoError("two videos have the same name; give them names of their own")
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.scene, []).append(entry)
    for name, each in found.items():
        each.sort(key=lambda entry: entry.label != entries[0].label)
        if each[0].label != entries[0].label or len(each) < 2:
            raise VideoError(
                f"{name!r} has no video of {entries[0].label} and of another run; both are needed to compare"
            )
    return found


def _over(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over scenes, and how far they can be trusted."""
    values = {key: [m["mean"][key] for m in measured if m["mean"][key] is not None] for key in measured[0]["mean"]}
    worst = values["psnr_db_worst"]
    mean = {key: fmean(each) if each else None for key, each in values.items()}
    return {
        "scenes": len(measured),
        "mean": {**mean, "psnr_db_worst": min(worst)},
        "interval": {key: mean_interval(each) for key, each in values.items() if key != "psnr_db_worst"},
        "broken_frames": sum(len(each["broken_frames"]) for each in measured),
    }


def _timed(scenes: Mapping[str, Sequence[Entry]]) -> list[dict[str, float]]:
    """Milliseconds of the transformer by run, in each scene where every run that was timed anywhere was timed."""
    found = [{e.label: e.report["summary"]["transformer_ms"] for e in each if e.report} for each in scenes.values()]
    labels = {label for times in found for label in times}
    return [times for times in found if times and times.keys() == labels]


def _ms(timed: Sequence[Mapping[str, float]], label: str) -> float | None:
    """What the transformer took for a video, on average."""
    times = [scene[label] for scene in timed if label in scene]
    return fmean(times) if times else None


def _share(told: Sequence[bool]) -> dict[str, Any] | None:
    return {"right": sum(told), "of": len(told), "interval": share_interval(sum(told), len(told))} if told else None


def _shown(entries: Sequence[Entry], data: Mapping[str, Any], reference: str) -> Scene:
    psnr = {label: found["psnr"] for label, found in data["videos"].items()}
    files = {entry.label: entry.mp4 for entry in entries}
    drawn = scene_plots(reference, data["videos"])
    return Scene(data["name"], data["fps"], data["frames"], files, psnr, drawn)


def _pareto(data: Mapping[str, Any]) -> list[Markup]:
    """Speed and quality of every run that was timed, where the reference was."""
    base = data["runs"][data["reference"]]["ms"]
    points: dict[str, tuple[float, float] | None] = {data["reference"]: None}
    for label, found in data["videos"].items():
        ms = data["runs"][label]["ms"]
        points[label] = (base / ms, found["mean"]["psnr_db"]) if base and ms else None
    title = "Speed and quality; nothing beats what is on the line"
    found = plots.scatter(title, points, "times faster (transformer)", "PSNR, dB", start=1.0)
    return [found] if found else []


def _has(data: Mapping[str, Any], key: str) -> bool:
    return any(found["mean"][key] is not None for found in data["videos"].values())


def _short(found: Mapping[str, Any] | None, key: str) -> str:
    """A mean, and half the width of its interval; nothing of the reference."""
    if found is None or found["mean"][key] is None:
        return ""
    digits = {"psnr_db": 2, "psnr_db_worst": 2, "ssim": 4, "lpips": 4}.get(key, 3)
    around = found["interval"].get(key)
    return f"{found['mean'][key]:.{digits}f}" + (f" ± {(around[1] - around[0]) / 2:.{digits}f}" if around else "")


def _made(entry: Entry) -> str:
    """Job, recipe and machine; a file of somebody else's says nothing."""
    record = entry.record
    if not record:
        return "This file carries no record of how it was made."
    kept = {key: record[key] for key in ("job", "recipe", "versions", "machine") if record.get(key)}
    return json.dumps(kept, indent=1, sort_keys=True)
