"""Block-sparse flash attention in plain Triton, on pointers: the GPU kernel that needs nothing special.

Idea: one program for each (query block, head, sample). It walks the row's key blocks with the online softmax: full
blocks first, where only the length of the block matters, then partial ones, whose window is decided token by token.
Math, for each tile of keys, in base 2 (s carries log2(e)):
    m' = max(m, rowmax(s));  p = exp2(s - m');  l = l exp2(m - m') + rowsum(p);  o = o exp2(m - m') + p v
    out = o / l;  lse = (m + log2(l)) ln 2
Cost: 4 d flops a visited pair; q is read once, k and v once for each kept block.
Source: FlashAttention-2 (2023), with block lists as in FlexAttention.
Limits: fp16, bf16, fp32; head dim 16, 32, 64, 128; sm_80 and up, and AMD. fp32 products are exact (no TF32) and
therefore slow: for tests.
Reads strided tensors as they are: no transpose copy. Offsets of tokens are 64-bit.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from . import tune
from .problem import Problem, Rows, Verdict

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = (16, 32, 64, 128)
# Slots of a query block where the call has no mask, and therefore no block size of its own.
DENSE_BLOCK = 128


class Config(NamedTuple):
    """Launch parameters.

    Attributes:
        keys: tokens in one tile of keys; divides the block.
        warps: of 32 threads.
        stages: tiles in flight.
    """

    keys: int
    warps: int
    stages: int


# (head dim up to, block) -> config for 16-bit tensors, as measured on the compute capability below; see `tune.py`.
CONFIGS = {
    (64, 16): Config(16, 1, 3),
    (64, 32): Config(32, 2, 3),
    (64, 64): Config(64, 4, 3),
    (64, 128): Config(64, 4, 3),
    (128, 16): Config(16, 1, 3),
    (128, 32): Config(32, 2, 3),
    (128, 64): Config(64, 4, 2),
    (128, 128): Config(64, 8, 2),
}
MEASURED = (9, 0)


def config(d: int, block: int, dtype: torch.dtype, window: bool, device: torch.device | None = None) -> Config:
    """The launch parameters of a problem: those of the table, on GPUs that it was not measured on tuned ones."""
    chosen = CONFIGS[64 if d <= 64 else 128, block]
    if dtype == torch.float32:
        return Config(min(chosen.keys, 32), 8 if block == 128 else 4, 1)
    if window and block == 128:
        # Deciding pairs takes registers: with 4 warps, rows of 128 would spill.
        chosen = chosen._replace(warps=8)
    if device is None or device.type != "cuda" or measured_on(device):
        return chosen
    keys, warps = min(block, 64), max(1, block // 16)
    others = (Config(keys, warps, 2), Config(keys, warps, 3), Config(keys, max(1, warps // 2), 2), Config(16, warps, 2))
    candidates = tuple(dict.fromkeys((chosen, *others)))
    return tune.config(candidates, run, tune.Key.of("portable", d, block, dtype, window, device), device)


def measured_on(device: torch.device) -> bool:
    """The table was measured on GPUs like this one."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) == MEASURED


def interpreted() -> bool:
    """Triton runs kernels on the CPU, in Python, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def can_run(problem: Problem) -> Verdict:
    """16 and 32-bit floats, head dims that are powers of two, a GPU that Triton knows."""
    if find_spec("triton") is None:
        return Verdict(False, "triton is not installed; pip install 'vidaccel[triton]'")
    if problem.device.type != "cuda" and not interpreted():
        return Verdict(False, f"it needs a GPU, the tensors are on {problem.device}")
    if problem.dtype not in DTYPES:
        return Verdict(False, f"it computes in float16, bfloat16 and float32, not {problem.dtype}")
    if problem.d not in HEAD_DIMS:
        return Verdict(False, f"it has head dims {', '.join(map(str, HEAD_DIMS))}, not {problem.d}")
    if problem.device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(problem.device)
        if major < 8:
            return Verdict(False, f"it needs compute capability 8.0, this GPU has {major}.{minor}")
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
    if rows is None:
        rows = Rows.dense(lq, lk, DENSE_BLOCK, q.device)
    # Triton wants the last axis dense; the other three may have any stride.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    window = rows.lo is not None
    bias = lse if key_bias is None else key_bias
    bias_strides = (0, 0, 0) if key_bias is None else _broadcast_strides(key_bias)
    chosen = chosen or config(d, rows.block, q.dtype, window, q.device)
    grid = (rows.q_blocks, h, b)
    # Programs are launched on the current device, which need not be the tensors' own.
    with torch.cuda.device_of(q):
        _kernel()[grid](
            q,
            k,
            v,
            out,
            lse,
            rows.ptr,
            rows.idx,
            rows.n_full,
            rows.q_len,
            rows.k_len,
            *(rows.ptr if words is None else words for words in (rows.lo, rows.hi, rows.pos)),
            rows.guards,
            bias,
            scale * 1.4426950408889634,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *out.stride()[:3],
            *bias_strides,
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


def _broadcast_strides(x: torch.Tensor) -> tuple[int, ...]:
    """Strides that read an axis of length 1 again and again."""
    return tuple(0 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True))


@lru_cache(maxsize=1)
def _kernel() -> Any:
    from .portable_kernel import block_sparse

    return block_sparse
