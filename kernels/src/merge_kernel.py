"""The Triton program of `merge.py`, in a file of its own because importing it needs Triton."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _part(OUT, weight, at, within):
    # What a side that kept nothing holds may be no number.
    return tl.where(
        weight[:, None] == 0, 0.0, weight[:, None] * tl.load(OUT + at, mask=within, other=0.0).to(tl.float32)
    )


@triton.jit
def merge(
    A, LSE_A, B, LSE_B, OUT, LSE, length, heads, d,
    a_b, a_l, a_h, b_b, b_l, b_h, lse_a_b, lse_a_h, lse_a_l, lse_b_b, lse_b_h, lse_b_l,
    ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Some queries of one head and sample. Program (tile of queries, head, sample)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head, sample = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    is_row, channel = row < length, tl.arange(0, D)
    within = is_row[:, None] & (channel < d)[None, :]
    lse_a = tl.load(LSE_A + sample * lse_a_b + head * lse_a_h + row * lse_a_l, mask=is_row, other=-float("inf"))
    lse_b = tl.load(LSE_B + sample * lse_b_b + head * lse_b_h + row * lse_b_l, mask=is_row, other=-float("inf"))
    top = tl.maximum(lse_a, lse_b)
    top = tl.where(top == -float("inf"), 0.0, top)
    weight_a, weight_b = tl.exp(lse_a - top), tl.exp(lse_b - top)
    total = weight_a + weight_b
    share = 1 / tl.where(total == 0, 1.0, total)
    out = _part(A, weight_a, sample * a_b + row[:, None] * a_l + head * a_h + channel, within)
    out += _part(B, weight_b, sample * b_b + row[:, None] * b_l + head * b_h + channel, within)
    at = ((sample * length + row[:, None]) * heads + head) * d + channel
    tl.store(OUT + at, (out * share[:, None]).to(OUT.dtype.element_ty), mask=within)
    lse = tl.where(total == 0, -float("inf"), tl.log(tl.where(total == 0, 1.0, total)) + top)
    tl.store(LSE + (sample * heads + head) * length + row, lse, mask=is_row)
