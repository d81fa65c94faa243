"""What the tensor memory accelerator (TMA) of a GPU must know to fetch tiles of (b, l, h, d) tensors of any strides."""

from __future__ import annotations

import torch


def tensor_map(x: torch.Tensor, slots: int) -> tuple[torch.Tensor, list[int], list[int], list[int]]:
    """Describe tiles of (slots, d) of one head of x (b, l, h, d), for Triton's tensor descriptors.

    A tensor that TMA cannot read is copied.

    Returns:
        The tensor as (b, h, l, d), its shape, its strides in elements, and the shape of a tile.
    """
    if not readable(x):
        x = x.contiguous()
    x = x.transpose(1, 2)
    # The stride of an axis of length 1 is never used, and may be anything; 16 bytes divide this one.
    strides = [stride if n > 1 else x.shape[-1] for n, stride in zip(x.shape, x.stride(), strict=True)]
    return x, list(x.shape), [*strides[:3], 1], [1, 1, slots, x.shape[-1]]


def readable(x: torch.Tensor) -> bool:
    """The last axis is dense, everything else a multiple of 16 bytes, and nothing repeats."""
    far = [stride for n, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if n > 1]
    dense = x.stride(-1) == 1 and x.data_ptr() % 16 == 0
    return dense and all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in far)
