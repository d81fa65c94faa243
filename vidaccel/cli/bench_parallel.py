"""`vidaccel bench parallel`: one video on several GPUs, against one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .output import Format, FormatOption, Screen

_WHAT, _HOW, _RESULT = "What to run", "How to measure", "Result"


def parallel(
    models: Annotated[
        str, typer.Option("--model", "-m", help="Released models: wan2.1-14b,hunyuan-video.", rich_help_panel=_WHAT)
    ],
    height: Annotated[int | None, typer.Option(help="Pixels.", rich_help_panel=_WHAT)] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", rich_help_panel=_WHAT)] = None,
    frames: Annotated[int | None, typer.Option(help="Frames.", rich_help_panel=_WHAT)] = None,
    attention: Annotated[
        str, typer.Option("--attention", "-a", help="Patterns, beside dense: radial,topk.", rich_help_panel=_WHAT)
    ] = "radial",
    density: Annotated[
        float, typer.Option("--density", "-d", help="Share of pairs that patterns keep.", rich_help_panel=_WHAT)
    ] = 0.25,
    cache: Annotated[
        bool, typer.Option("--cache", help="Also a forecast step of cg-taylor.", rich_help_panel=_WHAT)
    ] = False,
    layers: Annotated[
        int, typer.Option(min=1, help="Layers that are timed; the others cost the same.", rich_help_panel=_HOW)
    ] = 4,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the blocks.", rich_help_panel=_HOW)] = False,
    repeats: Annotated[
        int, typer.Option(min=1, help="Rounds of interleaved calls; the median counts.", rich_help_panel=_HOW)
    ] = 5,
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu; GPUs where there are any.", rich_help_panel=_HOW)
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 on GPUs, float32 on CPUs.", rich_help_panel=_HOW)] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON record, a new file.", rich_help_panel=_RESULT)
    ] = None,
    format: FormatOption = Format.human,
) -> None:
    """Time one call of a model on all GPUs together and on each alone; start it with torchrun."""
    from ..errors import UsageError
    from ..kernels import bench
    from ..lab.parallel_bench import ParallelBench, ParallelJob
    from ..lab.rows import Rows
    from ..pipelines.zoo import real_model
    from ..recipe import pattern_from
    from ..render.job import DTYPES, check_device
    from .output import prepare
    from .world import joined

    with joined(device=device) as world:
        screen = Screen(format if world.is_first else Format.quiet, world.is_news)
        found = [real_model(name) for name in models.split(",")]
        if world.size == 1:
            raise UsageError(
                "one process was started; start one for each GPU: "
                "torchrun --nproc-per-node 2 -m vidaccel bench parallel -m wan2.1-14b"
            )
        world.decided(lambda: _check(output))
        where = check_device(world.device(device))
        kind = dtype or ("bfloat16" if where.startswith("cuda") else "float32")
        if kind not in DTYPES:
            raise UsageError(f"dtype {kind!r} is unknown; possible: {', '.join(DTYPES)}")
        if not 0 < density <= 1:
            raise UsageError(f"density {density:g} was asked for; it is the fraction of pairs kept, in (0, 1]")
        patterns: list[Any] = [(pattern, density) for text in attention.split(",") if (pattern := pattern_from(text))]
        prepare(screen)
        about = {**bench.about(), "what": "parallel", "ranks": world.size}
        rows = Rows(about, output if world.is_first else None)
        for model in found:
            size = height or model.size[0], width or model.size[1], frames or model.size[2]
            job = ParallelJob(model, size, where, DTYPES[kind], layers, repeats, compiled)
            lab = ParallelBench(job, rows, lambda row: screen.say(_line(row)))
            lab.run(patterns, cache=cache)
        if not world.is_first:
            return
        if not screen.json(rows.data()) and not screen.names(row["key"] for row in rows.rows if row["ok"]):
            screen.table([_cells(row) for row in rows.rows], title=f"{world.size} ranks")
        if not all(row["ok"] for row in rows.rows):
            raise typer.Exit(1)


def _check(output: Path | None) -> None:
    from ..errors import UsageError

    if output is not None and (output.exists() or not output.parent.is_dir()):
        raise UsageError(f"-o {output} exists, or its folder does not; name a new file in a folder that is there")


def _line(row: dict[str, Any]) -> str:
    cells = {name: value for name, value in _cells(row).items() if value is not None}
    return ", ".join(f"{name} {f'{value:.4g}' if isinstance(value, float) else value}" for name, value in cells.items())


def _cells(row: dict[str, Any]) -> dict[str, object]:
    one, together = row.get("one", {}), row.get("all", {})
    forecast = row.get("predicted", {})
    return {
        "model": row["model"],
        "what": row["variant"],
        "GB/s": row.get("gb_s"),
        "exchange ms": row.get("exchange_ms"),
        "one GPU ms": one.get("call_ms"),
        "all ms": together.get("call_ms"),
        "speed-up": row.get("speedup") or row.get("step_speedup"),
        "efficiency": row.get("efficiency"),
        "a video each": row.get("videos_speedup"),
        "exchange share": row.get("exchange_share"),
        "GiB a GPU": together.get("activations_gib") and together["activations_gib"] + together["weights_gib"],
        "predicted at 8": forecast[8]["speedup"] if 8 in forecast else None,
        "result": "ok" if row["ok"] else row["reason"],
    }
