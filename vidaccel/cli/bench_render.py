"""`vidaccel bench render`: whole videos, stock diffusers and other projects beside vidaccel's recipes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import Format, FormatOption, Screen

_WHAT, _WHO, _HOW = "What to render", "Who renders", "How to measure"


def render(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A shipped sample, a folder, or a hub id.", rich_help_panel=_WHAT)
    ] = "wan-tiny",
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to show.", rich_help_panel=_WHAT)] = (
        "a red circle moves right"
    ),
    height: Annotated[int | None, typer.Option(help="Pixels.", rich_help_panel=_WHAT)] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", rich_help_panel=_WHAT)] = None,
    frames: Annotated[int | None, typer.Option(help="Frames.", rich_help_panel=_WHAT)] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", rich_help_panel=_WHAT)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.", rich_help_panel=_WHAT)] = 0,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Presets and files: wan-tiny,mine.yaml.", rich_help_panel=_WHO)
    ] = None,
    attention: Annotated[
        str | None, typer.Option("--attention", "-a", help="Patterns: radial,topk.", rich_help_panel=_WHO)
    ] = None,
    density: Annotated[
        str | None,
        typer.Option(
            "--density",
            "-d",
            help="Share of pairs that each pattern keeps: 0.25,0.5; 0.25 without it.",
            rich_help_panel=_WHO,
        ),
    ] = None,
    cache: Annotated[
        str | None, typer.Option("--cache", "-c", help="Caches: cg-taylor,teacache.", rich_help_panel=_WHO)
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(help="Other projects: cache-dit:threshold=0.12,natten; installed.", rich_help_panel=_WHO),
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(help="Dense attention to beat: flash3,cudnn,sage; all that is here.", rich_help_panel=_WHO),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Everybody with compiled blocks, too.", rich_help_panel=_WHO)
    ] = False,
    repeats: Annotated[
        int, typer.Option(min=1, help="Rounds in which everybody renders once.", rich_help_panel=_HOW)
    ] = 3,
    device: Annotated[str | None, typer.Option(help="cuda or cpu.", rich_help_panel=_HOW)] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 on GPUs, float32 on CPUs.", rich_help_panel=_HOW)] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="JSON record; what is in it is not measured again.", rich_help_panel=_HOW),
    ] = None,
    format: FormatOption = Format.human,
) -> None:
    """Render one prompt every way in turn, in one process: time, first-run cost, memory, likeness to the dense one."""
    from ..errors import UsageError
    from ..kernels import bench
    from ..lab.peers import named
    from ..lab.render_bench import Entrant, RenderBench
    from ..lab.rows import Rows
    from ..render import RenderJob, find, open_pipeline
    from ..render.weights import fingerprint
    from .output import prepare

    screen = Screen(format)
    prepare(screen)
    if output is not None and not output.parent.is_dir():
        raise UsageError(f"-o {output}: there is no folder {output.parent}; make it first")
    if density is not None and attention is None:
        raise UsageError(f"--density {density} was given without a pattern; add --attention, such as radial")
    found, recipes, others = (
        find(model),
        _recipes(recipe, attention, density or "0.25", cache),
        named(peers) if peers else [],
    )
    job = RenderJob(
        prompt, model, height=height, width=width, num_frames=frames, num_inference_steps=steps, seed=seed,
        dtype=dtype, device=device,
    ).complete(found)  # fmt: skip
    shared = {key: value for key, value in job.to_dict().items() if key != "device"}
    about = bench.about() | {"model": {"name": model, "fingerprint": fingerprint(found)}, "job": shared}
    rows = Rows(about, output, "render")
    grid = found.grid(job.height, job.width, job.num_frames)
    lab = RenderBench(open_pipeline(job, found), job, grid, rows, screen.say)
    contexts = lab.dense(tuple(dense.split(",")) if dense else ())
    base = next(iter(contexts.values()))
    eager = [Entrant("dense", name, False, context) for name, context in contexts.items()]
    eager += [Entrant("vidaccel", name, False, base, recipe=each) for name, each in recipes.items()]
    eager += [Entrant("peer", str(peer), False, base, peer=peer) for peer in others]
    lab.run(eager + ([replace(each, compiled=True) for each in eager] if compiled else []), repeats)
    results = [row for row in rows.rows if row["kind"] == "render"]
    if not screen.json(rows.data()) and not screen.names(row["variant"] for row in results if row["ok"]):
        screen.table(
            [_cells(row) for row in results], title=f"{model}, {job.height}x{job.width}, {job.num_frames} frames"
        )
    if not any(row["ok"] for row in results):
        raise typer.Exit(1)


def _recipes(recipe: str | None, attention: str | None, density: str, cache: str | None) -> dict[str, Any]:
    """Recipes by the names that tables give them. A pattern that is named runs, even where dense would be faster."""
    from ..api import DEFAULT_SCHEDULE
    from ..recipe import Recipe, pattern_from, policy_from
    from .bench_model import densities

    found = {Path(name).stem: Recipe.load(name) for name in (recipe.split(",") if recipe else ())}
    for name in attention.split(",") if attention else ():
        for each in densities(density):
            schedule = replace(DEFAULT_SCHEDULE, even_if_slower=True)
            found[f"{name} {each:g}"] = Recipe(pattern_from(name), each, schedule)
    for name in cache.split(",") if cache else ():
        found[name] = Recipe(cache=policy_from(name))
    return found


def _cells(row: dict[str, Any]) -> dict[str, object]:
    return {
        "what": row["what"],
        "variant": row["variant"],
        "how": "compiled" if row["compiled"] else "eager",
        "first s": row.get("first_s"),
        "denoise s": row.get("denoise_s"),
        "total s": row.get("total_s"),
        "x dense": row.get("speedup"),
        "dB": row.get("psnr"),
        "SSIM": row.get("ssim"),
        "peak GiB": row.get("peak_gib"),
        "result": "ok" if row["ok"] else row["reason"],
    }
