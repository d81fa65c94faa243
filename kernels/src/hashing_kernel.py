"""The Triton programs of `hashing.py`, in a file of their own because importing them needs Triton."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def sign_codes(
    X,
    MEAN,
    PLANES,
    CODES,
    x_l,
    x_h,
    tokens,
    BITS: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    PAD: tl.constexpr,
):
    """Codes of some tokens of one head. Program (group of tokens, head)."""
    h = tl.program_id(1).to(tl.int64)
    token, channel = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, PAD)
    within = channel < D
    at = X + h * x_h + token[:, None] * x_l + channel[None, :]
    x = tl.load(at, mask=within[None, :] & (token < tokens)[:, None], other=0.0).to(tl.float32)
    x -= tl.load(MEAN + h * D + channel, mask=within, other=0.0)[None, :]
    code = tl.zeros([TOKENS], tl.int32)
    for bit in tl.static_range(BITS):
        plane = tl.load(PLANES + channel * BITS + bit, mask=within, other=0.0)
        code |= (tl.sum(x * plane[None, :], 1) > 0).to(tl.int32) << bit
    # From Gray code to its place: each bit is the parity of all that are not lower.
    code ^= code >> 1
    code ^= code >> 2
    code ^= code >> 4
    tl.store(CODES + h * tokens + token, code.to(tl.int64), mask=token < tokens)


@triton.jit(do_not_specialize=["tokens", "kinds"])
def count(CODES, SEEN, tokens, kinds, PAD: tl.constexpr, GROUP: tl.constexpr):
    """How often a group of tokens has each code: SEEN (h, kinds, groups). Program (group, head)."""
    group, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    token, kind = group * GROUP + tl.arange(0, GROUP), tl.arange(0, PAD)
    code = tl.load(CODES + h * tokens + token, mask=token < tokens, other=0).to(tl.int32)
    seen = tl.histogram(code, PAD, mask=token < tokens)
    tl.store(SEEN + (h * kinds + kind) * tl.num_programs(0) + group, seen, mask=kind < kinds)


@triton.jit(do_not_specialize=["tokens", "kinds"])
def place(CODES, BEFORE, ORDER, tokens, kinds, GROUP: tl.constexpr):
    """Write each token of a group to its place; BEFORE says where each code goes on. Program (group, head)."""
    group, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    within = tl.arange(0, GROUP)
    token = group * GROUP + within
    codes = CODES + h * tokens + group * GROUP
    code = tl.load(codes + within, mask=token < tokens, other=0)
    # Loaded again, for the other axis.
    other = tl.arange(0, GROUP)
    theirs = tl.load(codes + other, mask=group * GROUP + other < tokens, other=-1)
    earlier = (theirs[None, :] == code[:, None]) & (other[None, :] < within[:, None])
    to = tl.load(BEFORE + (h * kinds + code) * tl.num_programs(0) + group, mask=token < tokens, other=0)
    to += tl.sum(earlier.to(tl.int32), 1)
    tl.store(ORDER + h * tokens + to, token, mask=token < tokens)


@triton.jit(do_not_specialize=["n"])
def moved(
    X,
    ORDER,
    OUT,
    x_l,
    x_h,
    order_l,
    order_h,
    n,
    BACK: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    PAD: tl.constexpr,
):
    """Each place of a head gets the token that ORDER names, or gives that one its own. Program (group, head)."""
    h = tl.program_id(1).to(tl.int64)
    place, channel = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, PAD)
    token = tl.load(ORDER + place * order_l + h * order_h, mask=place < n, other=0)
    within = (place < n)[:, None] & (channel < D)[None, :]
    source = place if BACK else token
    target = token if BACK else place
    x = tl.load(X + h * x_h + source[:, None] * x_l + channel[None, :], mask=within)
    tl.store(OUT + (target[:, None] * tl.num_programs(1) + h) * D + channel[None, :], x, mask=within)
