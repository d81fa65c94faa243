"""`vidaccel tune`: find the recipe for a quality or a speed."""

from __future__ import annotations

import random
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import Format, FormatOption, Screen

_WHAT, _SPACE, _HOW = "What to tune", "Where to search", "How"


def tune(
    target: Annotated[str, typer.Option("--target", "-t", help="psnr>=28, ssim>=0.9, or 2x.", rich_help_panel=_WHAT)],
    model: Annotated[
        str, typer.Option("--model", "-m", help="A shipped sample, a folder, or a hub id.", rich_help_panel=_WHAT)
    ] = "wan-tiny",
    prompts: Annotated[
        Path | None,
        typer.Option(help="A file with a prompt a line, to tune on; four are enough.", rich_help_panel=_WHAT),
    ] = None,
    check: Annotated[
        Path | None, typer.Option(help="Prompts on which the result is shown, and not tuned.", rich_help_panel=_WHAT)
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="A recipe to beat; default the model's preset, where it has one.", rich_help_panel=_WHAT),
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.", rich_help_panel=_WHAT)] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", rich_help_panel=_WHAT)] = None,
    frames: Annotated[int | None, typer.Option(help="Frames.", rich_help_panel=_WHAT)] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", rich_help_panel=_WHAT)] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            "--attention", "-a", help="Patterns, such as radial,topk; none for caches alone.", rich_help_panel=_SPACE
        ),
    ] = None,
    density: Annotated[
        str | None, typer.Option("--density", "-d", help="To begin with, such as 0.15,0.3.", rich_help_panel=_SPACE)
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            "--cache", "-c", help="Caches, such as cg-taylor; none for patterns alone.", rich_help_panel=_SPACE
        ),
    ] = None,
    renders: Annotated[int, typer.Option(min=1, help="Of the first prompt, at most.", rich_help_panel=_HOW)] = 40,
    by: Annotated[
        str | None,
        typer.Option(help="Judge speed by counted work or by time; time on GPUs.", rich_help_panel=_HOW),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.", rich_help_panel=_HOW)] = 0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.", rich_help_panel=_HOW)] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...", rich_help_panel=_HOW)] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for recipe.yaml, report.md and the evidence.")
    ] = Path("out/tune"),
    format: FormatOption = Format.human,
) -> None:
    """Search pattern, density, schedule and cache for the fastest recipe of a quality, or the best one of a speed.

    Every render is kept: an interrupted search goes on, and another target begins with what is known.
    """
    from .. import _samples
    from ..caching.goal import Goal
    from ..errors import TuneError, UsageError
    from ..kernels import bench
    from ..lab.outcome import Outcome
    from ..lab.rows import Rows
    from ..lab.trials import BY, Trials
    from ..lab.tune import Aim, Effort, Search, checked, judged
    from ..recipe import Recipe, presets
    from ..render import RenderJob, find, open_pipeline
    from ..render.video import check_writable
    from ..render.weights import fingerprint
    from .batch import read_prompts
    from .output import prepare

    screen = Screen(format)
    prepare(screen)
    goal, found, space = Goal.of(target), find(model), _space(attention, density, cache)
    if prompts is None and found.kind != "sample":
        raise UsageError(f"{model} is no sample, so what it should show must be said; add --prompts FILE")
    mine, others = _shown() if prompts is None else (read_prompts(prompts), [])
    others = others if check is None else read_prompts(check)
    if shared := set(mine) & set(others):
        raise UsageError(
            f"{sorted(shared)[0]!r} stands in --prompts and in --check; nothing is shown by what was tuned on"
        )
    job = RenderJob(
        mine[0], model, height=height, width=width, num_frames=frames, num_inference_steps=steps, seed=seed,
        dtype=dtype, device=device,
    ).complete(found)  # fmt: skip
    way = by or ("time" if job.device.startswith("cuda") else "work")
    if way not in BY:
        raise UsageError(f"--by {way!r} is unknown; speed is judged by {' or '.join(BY)}")
    preset = _samples.MODELS.get(model)
    name = baseline or (preset if preset in presets() else None)
    rival = Recipe.load(name) if name else None
    check_writable(output / "evidence.json")
    shared_by_rows = {key: value for key, value in job.to_dict().items() if key not in ("prompt", "device")}
    about = bench.about() | {"model": {"name": model, "fingerprint": fingerprint(found)}, "job": shared_by_rows}
    rows = Rows(about, output / "evidence.json", "tune")
    trials = Trials(open_pipeline(job, found), job, rows, output, screen.say)
    aim = Aim(goal, way)
    search = Search(trials, mine, aim, Effort(renders))
    begin = [space.sparse(candidate) for candidate in judged(trials, space, mine[0])]
    winner = search.run(([rival] if rival else []) + begin, space.cached(found.family.name, job.num_inference_steps))
    recipes = {name: rival} if name and rival else {}
    recipes |= {"tuned": Recipe.from_dict(winner["recipe"])} if winner else {}
    held = checked(trials, others, recipes) if others and recipes else None
    size = f"{job.height}x{job.width}, {job.num_frames} frames, {job.num_inference_steps} steps, {job.dtype}"
    machine = about["device"].get("gpu") or about["device"]["cpu"]
    command = shlex.join(["vidaccel", *sys.argv[1:]])
    outcome = Outcome(aim, f"{model}, {size}, {machine}", command, winner, search.front(search.tried), held)
    files = outcome.save(output)
    if not (screen.json(outcome.data()) or screen.names(files)):
        _show(screen, outcome, files)
    if winner is None:
        raise TuneError(
            f"nothing of {len(search.tried)} recipes that were tried reaches {target} on the {len(mine)} prompts; the "
            f"best stand in {output / 'report.md'}: ask for less, or for more --renders"
        )


def _space(attention: str | None, density: str | None, cache: str | None) -> Any:
    from ..errors import UsageError
    from ..lab.candidates import Space

    asked: dict[str, Any] = {}
    for name, text in (("patterns", attention), ("caches", cache)):
        if text is not None:
            asked[name] = () if text == "none" else tuple(text.split(","))
    if density is not None:
        try:
            asked["densities"] = tuple(sorted({float(part) for part in density.split(",")}))
        except ValueError:
            raise UsageError(f"--density {density!r} is no list of numbers, such as 0.15,0.3") from None
        if not all(0 < value < 1 for value in asked["densities"]):
            raise UsageError(f"--density {density}: a density to begin with lies in (0, 1)")
    space = Space(**asked)
    if not (space.patterns or space.caches):
        raise UsageError("neither patterns nor caches are left to search; drop one of the two none")
    return space


def _shown() -> tuple[list[str], list[str]]:
    """Prompts of the samples' world: scenes as in training, and triples of every colour that training never showed."""
    from .._samples import world

    rng = random.Random(7)
    return [world.draw(rng, things=1).caption() for _ in range(4)], [s.caption() for s in world.unseen()[4::8]]


def _show(screen: Screen, outcome: Any, files: list[Path]) -> None:
    for line in outcome.markdown().splitlines():
        screen.line_of(line)
    for path in files:
        screen.line(path)
