"""FastVideo's kernels (hao-ai-lab/FastVideo): sliding tile and video sparse attention, in every layer and step.

Both want tokens tile by tile: `tiled` sorts them there and back, which is a part of what they cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from ...errors import BackendError
from ...grid import VideoGrid
from ..rivals import Attend, OverVideo
from .peer import Peer

_STA_TILE, _VSA_TILE = (6, 8, 8), (4, 4, 4)
_STA_SHAPES = ("30x48x80", "36x48x48", "18x48x80")


def sta(pipe: Any, grid: VideoGrid, window: int) -> AbstractContextManager[Any]:
    """Sliding tile attention: windows of so many tiles of 6x8x8 along each axis; three grids only."""
    from fastvideo_kernel import sliding_tile_attention

    shape = "x".join(map(str, grid))
    if shape not in _STA_SHAPES:
        raise BackendError(f"FastVideo's sliding tile attention has no {shape} grid; it has {', '.join(_STA_SHAPES)}")
    tiles = [-(-side // tile) for side, tile in zip(grid, _STA_TILE, strict=True)]
    # Odd, as its windows are, and no larger than the video.
    sides = tuple(min(window, count - 1 + count % 2) for count in tiles)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        windows = [sides] * query.shape[1]
        out: torch.Tensor = sliding_tile_attention(query, key, value, windows, 0, False, shape)
        return out

    return OverVideo(tiled(attend, grid, _STA_TILE), "FastVideo's sliding tile attention", grid.tokens)


def vsa(pipe: Any, grid: VideoGrid, density: float) -> AbstractContextManager[Any]:
    """Video sparse attention without its trained coarse branch: the best of the tiles of 4x4x4, by their means."""
    from fastvideo_kernel import video_sparse_attn

    if any(side % 4 for side in grid):
        raise BackendError(f"the adapter of video sparse attention takes grids of whole 4x4x4 tiles, not {grid}")
    blocks = grid.tokens // 64

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        sizes = torch.full((blocks,), 64, dtype=torch.int32, device=query.device)
        kept = max(1, round(density * blocks))
        gate = torch.zeros((), dtype=query.dtype, device=query.device)
        out: torch.Tensor = video_sparse_attn(query, key, value, sizes, sizes, kept, _VSA_TILE, gate)
        return out

    return OverVideo(tiled(attend, grid, _VSA_TILE), "FastVideo's video sparse attention", grid.tokens)


def tiled(attend: Callable[..., torch.Tensor], grid: VideoGrid, tile: tuple[int, int, int]) -> Attend:
    """Attention of tokens that stand tile by tile, for tokens in raster order."""
    order = torch.arange(grid.tokens).view(
        *(n for side, size in zip(grid, tile, strict=True) for n in (side // size, size))
    )
    order = order.permute(0, 2, 4, 1, 3, 5).flatten()
    back = order.argsort()

    def sorted_(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
        if query.shape[2] != grid.tokens:
            raise BackendError("FastVideo's adapters take video tokens alone, and this model attends to text with them")
        if scale is not None and not math.isclose(scale, query.shape[-1] ** -0.5):
            raise BackendError(f"FastVideo's kernels scale by 1 / sqrt(d), and this model by {scale}")
        there = order.to(query.device)
        out = attend(*(x[:, :, there].contiguous() for x in (query, key, value)))
        return out[:, :, back.to(query.device)]

    return sorted_


STA = Peer("fastvideo-sta", "attention", "fastvideo_kernel", sta, {"window": 3})
VSA = Peer("fastvideo-vsa", "attention", "fastvideo_kernel", vsa, {"density": 0.25})
