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
    device: Annotated[Device, typer.Option(help="Where to measure.")] = Device.cpu,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each kernel; the median counts.")] = 9,
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
    import torch

    from ..kernels import bench, bench_rivals
    from ..lab.kernel_cases import cases, problems
    from ..lab.rows import Rows

    if device is Device.cuda and not torch.cuda.is_available():
        raise UsageError("--device cuda was asked for, but torch sees no CUDA GPU here; use --device cpu")
    if output is not None and not output.parent.is_dir():
        raise UsageError(f"-o {output}: there is no folder {output.parent}; make it first")
    every = cases(device.value)
    chosen = [case for case in every if any(text in case.title for text in only or [""])]
    if not chosen:
        titles = "; ".join(case.title for case in every)
        raise UsageError(f"--only {' --only '.join(map(repr, only or []))} was asked for; there are {titles}")
    screen = Screen(format)
    absent = bench_rivals.absent() if device is Device.cuda else {}
    for name, reason in absent.items():
        screen.say(f"{name}: {reason}")
    record = Rows(bench.about() | {"absent": absent}, output, "kernels")
    measured = {row["key"].removesuffix(f", {row['kernel']}") for row in record.rows}
    for row in bench.run(device.value, problems([case for case in chosen if case.title not in measured]), repeats):
        screen.say(_line(row))
        record.add(row)
    rows = record.rows
    if not screen.json(record.data()) and not screen.names(row["kernel"] for row in rows if row["ok"]):
        screen.table([_cells(row) for row in rows], title="attention kernels")
    if not all(row["ok"] for row in rows if row["kernel"] in bench_rivals.OURS):
        raise typer.Exit(1)


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
        "visited": row["visited"],
        "kernel": row["kernel"],
        "ms": row.get("ms"),
        "x dense": row.get("ratio"),
        "TFLOP/s": row.get("tflops"),
        "of dense": row.get("of_dense"),
        "error / budget": row["error"] / row["budget"] if row["ok"] else row["reason"],
    }
