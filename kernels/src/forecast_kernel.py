"""The Triton programs of `forecast.py`, in a file of their own because importing them needs Triton."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sum(A, B, C, D, E, a, b, c, d, e, at, within, TERMS: tl.constexpr):
    total = a * tl.load(A + at, mask=within, other=0.0).to(tl.float32)
    if TERMS > 1:
        total += b * tl.load(B + at, mask=within, other=0.0).to(tl.float32)
    if TERMS > 2:
        total += c * tl.load(C + at, mask=within, other=0.0).to(tl.float32)
    if TERMS > 3:
        total += d * tl.load(D + at, mask=within, other=0.0).to(tl.float32)
    if TERMS > 4:
        total += e * tl.load(E + at, mask=within, other=0.0).to(tl.float32)
    return total


@triton.jit
def weighted_sum(A, B, C, D, E, a, b, c, d, e, OUT, size, TERMS: tl.constexpr, TILE: tl.constexpr):
    """One tile of the weighted sum."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    within = at < size
    total = _sum(A, B, C, D, E, a, b, c, d, e, at, within, TERMS)
    tl.store(OUT + at, total.to(OUT.dtype.element_ty), mask=within)


@triton.jit
def error_sums(
    A, B, C, D, E, a, b, c, d, e, ACTUAL, REFERENCE, OUT, size,
    TERMS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """Sums of |weighted sum - actual| and |reference| over some tiles of one sample. Program (part, sample)."""
    part, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    wrong, whole = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    for tile in tl.range(0, TILES):
        place = (part * TILES + tile) * TILE + tl.arange(0, TILE)
        within, at = place < size, sample * size + place
        actual = tl.load(ACTUAL + at, mask=within, other=0.0).to(tl.float32)
        wrong += tl.abs(_sum(A, B, C, D, E, a, b, c, d, e, at, within, TERMS) - actual)
        reference = actual if SAME else tl.load(REFERENCE + at, mask=within, other=0.0).to(tl.float32)
        whole += tl.abs(reference)
    out = OUT + (sample * tl.num_programs(0) + part) * 2
    tl.store(out, tl.sum(wrong, 0))
    tl.store(out + 1, tl.sum(whole, 0))
