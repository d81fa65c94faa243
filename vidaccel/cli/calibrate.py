"""`vidaccel calibrate`: find out what a cache's thresholds mean for a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer

from .output import Format, FormatOption, Screen

_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


def calibrate(
    model: Annotated[str, typer.Option("--model", "-m", help="A shipped sample, a folder, or a hub id.")] = "wan-tiny",
    cache: Annotated[str, typer.Option("--cache", "-c", help="A policy with a threshold.")] = "cg-taylor",
    prompts: Annotated[Path | None, typer.Option(help="A file with a prompt a line; a few are enough.")] = None,
    thresholds: Annotated[
        str | None, typer.Option(help="Such as 0.1,0.2,0.4; without it, around the published one.")
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    format: FormatOption = Format.human,
) -> None:
    """Render a few prompts at several thresholds, so that --cache auto:2.5x and auto:psnr>=28 know which to take."""
    from ..caching.calibration import Calibration, Point, model_key
    from ..errors import UsageError
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
    tried = _thresholds(cache, found, thresholds)
    pipe = open_pipeline(first, found)
    jobs = [replace(first, prompt=text, recipe=DENSE) for text in texts]
    dense = [render_with_progress(screen, pipe, job, f"without cache: {job.prompt}") for job in jobs]
    total, points = first.num_inference_steps, [Point(0.0, 1.0, 100.0)]
    for threshold in tried:
        policy = _policy(cache, threshold)
        cached = [
            render_with_progress(
                screen, pipe, replace(job, recipe=DENSE.merge(cache=policy)), f"threshold {threshold:g}"
            )
            for job in jobs
        ]
        speed = mean(total / (each.report.summary["computed_steps"] or total) for each in cached)
        lost = mean(mean(psnr(a.frames, b.frames)) for a, b in zip(cached, dense, strict=True))
        points.append(Point(threshold, speed, lost))
    if all(point.speedup == 1 for point in points):
        raise UsageError(
            f"no threshold up to {tried[-1]:g} forecast any of {total} steps; try higher ones, or more steps"
        )
    key = model_key(found.index["transformer"][1], found.transformer)
    path = Calibration(key, cache, total, tuple(texts), tuple(points)).save()
    rows: list[dict[str, Any]] = [vars(point) for point in points]
    if screen.json({"file": str(path), "model": key, "cache": cache, "points": rows}) or screen.names([path]):
        return
    screen.table(rows, title=f"{cache} on {model}, {total} steps, {len(texts)} prompts")
    screen.line(f"kept in {path}; use it with --cache auto:2x or --cache 'auto:psnr>=28'")


def _policy(name: str, threshold: float) -> Any:
    from ..recipe import policy_from

    return policy_from({"name": name, "threshold": threshold})


def _thresholds(cache: str, model: Any, given: str | None) -> list[float]:
    """Ascending thresholds to try."""
    from ..caching import POLICIES
    from ..caching.calibration import usual_threshold
    from ..errors import UsageError

    if cache not in POLICIES or not hasattr(POLICIES[cache], "threshold"):
        known = ", ".join(name for name, policy in POLICIES.items() if hasattr(policy, "threshold"))
        raise UsageError(f"cache {cache!r} has no threshold to calibrate; possible: {known}")
    if given is not None:
        try:
            found = sorted({float(part) for part in given.split(",")})
        except ValueError:
            raise UsageError(f"--thresholds {given!r} is no list of numbers, such as 0.1,0.2,0.4") from None
        if found[0] <= 0:
            raise UsageError(f"--thresholds {given}: they lie above 0, where nothing is forecast")
        return found
    return [factor * (usual_threshold(cache, model.family.name) or 0.0) for factor in _FACTORS]
