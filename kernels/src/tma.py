"""Block-sparse flash attention in plain Triton, fetched by TMA: for Hopper and later, by name (`auto` takes others).

Idea: the program of `portable.py`, but whole tiles are fetched by the tensor memory accelerator: one instruction of
    one thread and no addresses in registers, so that tiles of 128 x 128 fit. It cannot skip holes inside a tensor:
    scores of holes are dropped, and values of holes are zeroed in a copy beforehand. Beyond the end it reads zeros.
Math: that of `portable.py`.
Cost: 4 d flops a visited pair; one copy of v where a mask is given (its layout may have holes anywhere).
Source: FlashAttention-2 (2023), with block lists as in FlexAttention.
Limits: fp16, bf16; head dim 64, 128; blocks of 64, 128; sm_90 and up; Triton 3.6 and up.
Reads strided tensors as they are (see `tensor_map.py`), if their strides are multiples of 16 bytes; else it copies.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from . import tune
from .gluon import triton_version
from .portable import Config, interpreted, measured_on
from .problem import Problem, Rows, Verdict
from .tensor_map import tensor_map

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128)
BLOCKS = (64, 128)
OLDEST = (3, 6)

# (head dim, block) -> config, as measured on compute capability 9.0; see `tune.py`.
CONFIGS = {
    (64, 64): Config(64, 4, 3),
    (64, 128): Config(128, 8, 2),
    (128, 64): Config(64, 4, 2),
    (128, 128): Config(128, 8, 2),
}


def config(d: int, block: int, dtype: torch.dtype, window: bool, device: torch.device | None = None) -> Config:
    """The launch parameters of a problem: those of the table, on GPUs that it was not measured on tuned ones."""
    # Deciding pairs takes registers: with tiles of 128 x 128, matrix instructions would wait for one another.
    chosen = CONFIGS[d, block]._replace(keys=64) if window else CONFIGS[d, block]
    if device is None or device.type != "cuda" or measured_on(device):
        return chosen
    warps = block // 16
    # The first one fits the 99 KiB of shared memory that consumer GPUs have.
    candidates = tuple(dict.fromkeys((Config(64, warps, 2), chosen, Config(64, warps, 3), Config(64, 4, 2))))
    return tune.config(candidates, run, tune.Key.of("tma", d, block, dtype, window, device), device)


def can_run(problem: Problem) -> Verdict:
    """16-bit floats, head dims and blocks of 64 and 128, a GPU with TMA."""
    found = triton_version()
    if found is None or found < OLDEST:
        have = "none is installed" if found is None else f"{found[0]}.{found[1]} is installed"
        return Verdict(False, f"it needs Triton 3.6 or later, {have}")
    if not interpreted():
        if problem.device.type != "cuda" or torch.version.hip is not None:
            return Verdict(False, f"it needs an NVIDIA GPU, the tensors are on {problem.device}")
        if (capability := torch.cuda.get_device_capability(problem.device)) < (9, 0):
            return Verdict(False, f"it needs compute capability 9.0, this GPU has {capability[0]}.{capability[1]}")
    if problem.dtype not in DTYPES:
        return Verdict(False, f"it computes in float16 and bfloat16, not {problem.dtype}")
    if problem.d not in HEAD_DIMS:
        return Verdict(False, f"it has head dims {', '.join(map(str, HEAD_DIMS))}, not {problem.d}")
    if problem.block not in (0, *BLOCKS):
        return Verdict(False, f"it has blocks of {', '.join(map(str, BLOCKS))}, not {problem.block}")
    return Verdict(True)


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
        rows = Rows.dense(lq, lk, BLOCKS[-1], q.device)
    else:
        v = _without_holes(v, rows)
    window = rows.lo is not None
    bias: tuple[int, ...] = (0, 0, 0)
    if key_bias is not None:
        # An axis of length 1 is read again and again.
        bias = tuple(stride * (n > 1) for n, stride in zip(key_bias.shape, key_bias.stride(), strict=True))
    chosen = chosen or config(d, rows.block, q.dtype, window, q.device)
    # Programs are launched on the current device, which need not be the tensors' own.
    with torch.cuda.device_of(q):
        _kernel()[(rows.q_blocks, h, b)](
            _described(q, rows.block),
            _described(k, chosen.keys),
            _described(v, chosen.keys),
            _described(out, rows.block),
            lse,
            rows.ptr,
            rows.idx,
            rows.n_full,
            rows.q_len,
            rows.k_len,
            *(rows.ptr if words is None else words for words in (rows.lo, rows.hi, rows.pos)),
            rows.guards,
            lse if key_bias is None else key_bias,
            scale * 1.4426950408889634,
            *bias,
            rows.q_blocks if rows.heads > 1 else 0,
            rows.k_blocks if rows.k_len.ndim == 2 and rows.k_len.shape[0] > 1 else 0,
            lq,
            lk,
            D=d,
            BLOCK=rows.block,
            KEYS=chosen.keys,
            WINDOW=rows.words,
            BIAS=key_bias is not None,
            UPCAST=interpreted(),
            num_warps=chosen.warps,
            num_stages=chosen.stages,
        )
    return out, lse


def _without_holes(v: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Values with zeros in holes: whatever stood there, times 0, must be 0."""
    slots = torch.arange(v.shape[1], device=v.device)
    hole = slots % rows.block >= rows.k_len[..., slots // rows.block]
    return v.masked_fill(hole.reshape(-1, v.shape[1], 1, 1), 0)


def _described(x: torch.Tensor, slots: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(*tensor_map(x, slots))


@lru_cache(maxsize=1)
def _kernel() -> Any:
    from .tma_kernel import block_sparse

    return block_sparse
