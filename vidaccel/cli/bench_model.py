"""`vidaccel bench model`: a transformer of real size, accelerated, against the stock one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import Format, FormatOption, Screen

_WHAT, _HOW, _RESULT = "What to run", "How to measure", "Result"


def model(
    name: Annotated[
        str, typer.Option("--model", "-m", help="A released model, such as wan2.1-14b.", rich_help_panel=_WHAT)
    ],
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.", rich_help_panel=_WHAT)] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.", rich_help_panel=_WHAT)] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames.", rich_help_panel=_WHAT)] = None,
    attention: Annotated[
        str, typer.Option("--attention", "--patterns", "-a", help="Patterns: radial,topk.", rich_help_panel=_WHAT)
    ] = "radial",
    density: Annotated[
        str, typer.Option("--density", "-d", help="Densities: 0.25,0.1.", rich_help_panel=_WHAT)
    ] = "0.25",
    cache: Annotated[
        str | None, typer.Option("--cache", "-c", help="Time a forecast step of this cache.", rich_help_panel=_WHAT)
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Time whole videos of so many steps, 12 of 50 computed.", rich_help_panel=_WHAT),
    ] = None,
    computed: Annotated[
        int | None, typer.Option(min=1, help="How many of --steps are computed.", rich_help_panel=_WHAT)
    ] = None,
    guidance: Annotated[
        bool,
        typer.Option(
            "--guidance/--no-guidance",
            help="Videos of two calls a step, or of one; see --steps.",
            rich_help_panel=_WHAT,
        ),
    ] = True,
    layers: Annotated[
        int, typer.Option(min=1, help="Layers that are timed; the others cost the same.", rich_help_panel=_HOW)
    ] = 4,
    whole: Annotated[bool, typer.Option("--whole", help="Also time all layers.", rich_help_panel=_HOW)] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Also measure with compiled blocks.", rich_help_panel=_HOW)
    ] = False,
    dense: Annotated[
        str | None,
        typer.Option(help="Dense backends to try: flash3,cudnn; all that are here without it.", rich_help_panel=_HOW),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(help="Attention of other projects: natten:density=0.25; installed.", rich_help_panel=_HOW),
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="Rounds of interleaved calls; the median counts.", rich_help_panel=_HOW)
    ] = 5,
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu; a GPU where there is one.", rich_help_panel=_HOW)
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 on GPUs, float32 on CPUs.", rich_help_panel=_HOW)] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="JSON record; rows in it are not measured again.", rich_help_panel=_RESULT),
    ] = None,
    format: FormatOption = Format.human,
) -> None:
    """Time one call of a model at real size, with random weights, against stock diffusers at its fastest."""
    from ..errors import UsageError
    from ..kernels import bench
    from ..lab import steps_bench
    from ..lab.estimate import spread
    from ..lab.model_bench import Job, ModelBench
    from ..lab.peers import named
    from ..lab.rows import Rows
    from ..pipelines.zoo import real_model
    from ..recipe import pattern_from, policy_from
    from ..render.job import DTYPES, check_device
    from .output import prepare

    screen = Screen(format)
    found = real_model(name)
    if not guidance:
        if found.guidance != "two calls":
            raise UsageError(f"--no-guidance leaves out the second call of a step; {name} has one call a step anyway")
        found = replace(found, contexts=found.contexts[:1])
    if output is not None and not output.parent.is_dir():
        raise UsageError(f"-o {output}: there is no folder {output.parent}; make it first")
    if computed is not None and steps is None:
        raise UsageError(f"--computed {computed} counts the steps of whole videos that are computed; add --steps")
    if computed is not None and steps is not None and computed > steps:
        raise UsageError(f"--computed {computed} was asked for of {steps} steps; give 1 to {steps}")
    where = check_device(device)
    kind = dtype or ("bfloat16" if where.startswith("cuda") else "float32")
    if kind not in DTYPES:
        raise UsageError(f"dtype {kind!r} is unknown; possible: {', '.join(DTYPES)}")
    patterns = [
        (pattern, each)
        for text in attention.split(",")
        for each in densities(density)
        if (pattern := pattern_from(text))
    ]
    policy, others = policy_from(cache), named(peers) if peers else []
    prepare(screen)
    size = height or found.size[0], width or found.size[1], frames or found.size[2]
    rivals = tuple(dense.split(",")) if dense else ()
    job = Job(found, size, where, DTYPES[kind], layers, repeats, compiled, whole, steps is not None, rivals)
    rows = Rows(bench.about(), output)
    lab = ModelBench(job, rows, lambda row: screen.say(_line(row)))
    lab.run(patterns, others)
    if policy is not None:
        steps_bench.cache(lab, policy)
    if steps is not None:
        chosen = spread(steps, computed or max(1, steps * 12 // 50))
        for pattern, each in patterns:  # Sparse ones first: they end sooner, and each is a row.
            steps_bench.trajectory(lab, steps, chosen, pattern, each)
        steps_bench.trajectory(lab, steps, chosen)
    if not screen.json(rows.data()) and not screen.names(row["key"] for row in rows.rows if row["ok"]):
        screen.table([_cells(row) for row in rows.rows], title=f"{name}, {size[0]}x{size[1]}, {size[2]} frames")
    if not any(row["ok"] for row in rows.rows):
        raise typer.Exit(1)


def densities(text: str) -> list[float]:
    """Densities that stand in one option.

    Raises:
        UsageError: something that is none.
    """
    return [_density(part) for part in text.split(",")]


def _density(text: str) -> float:
    from ..errors import UsageError

    try:
        value = float(text)
    except ValueError:
        raise UsageError(f"density {text!r} is not a number; give one or several, such as 0.25,0.1") from None
    if not 0 < value <= 1:
        raise UsageError(f"density {text} was asked for; it is the fraction of pairs kept, in (0, 1], 1 is dense")
    return value


def _line(row: dict[str, Any]) -> str:
    cells = {
        name: value for name, value in _cells(row).items() if value is not None and name not in ("kind", "variant")
    }
    figures = ", ".join(
        f"{name} {f'{value:.4g}' if isinstance(value, float) else value}" for name, value in cells.items()
    )
    return f"{row['kind']} {row['variant']}: {figures}"


def _cells(row: dict[str, Any]) -> dict[str, object]:
    layers = row.get("layer_ms") or {}
    skipped = row.get("skipped_share")
    return {
        "kind": row["kind"],
        "variant": row["variant"],
        "how": "compiled" if row["compiled"] else "eager",
        "layer ms": " + ".join(f"{ms:.4g}" for ms in layers.values()) or None,
        "call ms": row.get("call_ms"),
        "whole ms": row.get("whole_ms"),
        "x dense": row.get("speedup"),
        "bound": row.get("bound"),
        "reached": row.get("reached"),
        "kernel ms": row.get("kernel_ms"),
        "alone": row.get("kernel_alone_ms"),
        "video s": row.get("seconds"),
        "skipped step": None if skipped is None else f"{100 * skipped:.2f} %",
        "result": "ok" if row["ok"] else row["reason"],
    }
