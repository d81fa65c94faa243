"""Block-sparse flash attention for Hopper, warp-specialised, in Gluon: the fastest kernel here.

Idea: one warp fetches by TMA, two or three warp groups multiply, with 64 queries each. Scores of the next tile of keys
    are multiplied while the values of the last one are added, and the next tile of queries is fetched ahead. Where warp
    groups belong to different rows of the mask, they share one stream of keys: the union of the rows' lists, in which
    each entry says who needs it (`joined.py`). Tiles with text in them, which keep everything, are begun first.
Math: that of `portable.py`. A quarter of the exponentials can be polynomials; no configuration here gains by it.
Cost: 4 d flops a kept pair; a tile of 128 queries reads each key it keeps once.
Source: FlashAttention-3 (arXiv 2407.08608): warp specialisation, sections 3.1 and 3.2; FlashAttention-4's split of
    exponentials between two units, and its conditional rescaling.
Limits: fp16, bf16; head dim 128 with blocks of 64 and 128, head dim 64 with blocks of 128 (blocks of 64 are faster in
    `portable.py`); sm_90; Triton 3.6 to 3.9, on whose Gluon these few calls agree (run with 3.6, compiled with 3.9).
Reads strided tensors as they are (through 4-D tensor maps), if their strides are multiples of 16 bytes; else it copies.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch

from .problem import Problem, Rows, Verdict
from .tensor_map import tensor_map

DTYPES = (torch.float16, torch.bfloat16)
# Slots of a block where the call has no mask, and therefore no block size of its own.
WHOLE = 128
# Queries of one warp group.
UNIT = 64
# Where Gluon has the calls that are used here.
VERSIONS = ((3, 6), (3, 10))


class Config(NamedTuple):
    """Launch parameters.

    Attributes:
        stages: slots of the rings of keys and of values.
        units: warp groups that multiply; a tile of queries is 64 times as long.
        persistent: as many programs as the GPU has processors draw tiles from a counter; else one program a tile.
        polynomial: a quarter of the exponentials is computed by the arithmetic units.
        registers: of each thread that multiplies.
    """

    stages: int
    units: int = 2
    persistent: bool = True
    polynomial: bool = False
    registers: int = 240


# (head dim, block) -> config
CONFIGS = {
    (64, 128): Config(4),
    (128, 64): Config(4, units=3, registers=160),
    (128, 128): Config(2),
}


def can_run(problem: Problem) -> Verdict:
    """16-bit floats, the head dims and blocks that it is fast at, a Hopper GPU, and the Gluon that it knows."""
    if problem.device.type != "cuda" or torch.version.hip is not None:
        return Verdict(False, f"it needs a Hopper GPU, the tensors are on {problem.device}")
    found = triton_version()
    if found is None or not VERSIONS[0] <= found < VERSIONS[1]:
        have = "none is installed" if found is None else f"{found[0]}.{found[1]} is installed"
        return Verdict(False, f"it needs Triton 3.6 to 3.9, {have}")
    if problem.dtype not in DTYPES:
        return Verdict(False, f"it computes in float16 and bfloat16, not {problem.dtype}")
    if (problem.d, problem.block or WHOLE) not in CONFIGS:
        have = ", ".join(f"{d} with blocks of {block}" for d, block in CONFIGS)
        return Verdict(False, f"it has head dims {have}, not {problem.d} with blocks of {problem.block or WHOLE}")
    if (capability := torch.cuda.get_device_capability(problem.device)) != (9, 0):
        return Verdict(False, f"it needs compute capability 9.0, this GPU has {capability[0]}.{capability[1]}")
    return Verdict(True)


@lru_cache(maxsize=1)
def triton_version() -> tuple[int, int] | None:
    """(major, minor) of the Triton that is installed."""
    try:
        major, minor = version("triton").split(".")[:2]
    except PackageNotFoundError:
        return None
    return int(major), int(minor)


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: Rows | None,
    scale: float,
    key_bias: torch.Tensor | None,
    chosen: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `vidaccel.kernels.attention` for shapes. `chosen` is for tuning."""
    b, lq, h, d = q.shape
    lk = k.shape[1]
    out = q.new_empty(q.shape)
    lse = q.new_empty((b, h, lq), dtype=torch.float32)
    if not out.numel():
        return out, lse
    if not lk:
        return out.zero_(), lse.fill_(-torch.inf)
    if rows is None:
        rows = Rows.dense(lq, lk, WHOLE, q.device)
    block = rows.block
    chosen = chosen or CONFIGS[d, block]
    share = block // UNIT
    tile = chosen.units * UNIT
    q_tiles = -(-rows.q_blocks * share // chosen.units)
    text_tiles = q_tiles - (rows.q_blocks - rows.text) * block // tile
    total = q_tiles * h * b
    window = None if rows.lo is None or rows.hi is None or rows.pos is None else (rows.lo, rows.hi, rows.pos)
    if window is not None and lk < rows.k_blocks * block:
        # Words of keys are read in whole tiles.
        window = (*window[:2], torch.nn.functional.pad(window[2], (0, rows.k_blocks * block - lk)))
    bias = None if key_bias is None else key_bias if key_bias.stride(-1) == 1 else key_bias.contiguous()
    none = rows.ptr
    # Kernels are launched on the current device, which need not be the tensors' own.
    with torch.cuda.device_of(q):
        entries, count, spread = _joined(rows, chosen.units, share) if chosen.units > share else (rows.idx, none, 0)
        programs = min(total, _processors(q.device)) if chosen.persistent else total
        values = (
            _tensor_map(q, UNIT),
            _tensor_map(k, block),
            _tensor_map(v, block),
            _tensor_map(out, UNIT),
            lse,
            torch.zeros(1, dtype=torch.int32, device=q.device) if chosen.persistent else none,
            rows.ptr,
            entries,
            rows.n_full,
            count,
            rows.q_len,
            rows.k_len,
            *(window or (none, none, none)),
            rows.guards,
            lse if bias is None else bias,
            scale * 1.4426950408889634,
            total,
            q_tiles,
            text_tiles,
            h,
            rows.q_blocks,
            rows.q_blocks if rows.heads > 1 else 0,
            q_tiles if rows.heads > 1 else 0,
            spread,
            lq,
            lk,
            *((0, 0) if bias is None else (bias.stride(0) * (bias.shape[0] > 1), bias.stride(1) * (bias.shape[1] > 1))),
            rows.k_blocks if rows.k_len.ndim == 2 and rows.k_len.shape[0] > 1 else 0,
        )
        constants = (d, block, chosen, share, window is not None, bias is not None)
        _launch(programs, values, constants, q.dtype, q.device.index)
    return out, lse


# Compiled programs by what they were compiled for. Triton's own look-up asks the value of every argument, which takes
# longer than the launch; this program is compiled for none of them.
_programs: dict[tuple[Any, ...], Any] = {}


def _launch(
    programs: int, values: tuple[Any, ...], constants: tuple[Any, ...], dtype: torch.dtype, device: int
) -> None:
    """Launch the program, compiling it where it is new."""
    d, block, chosen, share, window, bias = constants
    given = (
        d, block, chosen.stages, chosen.units, share, chosen.persistent, window, bias, chosen.polynomial,
        chosen.registers,
    )  # fmt: skip
    key = (constants, dtype, device)
    compiled = _programs.get(key)
    if compiled is None:
        _programs[key] = _kernel()[(programs,)](*values, *given, num_warps=4)
    else:
        compiled[(programs, 1, 1)](*values, *given)


def _tensor_map(x: torch.Tensor, slots: int) -> Any:
    """What TMA needs to know to fetch (slots, d) of one head of x (b, l, h, d)."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    dtype = gl.float16 if x.dtype == torch.float16 else gl.bfloat16
    return TensorDescriptor(*tensor_map(x, slots), _layout(slots, x.shape[-1], dtype))


@lru_cache(maxsize=16)
def _layout(slots: int, d: int, dtype: Any) -> Any:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for([1, 1, slots, d], dtype)


@lru_cache(maxsize=8)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=1)
def _kernel() -> Any:
    from .gluon_kernel import block_sparse

    return block_sparse


def _joined(rows: Rows, units: int, share: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    from .joined import join_rows

    return join_rows(rows, units, share)
