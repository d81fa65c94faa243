"""Rotary position embedding (RoFormer, arXiv 2104.09864), as all families here have it: on interleaved pairs."""

from __future__ import annotations

import torch


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(x0 + i x1) (cos + i sin) for each pair of neighbouring channels.

    Args:
        x: (b, l, h, d), or (b, l, h * d) before heads are split.
        cos: every value twice, in a shape that broadcasts with `x`, such as (l, 1, d).
        sin: likewise.
    """
    swapped = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return (x * cos + swapped * sin).type_as(x)
