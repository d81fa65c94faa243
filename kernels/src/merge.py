"""Join two attentions of the same queries over disjoint keys, exactly.

Math:
    lse = log(exp(lse_a) + exp(lse_b))
    out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b
Cost: on CUDA one pass: both outs are read, one is written. Elsewhere torch does the same in several, in fp32.
Source: the online softmax; every split of the keys (ranges, text beside video, reused outputs, rings) rests on it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ..errors import BackendError
from . import fused

_ROWS = 16


def merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention over the union of two disjoint sets of keys.

    Each side is an out (b, l, h, d) of any float dtype, and an lse (b, h, l), the natural logarithm of its sum of
    exponents; where that is -inf the side kept nothing, and its out is ignored.

    Raises:
        BackendError: the two sides do not fit each other.

    Returns:
        out (b, l, h, d) in the dtype of `out_a`, and lse (b, h, l) in fp32, or fp64 if given so. Where neither side
        kept anything, 0 and -inf.
    """
    b, length, heads, _ = out_a.shape
    if out_a.shape != out_b.shape or not lse_a.shape == lse_b.shape == (b, heads, length):
        raise BackendError(
            f"outs {tuple(out_a.shape)} and {tuple(out_b.shape)} with lses {tuple(lse_a.shape)} and "
            f"{tuple(lse_b.shape)} were given; merge takes (b, l, h, d) twice and (b, h, l) twice"
        )
    if not out_a.device == out_b.device == lse_a.device == lse_b.device:
        raise BackendError(
            f"outs on {out_a.device} and {out_b.device}, lses on {lse_a.device} and {lse_b.device} were given; move "
            "all to one device"
        )
    if fused.can_run(out_a, out_b) and lse_a.dtype == lse_b.dtype == torch.float32:
        both: tuple[torch.Tensor, torch.Tensor] = fused_merge(out_a, lse_a, out_b, lse_b)
        return both
    high = torch.promote_types(torch.promote_types(out_a.dtype, lse_a.dtype), torch.float32)
    top = torch.maximum(lse_a, lse_b)
    top = torch.where(top == -torch.inf, 0, top)
    weight_a, weight_b = (lse_a - top).exp(), (lse_b - top).exp()
    total = weight_a + weight_b
    share = 1 / torch.where(total == 0, 1, total)

    def part(out: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        weight = weight.transpose(1, 2).contiguous()[..., None]
        return torch.where(weight == 0, 0, weight * out.to(high))

    out = (part(out_a, weight_a) + part(out_b, weight_b)) * share.transpose(1, 2)[..., None]
    return out.to(out_a.dtype), total.log() + top


@torch.library.custom_op("vidaccel::merge", mutates_args=())
def fused_merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`merge` in one kernel; any strides, fp32 lse."""
    batch, length, heads, d = out_a.shape
    out = torch.empty((batch, length, heads, d), dtype=out_a.dtype, device=out_a.device)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=out_a.device)
    if out.numel():
        out_a, out_b = (x if x.stride(-1) == 1 else x.contiguous() for x in (out_a, out_b))
        with torch.cuda.device_of(out):
            _kernels().merge[(-(-length // _ROWS), heads, batch)](
                out_a, lse_a, out_b, lse_b, out, lse, length, heads, d,
                *out_a.stride()[:3], *out_b.stride()[:3], *lse_a.stride(), *lse_b.stride(),
                ROWS=_ROWS, D=1 << (d - 1).bit_length(), num_warps=4,
            )  # fmt: skip
    return out, lse


@fused_merge.register_fake
def _(out_a: torch.Tensor, lse_a: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device), torch.empty_like(lse_a).contiguous()


@lru_cache(maxsize=1)
def _kernels() -> Any:
    from . import merge_kernel

    return merge_kernel
