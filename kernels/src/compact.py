"""Choosing blocks on a GPU: block means, and the best blocks of rows as ascending lists, without sorting or waiting.

Idea: a row's `kept`-th highest score is found bit by bit from the top, in registers, since counting what is at least a
    candidate needs no order. What stands above it is then numbered by a running count, which leaves it ascending.
Math: floats become integers of the same order (sign bit flipped, negatives complemented). t = 0; for each bit from the
    highest: t |= bit if at least `kept` ranks are >= t | bit. For one limit on all rows the digits of 8 bits are
    counted over all of them, four times. Equal scores: the first blocks of a row, and the first rows, come first.
Cost: scores are read once (one limit for each row) or six times (one for all); 4 bytes are written a kept block.
Source: radix selection, as in Alabi et al., "Fast k-selection algorithms for graphics processing units", 2012.
Limits: fp32 scores, up to 4,096 video blocks; NaN ranks above everything, as torch has it.
Each function is an op with a fake, so that compiled models see one opaque call.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ..blocks import BlockMask
from ..grid import TokenLayout
from . import fused

MOST_BLOCKS = 4096
# Blocks of all heads that are ranked together. With 23.5 million (24 heads of 990 x 990) an H200 gave a mask that
# failed its check, with 15.9 million none did; why is not known.
MOST_RANKED = 2**24


def can_run(x: torch.Tensor, blocks: int) -> bool:
    """These kernels serve a tensor and as many video blocks; elsewhere `select` does the same with torch."""
    return fused.can_run(x) and blocks <= MOST_BLOCKS


def best_blocks(scores: torch.Tensor, forced: torch.Tensor, kept: int, layout: TokenLayout) -> BlockMask:
    """See `select.best_blocks`."""
    heads, video, _ = scores.shape
    kept = min(kept, video)
    ptr, n_full = bounds(torch.full((heads, video), kept, device=scores.device), layout)
    length = _length(heads, kept, layout)
    idx = keep_best(scores.float().contiguous(), forced, ptr, None, None, length)
    return BlockMask(ptr, idx, n_full, layout)


def likeliest_blocks(likely: torch.Tensor, forced: torch.Tensor, kept: int, layout: TokenLayout) -> BlockMask:
    """See `select.likeliest_blocks`; here with probabilities (h, video blocks, video blocks)."""
    heads, video, _ = likely.shape
    kept = min(kept, video)
    likely = likely.float().contiguous()
    cut, found = common_cut(likely, forced, kept * video * heads)
    above, at = found.unbind(-1)
    # What is kept of those at the cut goes to the first rows that have some.
    before = at.flatten().cumsum(0).view_as(at) - at
    ties = torch.minimum((cut[1] - before).clamp(min=0), at).int()
    ptr, n_full = bounds((above + ties).long(), layout)
    idx = keep_best(likely, forced, ptr, cut, ties, _length(heads, kept, layout))
    return BlockMask(ptr, idx, n_full, layout)


def bounds(count: torch.Tensor, layout: TokenLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """`ptr` and `n_full` of rows that keep `count` (h, video blocks) int64 video blocks, and text as it always is.

    Text sees all and is seen by all.
    """
    text = layout.blocks - count.shape[1]
    length = torch.cat([count + text, count.new_full((count.shape[0], text), layout.blocks)], 1).flatten()
    return torch.nn.functional.pad(length.cumsum(0), (1, 0)).int(), length.int()


@torch.library.custom_op("vidaccel::block_means", mutates_args=())
def block_means(x: torch.Tensor, q_len: torch.Tensor, block: int) -> torch.Tensor:
    """Means over the first tokens of each block.

    Args:
        x: (1, slots, h, d) of any strides, d contiguous.
        q_len: (blocks,) int32, tokens of each block.
        block: slots in a block.

    Returns:
        (h, blocks, d) fp32.
    """
    _, _, h, d = x.shape
    blocks = q_len.shape[0]
    out = x.new_empty((h, blocks, d), dtype=torch.float32)
    x = x if x.stride(-1) == 1 else x.contiguous()
    with torch.cuda.device_of(x):
        _kernels().mean_of_block[blocks, h](
            x,
            q_len,
            out,
            x.stride(1),
            x.stride(2),
            blocks,
            D=d,
            BLOCK=block,
            TOKENS=16,
            PAD=fused.power_of_two(d),
            num_warps=4 if d > 64 else 2,
        )
    return out


@block_means.register_fake
def _(x: torch.Tensor, q_len: torch.Tensor, block: int) -> torch.Tensor:
    return x.new_empty((x.shape[2], q_len.shape[0], x.shape[3]), dtype=torch.float32)


@torch.library.custom_op("vidaccel::keep_best", mutates_args=())
def keep_best(
    scores: torch.Tensor,
    forced: torch.Tensor | None,
    ptr: torch.Tensor,
    cut: torch.Tensor | None,
    ties: torch.Tensor | None,
    length: int,
) -> torch.Tensor:
    """The block numbers of a mask whose rows are as long as `ptr` says.

    Args:
        scores: (h, rows, n) fp32, contiguous.
        forced: (rows, n) bool, kept whatever their score; None for none.
        ptr: (h * blocks + 1,) int32, where rows start. Blocks beyond `rows` are text, kept by all, and keep all.
        cut: (2,) int32 of `common_cut`; None where each row keeps its own best.
        ties: (h, rows) int32, how many of each row are kept of those at the cut.
        length: of the result, at least the last of `ptr`.

    Returns:
        (length,) int32.
    """
    heads, rows, n = scores.shape
    idx = ptr.new_empty(length)
    with torch.cuda.device_of(scores):
        _kernels().keep_best[(ptr.shape[0] - 1) // heads, heads](
            scores,
            None if forced is None else forced.view(torch.uint8),
            ptr,
            ptr if cut is None else cut,
            ptr if ties is None else ties,
            idx,
            rows,
            n,
            SEARCH=cut is None,
            **_row(n),
        )
    return idx


@keep_best.register_fake
def _(
    scores: torch.Tensor,
    forced: torch.Tensor | None,
    ptr: torch.Tensor,
    cut: torch.Tensor | None,
    ties: torch.Tensor | None,
    length: int,
) -> torch.Tensor:
    return ptr.new_empty(length)


@torch.library.custom_op("vidaccel::common_cut", mutates_args=())
def common_cut(scores: torch.Tensor, forced: torch.Tensor, wanted: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where to cut all rows so that `wanted` blocks are kept in all.

    Args:
        scores: (h, n, n) fp32, contiguous.
        forced: (n, n) bool, ranked above all scores.
        wanted: how many blocks are kept, 1 to h * n * n.

    Returns:
        cut (2,) int32: the bits of the rank of the last one kept, and how many of that rank are kept.
        found (h, n, 2) int32: how many blocks of each row rank above it, and at it.
    """
    heads, n, _ = scores.shape
    flags = forced.view(torch.uint8)
    counts = scores.new_zeros(4 * 256, dtype=torch.int32)
    cut, found = counts.new_empty(2), counts.new_empty(heads, n, 2)
    with torch.cuda.device_of(scores):
        for known in range(4):
            _kernels().count_digits[n, heads](scores, flags, counts, wanted, known, n, **_row(n))
        _kernels().count_rows[n, heads](scores, flags, counts, cut, found, wanted, n, **_row(n))
    return cut, found


@common_cut.register_fake
def _(scores: torch.Tensor, forced: torch.Tensor, wanted: int) -> tuple[torch.Tensor, torch.Tensor]:
    heads, n, _ = scores.shape
    return (
        scores.new_empty(2, dtype=torch.int32),
        scores.new_empty(heads, n, 2, dtype=torch.int32),
    )


def _length(heads: int, kept: int, layout: TokenLayout) -> int:
    """How many blocks a mask has whose video rows keep `kept` on average."""
    video, text = layout.video_blocks, layout.blocks - layout.video_blocks
    return heads * (video * (kept + text) + text * layout.blocks)


def _row(n: int) -> dict[str, int]:
    """One program holds a row: 32 ranks a thread."""
    pad = max(256, fused.power_of_two(n))
    return {"PAD": pad, "num_warps": max(1, pad // 1024)}


@lru_cache(maxsize=1)
def _kernels() -> Any:
    from . import compact_kernel

    return compact_kernel
