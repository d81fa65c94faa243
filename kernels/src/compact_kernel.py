"""The Triton programs of `compact.py`, in a file of their own because importing them needs Triton."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mean_of_block(
    X, LENGTH, OUT, x_l, x_h, blocks, D: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, PAD: tl.constexpr
):
    """The mean of one block of one head. Program (block, head)."""
    block, h = tl.program_id(0), tl.program_id(1)
    token, channel = tl.arange(0, TOKENS), tl.arange(0, PAD)
    length = tl.load(LENGTH + block)
    base = X + block.to(tl.int64) * BLOCK * x_l + h.to(tl.int64) * x_h
    total = tl.zeros([TOKENS, PAD], tl.float32)
    for start in tl.static_range(0, BLOCK, TOKENS):
        within = (start + token < length)[:, None] & (channel < D)[None, :]
        at = (start + token).to(tl.int64)[:, None] * x_l + channel[None, :]
        total += tl.load(base + at, mask=within, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / length.to(tl.float32)
    tl.store(OUT + (h * blocks + block).to(tl.int64) * D + channel, mean, mask=channel < D)


@triton.jit
def _ranks(SCORES, FORCED, row, query, column, n):
    """uint32 that rise with the scores of one row: -0 as 0, NaN above all, forced ones as +inf, 0 past the end."""
    score = tl.load(SCORES + row * n + column, mask=column < n, other=0.0)
    score = tl.where(score == 0.0, 0.0, score)
    if FORCED is not None:
        forced = tl.load(FORCED + query * n + column, mask=column < n, other=0)
        score = tl.where(forced != 0, float("inf"), score)
    bits = score.to(tl.int32, bitcast=True)
    rank = tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)
    rank = tl.where(score != score, 0xFFFFFFFF, rank)
    return tl.where(column < n, rank, 0).to(tl.uint32)


@triton.jit
def keep_best(SCORES, FORCED, PTR, CUT, TIES, IDX, rows, n, SEARCH: tl.constexpr, PAD: tl.constexpr):
    """The kept key blocks of one row, ascending. Program (query block, head); text rows keep everything.

    What ranks above a limit is kept, and of what ranks equal to it the first few. With SEARCH these are the rank of the
    last one for which PTR leaves room, found bit by bit, and what is missing then; without, CUT[0] and the row's TIES.
    """
    i, h = tl.program_id(0), tl.program_id(1)
    blocks = tl.num_programs(0)
    text = blocks - rows
    column = tl.arange(0, PAD)
    start = tl.load(PTR + h * blocks + i)
    if i >= rows:
        for first in tl.range(0, n + text, PAD):
            tl.store(IDX + start + first + column, first + column, mask=first + column < n + text)
    else:
        row = h.to(tl.int64) * rows + i
        rank = _ranks(SCORES, FORCED, row, i, column, n)
        if SEARCH:
            kept = tl.load(PTR + h * blocks + i + 1) - start - text
            limit = tl.full([], 0, tl.uint32)
            bit = tl.full([], 0x80000000, tl.uint32)
            for _ in tl.range(0, 32):
                higher = limit | bit
                limit = tl.where(tl.sum((rank >= higher).to(tl.int32), 0) >= kept, higher, limit)
                bit = bit >> 1
            ties = kept - tl.sum((rank > limit).to(tl.int32), 0)
        else:
            limit = tl.load(CUT).to(tl.uint32, bitcast=True)
            ties = tl.load(TIES + row)
        tie = (rank == limit) & (column < n)
        chosen = (rank > limit) | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= ties))
        place = tl.cumsum(chosen.to(tl.int32), 0)
        tl.store(IDX + start + place - 1, column, mask=chosen)
        # Text blocks stand behind the video blocks of each row.
        end = start + tl.sum(chosen.to(tl.int32), 0)
        for first in tl.range(0, text, PAD):
            tl.store(IDX + end + first + column, n + first + column, mask=first + column < text)


@triton.jit
def _cut(COUNTS, wanted, digits):
    """The leading digits of the `wanted`-th highest rank, and how many of the ranks that share them are wanted."""
    value = tl.arange(0, 256)
    prefix = tl.full([], 0, tl.uint32)
    for step in tl.range(0, digits):
        count = tl.load(COUNTS + step * 256 + value)
        at_least = tl.cumsum(count, 0, reverse=True)
        chosen = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1
        wanted -= tl.sum(tl.where(value > chosen, count, 0), 0)
        prefix = (prefix << 8) | chosen.to(tl.uint32)
    return prefix, wanted


@triton.jit(do_not_specialize=["wanted", "known"])
def count_digits(SCORES, FORCED, COUNTS, wanted, known, n, PAD: tl.constexpr):
    """Count the next digit of ranks whose `known` first digits are the wanted one's. Program (query block, head)."""
    i, h = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, PAD)
    rank = _ranks(SCORES, FORCED, h.to(tl.int64) * n + i, i, column, n)
    prefix, _ = _cut(COUNTS, wanted, known)
    shift = 24 - 8 * known
    # In two steps: a shift by all 32 bits has no meaning.
    same = (column < n) & (rank >> 8 >> shift == prefix)
    digit = ((rank >> shift) & 255).to(tl.int32)
    count = tl.histogram(digit, 256, mask=same)
    tl.atomic_add(COUNTS + known * 256 + tl.arange(0, 256), count, mask=count > 0, sem="relaxed")


@triton.jit(do_not_specialize=["wanted"])
def count_rows(SCORES, FORCED, COUNTS, CUT, FOUND, wanted, n, PAD: tl.constexpr):
    """Where all rows are cut, and what each of them has. Program (query block, head).

    CUT: the rank of the `wanted`-th best of all, and how many of that rank are wanted. FOUND: how many of the row rank
    above it, and how many at it.
    """
    i, h = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, PAD)
    row = h.to(tl.int64) * n + i
    rank = _ranks(SCORES, FORCED, row, i, column, n)
    limit, ties = _cut(COUNTS, wanted, 4)
    if (i == 0) & (h == 0):
        tl.store(CUT, limit.to(tl.int32, bitcast=True))
        tl.store(CUT + 1, ties)
    tl.store(FOUND + 2 * row, tl.sum((rank > limit).to(tl.int32), 0))
    tl.store(FOUND + 2 * row + 1, tl.sum(((rank == limit) & (column < n)).to(tl.int32), 0))
