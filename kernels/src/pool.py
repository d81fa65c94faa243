"""Keys or values with the means of 2, 4 and 8 neighbours behind them, in one pass over memory.

Idea: a tile is read once; sums of pairs are added up to sums of four and of eight before they are divided.
Cost: x is read once, and 1.875 times as much is written.
Limits: d of any size; what `fused.can_run` allows. `select.with_means` defines it, and serves the rest.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch

LEVELS = (2, 4, 8)


@torch.library.custom_op("vidaccel::means_behind", mutates_args=())
def means_behind(x: torch.Tensor, length: torch.Tensor, block: int, video: int) -> torch.Tensor:
    """See `select.with_means`.

    Args:
        x: (1, slots, h, d) of any strides.
        length: (blocks,) int32, tokens of each block.
        block: slots in a block, a multiple of 16.
        video: blocks that have means.
    """
    h, d = x.shape[2:]
    blocks, tiles = length.shape[0], 8 * -(-video // 8)
    out = empty(x, length, block, video)
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
            # Groups of 8 tokens that are read together: what divides all of a block's.
            GROUPS=math.gcd(block // 8, 8),
            PAD=1 << (d - 1).bit_length(),
            num_warps=4 if d > 64 else 2,
        )
    return out


@means_behind.register_fake
def _(x: torch.Tensor, length: torch.Tensor, block: int, video: int) -> torch.Tensor:
    return empty(x, length, block, video)


def empty(x: torch.Tensor, length: torch.Tensor, block: int, video: int) -> torch.Tensor:
    """Memory for the result."""
    means = sum(8 * -(-video // 8) * block // level for level in LEVELS)
    return x.new_empty(1, length.shape[0] * block + means + block, *x.shape[2:])


@lru_cache(maxsize=1)
def _kernels() -> Any:
    from . import pool_kernel

    return pool_kernel
