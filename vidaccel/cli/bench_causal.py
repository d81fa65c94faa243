"""`vidaccel bench causal`: frames a second of autoregressive Wan, each method beside dense."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import Format, FormatOption, Screen

if TYPE_CHECKING:
    from ..lab.causal_cases import Rival


def causal(
    size: Annotated[str, typer.Option(help="480p, 720p, or both as 480p,720p.")] = "480p",
    frames: Annotated[int, typer.Option(min=4, help="Latent frames of the video.")] = 240,
    window: Annotated[int, typer.Option(min=3, help="Latent frames that a chunk sees.")] = 12,
    sink: Annotated[int, typer.Option(min=0, help="First frames that stay visible.")] = 3,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Run dense and the method of this name, or those with TEXT in theirs; repeatable."),
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model; 30 is Wan 2.1 1.3B.")] = 30,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the transformer's blocks and the decoder.")
    ] = False,
    graphs: Annotated[bool, typer.Option("--graphs", help="Play repeated forwards back as CUDA graphs.")] = False,
    dense: Annotated[
        str | None, typer.Option("--dense-backend", help="diffusers' name of one; else the fastest that runs here.")
    ] = None,
    budget: Annotated[
        float, typer.Option("--budget-seconds", min=1, help="Videos are cut short then, and no further rival begins.")
    ] = float("inf"),
    alone: Annotated[
        bool, typer.Option("--alone", help="Rivals run alone, after dense; else dense takes turns with each.")
    ] = False,
    vae: Annotated[bool, typer.Option(help="Time the decoder too.")] = True,
    tiny: Annotated[bool, typer.Option("--tiny", help="A model of nothing, to see that all of it runs.")] = False,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; a GPU where there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 on GPUs, float32 on CPUs.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON record; rows in it are not measured again.")
    ] = None,
    format: FormatOption = Format.human,
) -> None:
    """Time the chunks of a long video, dense and with each method in turn, on Wan 2.1 1.3B with random weights."""
    import torch

    from ..errors import UsageError
    from ..kernels import bench
    from ..lab import causal_bench, causal_cases
    from ..lab.rows import Rows
    from ..render.dense import check_name
    from ..render.job import DTYPES, check_device
    from ..streaming import Rollout
    from .output import prepare

    screen = Screen(format)
    sizes = size.split(",")
    if unknown := [name for name in sizes if name not in causal_cases.SIZES]:
        raise UsageError(f"--size {unknown[0]} was asked for; there are {', '.join(causal_cases.SIZES)}")
    if output is not None and not output.parent.is_dir():
        raise UsageError(f"-o {output}: there is no folder {output.parent}; make it first")
    where = check_device(device)
    kind = dtype or ("bfloat16" if where.startswith("cuda") else "float32")
    if kind not in DTYPES:
        raise UsageError(f"dtype {kind!r} is unknown; possible: {', '.join(DTYPES)}")
    if graphs and not where.startswith("cuda"):
        raise UsageError(f"--graphs was asked for on {where}; CUDA graphs need a GPU")
    if dense is not None:
        check_name(dense)
    backends = (dense,) if dense is not None else causal_cases.DENSE
    end = time.monotonic() + budget
    dense_one, *others = causal_cases.rivals(frames)
    wanted = {rival.name for text in only or [""] for rival in _named(others, text)}
    chosen = [dense_one, *(rival for rival in others if rival.name in wanted)]
    rollout = Rollout(window=window, sink=sink)
    prepare(screen)
    rows = Rows(bench.about() | {"dtype": kind}, output, "causal")
    for name in sizes:
        height, width = causal_cases.SIZES[name]
        shape: dict[str, Any] = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": layers, "text_dim": 4096}
        decoder: dict[str, Any] | None = {} if vae else None
        if tiny:
            name, height, width = f"{name} (tiny)", 64, 96
            shape = {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 32, "num_layers": 2, "text_dim": 16}
            decoder = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1} if vae else None
        case = causal_cases.Case(
            name, height, width, frames, rollout, shape, 16 if tiny else 512, decoder, compiled, graphs, backends, alone
        )
        screen.say(f"{name}: {len(case.chunks())} chunks, {len(chosen)} rivals")
        left = end - time.monotonic()
        placed = torch.device(where)
        for row in causal_bench.run(case, chosen, placed, DTYPES[kind], seconds=left, say=screen.say, find=rows.find):
            rows.add(row)
            screen.say(_line(row))
    if not screen.json(rows.data()) and not screen.names(row["rival"] for row in rows.rows if row["ok"]):
        screen.table([_cells(row) for row in rows.rows], title="autoregressive video")
    if not all(row["ok"] for row in rows.rows):
        raise typer.Exit(1)


def _named(rivals: list[Rival], text: str) -> list[Rival]:
    """The one of this name, or else those with it in theirs."""
    whole = [rival for rival in rivals if rival.name == text]
    return whole or [rival for rival in rivals if text in rival.name]


def _line(row: dict[str, Any]) -> str:
    if not row["ok"]:
        return f"{row['case']}, {row['rival']}: no figure: {row['reason']}"
    amount = sum(row["tflop"].values())
    return (
        f"{row['case']}, {row['rival']}: {row['fps']:.1f} frames a second, {row['speedup']:.2f} x dense; a chunk takes "
        f"{row['chunk_ms']:.0f} ms for {amount:.3g} TFLOP, {row['bound_ms']:.0f} ms at the rates reached alone"
    )


def _cells(row: dict[str, Any]) -> dict[str, object]:
    times = ("fps", "fps_with_vae", "chunk_ms", "bound_ms", "speedup", "attention_speedup", "first_ms", "last_ms")
    names = (*times, "density", "reuse_rate", "cache_mib")
    return {"size": row["case"], "rival": row["rival"]} | {name: row.get(name, row["reason"]) for name in names}
