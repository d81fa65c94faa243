"""Keys or values with the means of 2, 4 and 8 neighbours behind them, in one pass over memory.

Idea: a tile is read once; sums of pairs are added up to sums of four and of eight before they are divided.
Cost: x is read once, and 1.875 times as much is written.
Limits: d of any size; what `fused.can_run` allows on CUDA. Elsewhere torch does the same level by level.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from . import fused

LEVELS = (2, 4, 8)


def with_means(x: torch.Tensor, length: torch.Tensor, block: int, video: int) -> torch.Tensor:
    """What was given, its means and an empty block.

    Args:
        x: (1, slots, h, d) of any strides; what stands in holes counts for nothing.
        length: (blocks,) int32, tokens of each block.
        block: slots in a block, a multiple of 16.
        video: blocks that have means. So many more as fill groups of 8 have means of 0.

    Returns:
        (1, slots, h, d) of `block` slots for each block, zeros in its holes; then for level 2, 4 and 8 block / level
        means for each of those video blocks, in fp32 added up and divided by the tokens of each; then an empty block.
    """
    if fused.can_run(x):
        made: torch.Tensor = means_behind(x, length, block, video)
        return made
    slots, start, tiles = x.shape[1], length.shape[0] * block, 8 * -(-video // 8)
    out = _empty(x, length, block, video)
    filled = torch.arange(block, device=x.device) < length[:, None]
    out[0, :slots] = x[0]
    out[0, :start].masked_fill_(~filled.flatten()[:, None, None], 0)
    sums, count = out[0, : video * block], filled[:video].float()
    for level in LEVELS:
        sums = sums.unflatten(0, (-1, 2)).sum(1, dtype=torch.float32)
        count = count.unflatten(1, (-1, 2)).sum(2)
        out[0, start : start + len(sums)] = sums / count.flatten().clamp(min=1)[:, None, None]
        out[0, start + len(sums) : start + tiles * block // level] = 0
        start += tiles * block // level
    out[0, start:] = 0
    return out


@torch.library.custom_op("vidaccel::means_behind", mutates_args=())
def means_behind(x: torch.Tensor, length: torch.Tensor, block: int, video: int) -> torch.Tensor:
    """See `with_means`."""
    h, d = x.shape[2:]
    blocks, tiles = length.shape[0], 8 * -(-video // 8)
    out = _empty(x, length, block, video)
    x = x if x.stride(-1) == 1 else x.contiguous()
    with torch.cuda.device_of(x):
        _kernels().with_means[max(blocks, tiles) + 1, h](
            x,
            length,
            out,
            x.stride(1),
            x.stride(2),
            out.stride(1),
            blocks,
            video,
            tiles,
            D=d,
            BLOCK=block,
            TOKENS=16,
            PAD=1 << (d - 1).bit_length(),
            num_warps=4 if d > 64 else 2,
        )
    return out


@means_behind.register_fake
def _(x: torch.Tensor, length: torch.Tensor, block: int, video: int) -> torch.Tensor:
    return _empty(x, length, block, video)


def _empty(x: torch.Tensor, length: torch.Tensor, block: int, video: int) -> torch.Tensor:
    means = sum(8 * -(-video // 8) * block // level for level in LEVELS)
    return x.new_empty(1, length.shape[0] * block + means + block, *x.shape[2:])


@lru_cache(maxsize=1)
def _kernels() -> Any:
    from . import pool_kernel

    return pool_kernel
