"""`vidaccel calibrate`: find out what a cache's thresholds mean for a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer

from .output import Format, FormatOption, Screen

_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the published threshold."""
_SHARES = (0.67, 0.5, 0.34, 0.25, 0.17)
"""Of the steps, where a policy computes a share of them."""


def calibrate(
    model: Annotated[str, typer.Option("--model", "-m", help="A shipped sample, a folder, or a hub id.")] = "wan-tiny",
    cache: Annotated[
        str, typer.Option("--cache", "-c", help="Policies to choose from: placed, and those with a threshold.")
    ] = "cg-taylor,placed",
    prompts: Annotated[Path | None, typer.Option(help="A file with a prompt a line; a few are enough.")] = None,
    thresholds: Annotated[
        str | None, typer.Option(help="Such as 0.1,0.2,0.4; without it, around the published ones.")
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    format: FormatOption = Format.human,
) -> None:
    """Render a few prompts with caches from careful to bold: then --cache auto:2.5x, auto:psnr>=28 know what wins."""
    from ..caching.calibration import Calibration, Curve, Point, knob, model_key
    from ..errors import UsageError
    from ..recipe import policy_from
    from ..render import DENSE, RenderJob, find, open_pipeline
    from ..report.quality import psnr
    from .batch import read_prompts, render_with_progress
    from .output import prepare

    screen = Screen(format)
    prepare(screen)
    found = find(model)
    texts = ["a red circle moves right", "a blue square moves up"] if prompts is None else read_prompts(prompts)
    first = RenderJob(
        texts[0], model, height=height, width=width, num_frames=frames, num_inference_steps=steps, seed=seed,
        device=device,
    ).complete(found)  # fmt: skip
    names = _names(cache)
    if thresholds is not None and all(knob(name) != "threshold" for name in names):
        raise UsageError(
            f"--thresholds {thresholds} was given, but {', '.join(names)} computes a share of the steps and has no "
            "threshold; leave it out, or add a cache that has one, such as cg-taylor"
        )
    tried = {name: _values(name, found, thresholds) for name in names}
    pipe = open_pipeline(first, found)
    jobs = [replace(first, prompt=text, recipe=DENSE) for text in texts]
    dense = [render_with_progress(screen, pipe, job, f"without cache: {job.prompt}") for job in jobs]
    total, curves, idle = first.num_inference_steps, [], []
    key = model_key(found.index["transformer"][1], found.transformer, found.experts)
    try:
        for name, values in tried.items():
            turned = str(knob(name))
            # At threshold 0 nothing is forecast.
            points = [Point(0.0, 1.0, 100.0)] if turned == "threshold" else []
            for value in values:
                recipe = DENSE.merge(cache=policy_from({"name": name, turned: value}))
                about = f"{name}, {turned} {value:g}"
                cached = [render_with_progress(screen, pipe, replace(job, recipe=recipe), about) for job in jobs]
                speed = mean(total / (each.report.summary["computed_steps"] or total) for each in cached)
                lost = mean(mean(psnr(a.frames, b.frames)) for a, b in zip(cached, dense, strict=True))
                points.append(Point(value, speed, lost))
            if any(point.speedup > 1 for point in points):
                curves.append(Curve(name, tuple(points)))
            else:
                idle.append(f"{name} forecast none of {total} steps up to {turned} {values[-1]:g}")
    finally:
        # An interruption keeps the curves that are whole.
        path = Calibration(key, total, tuple(texts), tuple(curves)).save() if curves else None
    if path is None:
        raise UsageError(f"{', and '.join(idle)}; try bolder ones, or more steps")
    for each in idle:
        screen.warn(f"{each}, so it is left out; try bolder ones, or more steps")
    rows: list[dict[str, Any]] = [
        {"cache": curve.cache, "knob": str(knob(curve.cache)), **vars(point)}
        for curve in curves
        for point in curve.points
    ]
    if screen.json({"file": str(path), "model": key, "points": rows}) or screen.names([path]):
        return
    screen.table(rows, title=f"{cache} on {model}, {total} steps, {len(texts)} prompts")
    screen.line(f"kept in {path}; use it with --cache auto:2x or --cache 'auto:psnr>=28'")


def _names(caches: str) -> list[str]:
    """Names of policies that can be made bolder."""
    from ..caching import POLICIES
    from ..caching.calibration import knob
    from ..errors import UsageError

    known = [name for name in POLICIES if knob(name)]
    names = list(dict.fromkeys(part.strip() for part in caches.split(",")))
    for name in names:
        if name not in known:
            raise UsageError(f"cache {name!r} has nothing to calibrate; possible, with commas: {', '.join(known)}")
    return names


def _values(cache: str, model: Any, thresholds: str | None) -> list[float]:
    """What to try of a policy's knob, from careful to bold."""
    from ..caching.calibration import knob, usual_threshold
    from ..errors import UsageError

    if knob(cache) == "share":
        return list(_SHARES)
    if thresholds is None:
        return [factor * (usual_threshold(cache, model.family.name) or 0.0) for factor in _FACTORS]
    try:
        found = sorted({float(part) for part in thresholds.split(",")})
    except ValueError:
        raise UsageError(f"--thresholds {thresholds!r} is no list of numbers, such as 0.1,0.2,0.4") from None
    if found[0] <= 0:
        raise UsageError(f"--thresholds {thresholds}: they lie above 0, where nothing is forecast")
    return found
