"""Join two attentions of the same queries over disjoint keys, exactly.

Math:
    lse = log(exp(lse_a) + exp(lse_b))
    out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b
Source: the online softmax; every split of the keys (ranges, text beside video, reused outputs, rings) rests on it.
"""

from __future__ import annotations

import torch


def merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention over the union of two disjoint sets of keys.

    Each side is an out (b, l, h, d) of any float dtype, and an lse (b, h, l), the natural logarithm of its sum of
    exponents; where that is -inf the side kept nothing, and its out is ignored.

    Returns:
        out (b, l, h, d) in the dtype of `out_a`, and lse (b, h, l) in fp32, or fp64 if given so. Where neither side
        kept anything, 0 and -inf.
    """
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
