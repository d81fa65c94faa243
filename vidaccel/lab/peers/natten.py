"""NATTEN (SHI-Labs/NATTEN): neighborhood attention by its own kernels, in every layer and step."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from ...errors import BackendError
from ...grid import VideoGrid
from ..rivals import OverVideo
from .peer import Peer


def natten(pipe: Any, grid: VideoGrid, density: float) -> AbstractContextManager[Any]:
    """A window of the same share of every axis, which keeps about `density` of all pairs."""
    from natten.functional import na3d

    window = tuple(min(side, max(2, round(side * density ** (1 / 3)))) for side in grid)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
        if query.shape[2] != grid.tokens:
            raise BackendError("the NATTEN adapter takes video tokens alone, and this model attends to text with them")
        inputs = (x.transpose(1, 2).unflatten(1, tuple(grid)).contiguous() for x in (query, key, value))
        out: torch.Tensor = na3d(*inputs, kernel_size=window, scale=scale)
        return out.flatten(1, 3).transpose(1, 2)

    return OverVideo(attend, "NATTEN", grid.tokens)


NATTEN = Peer("natten", "attention", "natten", natten, {"density": 0.25})
