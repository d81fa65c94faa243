"""The Triton program of `pool.py`, in a file of its own because importing it needs Triton."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _token(X, OUT, token, own, channel, length, written, counted, x_l, out_l, D: tl.constexpr):
    """Tokens of one block, zeros from `length` on; `written` of them go behind `own`, `counted` of them are given."""
    within = channel[None, :] < D
    at = X + token.to(tl.int64)[:, None] * x_l + channel[None, :]
    x = tl.load(at, mask=within & (token < length)[:, None], other=0.0)
    to = OUT + (own + token)[:, None] * out_l + channel[None, :]
    tl.store(to, x, mask=within & (token < written)[:, None])
    return tl.where((token < counted)[:, None], x.to(tl.float32), 0.0)


@triton.jit
def _mean(total, OUT, mean, start, channel, counted, written, out_l, LEVEL: tl.constexpr, D: tl.constexpr):
    """Means of LEVEL tokens from their sums, behind `start`. Rounded as torch does, which a plain division is not."""
    many = tl.minimum(tl.maximum(counted - mean * LEVEL, 1), LEVEL).to(tl.float32)
    means = tl.div_rn(total, tl.broadcast_to(many[:, None], total.shape))
    to = OUT + (start + mean)[:, None] * out_l + channel[None, :]
    tl.store(to, means.to(OUT.dtype.element_ty), mask=(channel[None, :] < D) & (mean * LEVEL < written)[:, None])


# A number that is 1 would be no tensor here.
@triton.jit(do_not_specialize=["blocks", "video", "tiles"])
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
    GROUPS: tl.constexpr,
    PAD: tl.constexpr,
):
    """A block of one head with zeros in its holes, and its means where it is a tile. Program (block, head).

    Programs beyond the blocks have no tokens; the last one writes the empty block.
    """
    i, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    group, channel = tl.arange(0, GROUPS), tl.arange(0, PAD)
    length = tl.load(LENGTH + i, mask=i < blocks, other=0)
    is_last = i == tl.num_programs(0) - 1
    # Slots that are written, tokens that are in means, slots whose means are written.
    written = tl.where((i < blocks) | is_last, BLOCK, 0)
    counted = tl.where(i < video, length, 0)
    averaged = tl.where(i < tiles, BLOCK, 0)
    # Where the means of each level begin; the last program's block lies behind them all.
    two = blocks.to(tl.int64) * BLOCK
    four = two + tiles * (BLOCK // 2)
    eight = four + tiles * (BLOCK // 4)
    own = tl.where(is_last, eight + tiles * (BLOCK // 8), i * BLOCK)
    X += h * x_h + i * BLOCK * x_l
    OUT += h * D
    for first in tl.static_range(0, BLOCK // 8, GROUPS):
        all_eight = tl.zeros([GROUPS, PAD], tl.float32)
        for half in tl.static_range(2):
            all_four = tl.zeros([GROUPS, PAD], tl.float32)
            for pair in tl.static_range(2):
                both = tl.zeros([GROUPS, PAD], tl.float32)
                for one in tl.static_range(2):
                    token = (first + group) * 8 + half * 4 + pair * 2 + one
                    both += _token(X, OUT, token, own, channel, length, written, counted, x_l, out_l, D)
                mean = (first + group) * 4 + half * 2 + pair
                _mean(both, OUT, mean, two + i * (BLOCK // 2), channel, counted, averaged, out_l, 2, D)
                all_four += both
            mean = (first + group) * 2 + half
            _mean(all_four, OUT, mean, four + i * (BLOCK // 4), channel, counted, averaged, out_l, 4, D)
            all_eight += all_four
        _mean(all_eight, OUT, first + group, eight + i * (BLOCK // 8), channel, counted, averaged, out_l, 8, D)
