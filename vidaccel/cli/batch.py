"""Rendering one job or many: names, what is finished already, progress, results."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import RenderError, UsageError, VidaccelError
from ..render import Model, ReadyJob, Rendering, open_pipeline, render, save, video, weights
from ..render.job import check_prompts
from .output import Screen, error
from .progress import StepBar
from .world import World

_MOST_PROMPTS = 10_000


def read_prompts(path: Path | None) -> list[str]:
    """The prompts of a file, one a line; empty lines and those with # in front do not count."""
    assert path is not None
    try:
        # Some editors put a byte order mark in front, which belongs to no prompt.
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(
            f"prompts file {path} cannot be read: {getattr(problem, 'strerror', None) or 'it is not UTF-8 text'}"
        ) from None
    found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not 0 < len(found) <= _MOST_PROMPTS:
        raise UsageError(f"prompts file {path} has {len(found)} prompts; it takes 1 to {_MOST_PROMPTS}, one a line")
    return found


def slug(prompt: str) -> str:
    """A file name from a prompt: "A red circle!" -> "a-red-circle"."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")
    return words[:50].rstrip("-") or "video"


def targets(prompts: Sequence[str], output: Path | None, *, is_batch: bool) -> list[Path]:
    """Where each prompt's video goes."""
    if is_batch:
        folder = output or Path("out")
        if folder.suffix == ".mp4" or folder.is_file():
            raise UsageError(f"-o {folder} is a file; a prompts file needs a folder")
        return [folder / f"{n:03d}-{slug(prompt)}.mp4" for n, prompt in enumerate(prompts, 1)]
    path = output or Path(f"{slug(prompts[0])}.mp4")
    if path.is_dir():
        path /= f"{slug(prompts[0])}.mp4"
    if path.suffix != ".mp4":
        raise UsageError(f"-o {path} is not an .mp4 file or an existing folder; vidaccel writes mp4")
    return [path]


def run_jobs(
    screen: Screen,
    model: Model,
    first: ReadyJob,
    prompts: Sequence[str],
    paths: Sequence[Path],
    *,
    is_batch: bool,
    seed_given: bool,
    overwrite: bool,
    report: Path | None,
    world: World,
) -> None:
    """Render every prompt whose video is not finished, and write the results; each team of processes takes the next.

    Raises:
        UsageError: a file is in the way, or more teams than prompts.
        RenderError: at least one render failed; those that did not are kept. A team of several processes ends with its
            first failure, as its other processes may be anywhere in that video.
    """
    if len(prompts) < world.teams:
        raise UsageError(
            f"{world.teams} processes were started for {len(prompts)} prompt; add --context-parallel {world.size} to "
            "render one video together, or give --prompts"
        )

    def decide() -> tuple[list[ReadyJob], dict[int, dict[str, Any]]]:
        jobs = [
            first if n == 0 or seed_given else replace(first, seed=random.SystemRandom().randrange(2**31))
            for n in range(len(prompts))
        ]
        jobs = [replace(job, prompt=prompt) for job, prompt in zip(jobs, prompts, strict=True)]
        for job in jobs:
            check_prompts(job.prompt, job.negative_prompt)
        old = {} if overwrite else _finished(model, jobs, paths, seed_given=seed_given, is_batch=is_batch)
        return jobs, old

    # Seeds may be random, and files appear while others still look: one process decides for all.
    jobs, finished = world.decided(decide)
    jobs = [replace(job, device=first.device) for job in jobs]
    results = {n: {"file": str(paths[n]), "skipped": True, **_summary(old)} for n, old in finished.items()}
    if finished:
        screen.say(f"{len(finished)} of {len(paths)} videos are finished already")
    left = [n for n in range(len(jobs)) if n not in finished]
    try:
        pipe: Any = None
        for n in map(left.__getitem__, world.shared(len(left))):
            if pipe is None:
                video.check_writable(paths[n])
                if report is not None:
                    video.check_writable(report / "report.json", "--report")
                screen.say(f"loading {model.reference} ({model.pipeline}) on {first.device}, {first.dtype}")
                pipe, mark = open_pipeline(first, model, world.together), weights.fingerprint(model)
            try:
                rendering = render_with_progress(
                    screen,
                    pipe,
                    jobs[n],
                    paths[n].name,
                    lambda: f" ({world.finished()} of {len(left)} videos finished)" if world.teams > 1 else "",
                )
                if not world.writes:
                    continue
                # Before the video: one that is there counts as finished, and its report would never be written.
                if report is not None:
                    rendering.report.save(report / paths[n].stem if is_batch else report)
                data = save(paths[n], rendering, jobs[n], model, mark)
            except RenderError as problem:
                if not is_batch or world.together > 1:
                    raise
                error(f"{paths[n].name}: {problem}")
                world.post(n, None)
                continue
            results[n] = {"file": str(paths[n]), "skipped": False, **_summary(data), **measured(rendering)}
            _tell(screen, results[n])
            world.post(n, results[n])
    except KeyboardInterrupt as stop:
        by = " by this process" if world.teams > 1 else ""
        done = f"{len(results)} of {len(jobs)} videos are finished{by}; the same command goes on from there"
        raise KeyboardInterrupt(
            f"{str(stop) or 'interrupted'}; {done if is_batch else 'nothing was written'}"
        ) from None
    lost: RenderError | None = None
    try:
        if world.teams > 1 and world.finished() < len(left):
            screen.say(f"{world.finished()} of {len(left)} videos are finished; waiting for the other processes")
        world.meet()
    except RenderError as problem:
        if not world.is_first:
            raise
        lost = problem
    if not world.is_first:
        return
    for n, result in world.posted(left).items():
        if result is not None and n not in results:
            results[n] = result
            _tell(screen, result)
    ordered = [results[n] for n in sorted(results)]
    failed = [path.name for n, path in enumerate(paths) if n not in results]
    if not screen.json({"videos": ordered, "failed": failed}):
        screen.names(result["file"] for result in ordered)
    if lost is not None:
        raise RenderError(f"{len(failed)} of {len(jobs)} videos were not made: {lost}") if failed else lost
    if failed:
        raise RenderError(f"{len(failed)} of {len(jobs)} renders failed, the first was {failed[0]}")


def render_with_progress(
    screen: Screen, pipe: Any, job: ReadyJob, name: str, note: Callable[[], str] = str
) -> Rendering:
    """Render a job behind a progress bar, and warn of what looks broken."""
    with StepBar(screen, name, job.num_inference_steps, note) as bar:
        rendering = render(pipe, job, bar)
    for problem in rendering.problems:
        screen.warn(
            f"{name}: {problem}; the video is written all the same. "
            "Compare with --attention dense, another seed or --dtype float32"
        )
    return rendering


def measured(rendering: Rendering) -> dict[str, Any]:
    """Times and densities of a render, as plain data."""
    summary, plans = rendering.report.summary, rendering.report.data["plans"]
    return {
        "seconds": rendering.seconds,
        "requested_density": plans[0]["requested"] if plans else None,
        "delivered_density": summary["delivered_density"],
        "visited_density": plans[0]["visited"] if plans else None,
        "effective_density": summary["effective_density"],
        "kernels": summary["kernels"],
    }


def _finished(
    model: Model, jobs: Sequence[ReadyJob], paths: Sequence[Path], *, seed_given: bool, is_batch: bool
) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for n, (job, path) in enumerate(zip(jobs, paths, strict=True)):
        if not path.exists():
            continue
        if not is_batch:
            raise UsageError(f"{path} exists; --overwrite replaces it, -o names another file")
        try:
            found[n] = video.read_record(path)
        except VidaccelError as problem:
            raise UsageError(f"{problem}; --overwrite replaces it, -o names another folder") from None
        if difference := _difference(found[n], job, model, seed_given):
            raise UsageError(
                f"{path} exists and was made with {difference}; --overwrite replaces it, -o names another folder"
            )
    return found


def _difference(old: Mapping[str, Any], job: ReadyJob, model: Model, seed_given: bool) -> str | None:
    """The first setting in which a finished video differs from the one that is asked for."""
    before, now = old.get("job"), job.to_dict()
    if not isinstance(before, Mapping):
        return "unknown settings"
    ignored = {"device"} if seed_given else {"device", "seed"}
    for name, value in now.items():
        if name not in ignored and before.get(name) != value:
            return f"{name} {before.get(name)!r:.60} rather than {value!r:.60}"
    if old.get("recipe_hash") != job.recipe.hash:
        return f"recipe {old.get('recipe_hash')!r:.20} rather than {job.recipe.hash}"
    mark = old.get("model", {}).get("fingerprint") if isinstance(old.get("model"), Mapping) else None
    return None if mark == weights.fingerprint(model) else "another model"


def _summary(data: Mapping[str, Any]) -> dict[str, Any]:
    job = data.get("job")
    kept = {name: data.get(name) for name in ("recipe_hash", "frames_sha256", "problems")}
    return {"prompt": job.get("prompt"), "seed": job.get("seed"), **kept} if isinstance(job, Mapping) else kept


def _tell(screen: Screen, result: Mapping[str, Any]) -> None:
    if screen.format.value != "human":
        return
    seconds, effective = result["seconds"], result["effective_density"]
    # A cache alone leaves attention as it is, and nobody looks at it.
    density = "" if effective is None else f"effective density {effective:.3f}, "
    screen.line(
        f"{result['file']}: seed {result['seed']}, denoising {seconds['denoise']:.1f} s, "
        f"decoding {seconds['decode']:.1f} s, {density}recipe {result['recipe_hash']}"
    )
