"""Tensors that stay where they are while their values change: a captured CUDA graph reads and writes addresses."""

from __future__ import annotations

import torch


def in_place(kept: tuple[torch.Tensor, ...] | None, *new: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Copies of `new`, in the memory of `kept` where shapes and types agree, else in memory of their own."""
    if kept is None or any((a.shape, a.dtype) != (b.shape, b.dtype) for a, b in zip(kept, new, strict=True)):
        return tuple(x.clone() for x in new)
    for place, x in zip(kept, new, strict=True):
        place.copy_(x)
    return kept
