"""`vidaccel bench`: measure on this machine; tables for people, JSON for the record."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError
from .bench_causal import causal
from .bench_model import model
from .bench_parallel import parallel
from .bench_render import render
from .output import Format, FormatOption, Screen

app = typer.Typer(help="Measure kernels, models and renders on this machine.", no_args_is_help=True)
app.command(
    epilog="Example: vidaccel bench model --model wan2.1-14b --attention radial --density 0.25 --compile -o wan.json"
)(model)
app.command(epilog="Example: vidaccel bench render -r wan-tiny --cache cg-taylor --peers installed -o renders.json")(
    render
)
app.command(epilog="Example: torchrun --nproc-per-node 2 -m vidaccel bench parallel -m wan2.1-14b -o parallel.json")(
    parallel
)
app.command(epilog="Example: vidaccel bench causal --size 480p,720p --compile -o causal.json")(causal)


class Device(str, enum.Enum):
    """Where to measure."""

    cpu = "cpu"
    cuda = "cuda"


@app.callback()
def root() -> None:
    """Measure kernels, models and renders on this machine."""


@app.command(epilog="Example: vidaccel bench kernels --device cpu --format json -o kernels-cpu.json")
def kernels(
    device: Annotated[Device | None, typer.Option(help="Where to measure; a GPU where there is one.")] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Turns of each kernel; the median counts. 25, on CPUs 9.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only cases with this in their name, such as 'Wan 720p' or 'radial 0.25'; again for more."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON record; cases in it are not measured again.")
    ] = None,
    format: FormatOption = Format.human,
) -> None:
    """Time sparse attention against dense attention and other projects' kernels. What is wrong gets no figure."""
    from ..kernels import bench, bench_rivals
    from ..lab.kernel_cases import cases, problems
    from ..lab.kernel_figures import by_kernel
    from ..lab.rows import Rows

    place = _place(device, output)
    every = cases(place)
    chosen = [case for case in every if any(text in case.title for text in only or [""])]
    if not chosen:
        titles = "; ".join(case.title for case in every)
        raise UsageError(f"--only {' --only '.join(map(repr, only or []))} was asked for; there are {titles}")
    screen = Screen(format)
    absent = bench_rivals.absent() if place == "cuda" else {}
    for name, reason in absent.items():
        screen.say(f"{name}: {reason}")
    record = Rows(bench.about() | {"schema": bench.SCHEMA, "absent": absent}, output, "kernels")
    left = problems([case for case in chosen if record.find(case.title) is None])
    for case in bench.run(place, left, repeats or (bench.REPEATS if place == "cuda" else 9)):
        record.add(case)
        for row in by_kernel([case]):
            screen.say(_line(row))
    rows = by_kernel(record.rows)
    if not screen.json(record.data()) and not screen.names(row["kernel"] for row in rows if row["ok"]):
        screen.table([_cells(row) for row in rows], title="attention kernels")
    if not all(row["ok"] for row in rows if row["kernel"] in bench_rivals.OURS):
        raise typer.Exit(1)


@app.command(epilog="Example: vidaccel bench around -o around.json")
def around(
    only: Annotated[str | None, typer.Option(help="Only layers with this in their name, such as 'Wan'.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON record; layers in it are not measured again.")
    ] = None,
    format: FormatOption = Format.human,
) -> None:
    """Time what stands around attention in a layer on a GPU: norm, RoPE and reorder, masks, forecasts of features."""
    from ..kernels import bench, bench_around
    from ..lab.rows import Rows

    place = _place(Device.cuda, output)
    screen = Screen(format)
    record = Rows(bench.about(), output, "around")
    measured = {row["name"] for row in record.rows}
    chosen = [shape for shape in bench_around.SHAPES if only is None or only in shape.name]
    if not chosen:
        names = "; ".join(shape.name for shape in bench_around.SHAPES)
        raise UsageError(f"--only {only!r} was asked for; there are {names}")
    for row in bench_around.run(place, tuple(shape for shape in chosen if shape.name not in measured)):
        result = f"{row['ms']:.2f} ms" if row["ok"] else f"no figure: {row['error']:.2g} times the allowed error"
        screen.say(f"{row['key']}: {result}")
        record.add(row)
    if not screen.json(record.data()) and not screen.names(row["key"] for row in record.rows if row["ok"]):
        shown = ("name", "work", "ms", "gb_s", "copy_gb_s", "ratio", "share")
        screen.table([{name: row.get(name) for name in shown} for row in record.rows], title="around attention")
    if not all(row["ok"] for row in record.rows):
        raise typer.Exit(1)


def _place(device: Device | None, output: Path | None) -> str:
    """Where to measure, after a look at whether that and the record's folder are there."""
    import torch

    if device is Device.cuda and not torch.cuda.is_available():
        raise UsageError("a CUDA GPU was asked for, and torch sees none here; `bench kernels --device cpu` needs none")
    if output is not None and not output.parent.is_dir():
        raise UsageError(f"-o {output}: there is no folder {output.parent}; make it first")
    return device.value if device else "cuda" if torch.cuda.is_available() else "cpu"


def _line(row: dict[str, Any]) -> str:
    result = f"{row['ms']:.1f} ms" if row["ok"] else f"no figure: {row['reason']}"
    return f"{row['key']}: {result}"


def _cells(row: dict[str, Any]) -> dict[str, object]:
    return {
        "shape": row["name"],
        "tokens x heads x d": f"{row['tokens']} x {row['heads']} x {row['d']}",
        "block": row["block"],
        "pattern": row["pattern"],
        "density": row["density"],
        "visited": row.get("visited"),
        "kernel": row["kernel"],
        "ms": row.get("ms"),
        "x dense": row.get("ratio"),
        "TFLOP/s": row.get("tflops"),
        "of dense": row.get("of_dense"),
        "error / budget": row["error"] if row["ok"] else row["reason"],
    }
