"""The Triton program of `pool.py`, in a file of its own because importing it needs Triton."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mean_of_pairs(sums, OUT, start, i, first, length, out_l, BLOCK, LEVEL, COUNT: tl.constexpr, PAD: tl.constexpr, D):
    """Sums of the next level from those of the one before; its means are written."""
    sums = tl.sum(tl.reshape(sums, [COUNT, 2, PAD]), 1)
    mean, channel = tl.arange(0, COUNT), tl.arange(0, PAD)
    many = tl.minimum(tl.maximum(length - first - mean * LEVEL, 1), LEVEL).to(tl.float32)
    place = start + i.to(tl.int64) * (BLOCK // LEVEL) + first // LEVEL + mean
    at = OUT + place[:, None] * out_l + channel[None, :]
    # Rounded as torch does; a plain division is not.
    mean_of_pairs = tl.div_rn(sums, tl.broadcast_to(many[:, None], [COUNT, PAD]))
    tl.store(at, mean_of_pairs.to(OUT.dtype.element_ty), mask=(channel < D)[None, :])
    return sums


@triton.jit
def with_means(
    X,
    LENGTH,
    OUT,
    x_l,
    x_h,
    out_l,
    blocks,
    video,
    tiles,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    PAD: tl.constexpr,
):
    """A block of one head with zeros in its holes, and its means where it is a tile. Program (block, head).

    Programs beyond the blocks have no tokens; the last one writes the empty block.
    """
    i, h = tl.program_id(0), tl.program_id(1)
    token, channel = tl.arange(0, TOKENS), tl.arange(0, PAD)
    length = tl.load(LENGTH + i, mask=i < blocks, other=0)
    two = blocks.to(tl.int64) * BLOCK
    four = two + tiles * (BLOCK // 2)
    eight = four + tiles * (BLOCK // 4)
    OUT += h * D
    # Where this block lies; the last program's is the empty one behind all means.
    is_last = i == tl.num_programs(0) - 1
    own = tl.where(is_last, eight + tiles * (BLOCK // 8), i.to(tl.int64) * BLOCK)
    for first in tl.static_range(0, BLOCK, TOKENS):
        within = (first + token < length)[:, None] & (channel < D)[None, :]
        at = (i.to(tl.int64) * BLOCK + first + token)[:, None] * x_l + channel[None, :]
        x = tl.load(X + h.to(tl.int64) * x_h + at, mask=within, other=0.0)
        if (i < blocks) | is_last:
            to = OUT + (own + first + token)[:, None] * out_l + channel[None, :]
            tl.store(to, x, mask=(channel < D)[None, :])
        if i < tiles:
            kept = tl.where(i < video, length, 0)
            sums = tl.where(i < video, x.to(tl.float32), 0.0)
            sums = _mean_of_pairs(sums, OUT, two, i, first, kept, out_l, BLOCK, 2, TOKENS // 2, PAD, D)
            sums = _mean_of_pairs(sums, OUT, four, i, first, kept, out_l, BLOCK, 4, TOKENS // 4, PAD, D)
            _mean_of_pairs(sums, OUT, eight, i, first, kept, out_l, BLOCK, 8, TOKENS // 8, PAD, D)
