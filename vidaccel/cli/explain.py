"""`vidaccel explain`: where attention looks and what patterns keep of it, and where a broken video breaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import Format, FormatOption, Screen

if TYPE_CHECKING:
    from ..patterns import Pattern
    from ..recipe import Recipe


def explain(
    ctx: typer.Context,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to show.")] = "a red circle moves right",
    model: Annotated[str, typer.Option("--model", "-m", help="A shipped sample, a folder, or a hub id.")] = "wan-tiny",
    attention: Annotated[
        str, typer.Option("--attention", "-a", help="Patterns to judge.")
    ] = "radial,topk,neighborhood",
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="A preset or a file: explains its pattern and its schedule.")
    ] = None,
    density: Annotated[
        float | None,
        typer.Option("--density", "-d", help="Share of video-video pairs that every pattern keeps, in (0, 1]."),
    ] = 0.35,
    block: Annotated[int, typer.Option(help="Tokens of a block.")] = 64,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    at: Annotated[
        str | None, typer.Option(help="Steps to look at, such as 0,10,19; first, middle and last without it.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Queries to look at in each layer.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    find_nan: Annotated[
        bool,
        typer.Option(
            "--find-nan", help="NaN or black frames: render with the first pattern, and stop at the first broken layer."
        ),
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for atlas.json, .html and .png.")] = Path(
        "out/explain"
    ),
    format: FormatOption = Format.human,
) -> None:
    """Measure the attention mass that each pattern keeps, by layer, head and step, on one render; and say why."""
    import warnings
    from dataclasses import replace

    from ..errors import UsageError, VidaccelWarning
    from ..files import replacing
    from ..lab.explain import Atlas, AtSteps, Everything
    from ..lab.trouble import watched
    from ..lab.why import reasons
    from ..recipe import Recipe
    from ..render import RenderJob, find, open_pipeline, render
    from ..report import atlas as pages
    from .output import prepare

    screen = Screen(format)
    if recipe is not None:
        for name in ("attention", "density", "block"):
            if "COMMANDLINE" in str(ctx.get_parameter_source(name)):
                raise UsageError(f"--{name} was given beside recipe {recipe}, which decides it; drop one of the two")
    prepare(screen)
    patterns, explained = _asked(attention, recipe, block, density)
    density = explained.density
    found = find(model)
    job = RenderJob(
        prompt, model, height=height, width=width, num_frames=frames, num_inference_steps=steps, seed=seed, dtype=dtype,
        device=device,
    ).complete(found)  # fmt: skip
    if at is None:
        last = job.num_inference_steps - 1
        chosen = tuple(sorted({0, last // 2, last}))
    else:
        chosen = _steps(at, job.num_inference_steps)
    if not find_nan:
        _writable(output)
    pipe = open_pipeline(job, found)
    if find_nan:
        with watched(pipe):
            rendering = render(pipe, replace(job, recipe=explained))
        result = {"finite": True, "problems": rendering.problems}
        if not screen.json(result) and not screen.is_quiet:
            screen.line("every layer of every step and the VAE gave finite numbers, and every kernel was right")
            for problem in rendering.problems:
                screen.line(f"but {problem}: compare with --attention dense, and with another prompt and seed")
        return
    seen = Atlas(patterns, density, samples)
    with warnings.catch_warnings():
        # Keeping every pair is what is wanted here.
        warnings.simplefilter("ignore", VidaccelWarning)
        whole = Recipe(attention=Everything(patterns[0].block), schedule=AtSteps(steps=chosen))
        with seen.watching(pipe.transformer):
            render(pipe, replace(job, recipe=whole))
    if not seen.rows:
        raise UsageError(f"steps {at} were asked for, but none of them ran")
    why = reasons(seen, explained.schedule, job.num_inference_steps, _layers(pipe.transformer), density)
    about = {"prompt": prompt, "model": model, "seed": seed, "steps": chosen}
    data: dict[str, Any] = {**seen.data(), "why": why, "about": about}
    files = {"json": json.dumps(data).encode(), "html": pages.html(data).encode(), "png": pages.png(data)}
    for kind, content in files.items():
        with replacing(output / f"atlas.{kind}") as temporary:
            temporary.write_bytes(content)
    if screen.json(data) or screen.names(output / f"atlas.{kind}" for kind in files):
        return
    screen.table([_cells(name, judged) for name, judged in data["patterns"].items()], title="attention mass kept")
    kinds = sorted({kind for counts in data["heads"].values() for kind in counts})
    rows = [{"step": step, **{kind: counts.get(kind, 0) for kind in kinds}} for step, counts in data["heads"].items()]
    screen.table(rows, title="heads by what they look for")
    for sentences in why.values():
        for sentence in sentences:
            screen.line(f"- {sentence}")
    screen.line(f"atlas: {output / 'atlas.html'}")


def _asked(attention: str, recipe: str | None, block: int, density: float | None) -> tuple[list[Pattern], Recipe]:
    """Patterns to judge, and the recipe that is explained: that named, or the first pattern as `accelerate` has it."""
    from ..api import DEFAULT_SCHEDULE
    from ..errors import UsageError
    from ..recipe import Recipe, pattern_from

    if recipe is not None:
        found = Recipe.load(recipe)
        if found.attention is None or found.attention.name == "dense":
            raise UsageError(f"recipe {recipe} has no sparse pattern to explain")
        return [found.attention], found
    patterns = [p for name in attention.split(",") if (p := pattern_from({"name": name.strip(), "block": block}))]
    return patterns, Recipe(attention=patterns[0], density=density, schedule=DEFAULT_SCHEDULE)


def _layers(transformer: Any) -> int:
    from ..family import family_of

    return 1 + max(site.index for site in family_of(transformer).sites(transformer))


def _steps(text: str, total: int) -> tuple[int, ...]:
    from ..errors import UsageError

    try:
        chosen = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise UsageError(f"--at {text!r} is no list of steps, such as 0,10,19") from None
    if not 0 <= chosen[0] <= chosen[-1] < total:
        raise UsageError(f"--at {text}: this run has steps 0 to {total - 1}")
    return chosen


def _writable(folder: Path) -> None:
    from ..render.video import check_writable

    check_writable(folder / "atlas.json")


def _cells(name: str, judged: dict[str, Any]) -> dict[str, object]:
    worst = judged.get("worst", {})
    return {
        "pattern": name,
        "density": judged.get("delivered"),
        "mass kept": judged.get("kept"),
        "worst head": worst.get("kept"),
        "where": f"step {worst['step']}, layer {worst['layer']}, head {worst['head']}" if worst else judged["reason"],
    }
