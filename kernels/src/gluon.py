"""Block-sparse flash attention for Hopper, warp-specialised, in Gluon: the fastest kernel here.

Idea: a stream is one warp that fetches by TMA, and one or two warp groups that multiply, with 64 queries each. Scores
    of the next tile of keys are multiplied while the values of the last one are added. One stream of two warp groups,
    whose 128 queries share each tile, is fastest where multiplying a tile takes longer than its softmax. Elsewhere
    three streams of one warp group each hide what the others wait for, and none waits for another's keys. Rows of
    text, which keep everything, are begun first. Behind the last key of a short tile TMA fetches values of zero, for
    its map of the values ends where the tile does. A bias of keys is what the tensor cores add products to.
Math: that of `portable.py`.
Cost: 4 d flops a kept pair; a stream reads each key that its row keeps once.
Source: FlashAttention-3 (arXiv 2407.08608): warp specialisation, sections 3.1 and 3.2; FlashAttention-4's conditional
    rescaling.
Limits: fp16, bf16; head dims 64 and 128, blocks of 64 and 128; sm_90; Triton 3.6 to 3.9, on whose Gluon these few calls
    agree (run with 3.6, compiled with 3.9).
Reads strided tensors as they are (through tensor maps), if their strides are multiples of 16 bytes; else it copies.
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
    """Launch parameters, in the order in which the program takes them.

    Attributes:
        slots: tiles of keys or values in the ring of a stream.
        streams: 1, of two warp groups, or 3, of one each.
        ahead: rows whose queries a stream holds; with two, the next row's are fetched while this one is worked on.
        registers: of each thread that multiplies.
    """

    slots: int
    streams: int = 1
    ahead: int = 2
    registers: int = 232


# (head dim, block) -> config
CONFIGS = {
    (64, 64): Config(6, streams=3, registers=160),
    (64, 128): Config(3, streams=3, registers=160),
    (128, 64): Config(3, streams=3, ahead=1, registers=160),
    (128, 128): Config(5),
}
# The same where windows need registers that three streams do not have.
WINDOWED = CONFIGS | {(64, 128): Config(8)}


def config(d: int, block: int, *, window: bool = False, bias: bool = False) -> Config:
    """The launch parameters of a call."""
    chosen = (WINDOWED if window else CONFIGS)[d, block]
    # A slot makes room for what is told of the others' keys.
    return chosen._replace(slots=chosen.slots - 1) if (window or bias) and chosen.streams == 1 else chosen


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
    chosen = chosen or config(d, block, window=rows.lo is not None, bias=key_bias is not None)
    units = 2 if chosen.streams == 1 else 1
    # Where one warp group has a row of the mask, whose queries are 128, to itself, it takes it in two parts.
    parts = block // (UNIT * units)
    total = rows.q_blocks * parts * h * b
    pos = rows.pos
    if pos is not None and lk < rows.k_blocks * block:
        # Words of keys are read in whole tiles.
        pos = torch.nn.functional.pad(pos, (0, rows.k_blocks * block - lk))
    if key_bias is not None:
        # In units of the product of queries and keys, to which the tensor cores add it, and in whole tiles, key by key.
        key_bias = torch.nn.functional.pad((key_bias / scale).contiguous(), (0, rows.k_blocks * block - lk))
    # Kernels are launched on the current device, which need not be the tensors' own.
    with torch.cuda.device_of(q):
        programs = min(-(-total // chosen.streams), _processors(q.device))
        values = (
            _tensor_map(q, UNIT),
            _blocks_map(k, block),
            _ends_map(v, block),
            _tensor_map(out, UNIT),
            lse,
            torch.zeros(1, dtype=torch.int32, device=q.device),
            rows.ptr,
            rows.idx,
            rows.n_full,
            rows.q_len,
            rows.k_len,
            *(rows.ptr if words is None else words for words in (rows.lo, rows.hi, pos)),
            rows.guards,
            lse if key_bias is None else key_bias,
            scale * 1.4426950408889634,
            total,
            rows.q_blocks * parts,
            rows.text * parts,
            h,
            rows.q_blocks if rows.heads > 1 else 0,
            lq,
            lk,
            *((0, 0) if key_bias is None else (key_bias.stride(axis) * (key_bias.shape[axis] > 1) for axis in (0, 1))),
            rows.k_blocks if rows.k_len.ndim == 2 and rows.k_len.shape[0] > 1 else 0,
        )
        constants = (d, block, units, *chosen, rows.words, key_bias is not None)
        _launch(programs, values, constants, q.dtype, q.device.index)
    return out, lse


# Compiled programs by what they were compiled for. Triton's own look-up asks the value of every argument, which takes
# longer than the launch; this program is compiled for none of them.
_programs: dict[tuple[Any, ...], Any] = {}


def _launch(
    programs: int, values: tuple[Any, ...], constants: tuple[Any, ...], dtype: torch.dtype, device: int
) -> None:
    """Launch the program, compiling it where it is new."""
    key = (constants, dtype, device)
    compiled = _programs.get(key)
    if compiled is None:
        _programs[key] = _kernel()[(programs,)](*values, *constants, num_warps=4)
    else:
        compiled[(programs, 1, 1)](*values, *constants)


def _tensor_map(x: torch.Tensor, slots: int) -> Any:
    """What TMA needs to know to fetch (slots, d) of one head of x (b, l, h, d)."""
    x, shape, strides, tile = tensor_map(x, slots)
    return _described(x, shape, strides, tile)


def _blocks_map(x: torch.Tensor, block: int) -> Any:
    """The same for blocks of keys, as (b, h, 1, l, d)."""
    x, (b, h, n, d), (sample, head, slot, _), tile = tensor_map(x, block)
    return _described(x, [b, h, 1, n, d], [sample, head, slot * n, slot, 1], [1, *tile])


def _ends_map(x: torch.Tensor, block: int) -> Any:
    """The same for blocks of values that may end early, as (b, h, l + 1, block, d): zeros are fetched behind the end.

    [.., end, i, :] is slot end - block + i, so that a block of n tokens that ends at `end` begins at i = block - n, and
    what would follow it lies outside. Slots before the first one are never asked for.
    """
    x, (b, h, n, d), (sample, head, slot, _), tile = tensor_map(x, block)
    before = _Before(x, block * slot * x.element_size())
    return _described(before, [b, h, n + 1, block, d], [sample, head, slot, slot, 1], [1, *tile])


class _Before(NamedTuple):
    """What a tensor map asks of its tensor, some bytes before it."""

    x: torch.Tensor
    bytes: int

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    def data_ptr(self) -> int:
        return self.x.data_ptr() - self.bytes


def _described(x: torch.Tensor | _Before, shape: list[int], strides: list[int], tile: list[int]) -> Any:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(x, shape, strides, tile, _layout(tuple(tile), x.dtype))


@lru_cache(maxsize=16)
def _layout(tile: tuple[int, ...], dtype: torch.dtype) -> Any:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for(list(tile), gl.float16 if dtype == torch.float16 else gl.bfloat16)


@lru_cache(maxsize=8)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=1)
def _kernel() -> Any:
    from .gluon_kernel import block_sparse

    return block_sparse
