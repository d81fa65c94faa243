"""The Triton program of `tma.py`, in a file of its own because importing it needs Triton."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _attend_tile(
    acc,
    m,
    mass,
    q,
    K,
    V,
    bias_base,
    b,
    h,
    start,
    length,
    scale,
    bias_stride,
    lo,
    hi,
    POS,
    guards,
    D: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One step of the online softmax. The first `length` keys of the tile are tokens; values of the others are 0."""
    within = tl.arange(0, KEYS)
    token = within < length
    k = K.load([b, h, start, 0]).reshape(KEYS, D)
    # Triton's interpreter multiplies the bits of 16-bit numbers.
    s = tl.dot(q.to(tl.float32), tl.trans(k).to(tl.float32)) if UPCAST else tl.dot(q, tl.trans(k))
    if BIAS:
        more = tl.load(bias_base + (start + within) * bias_stride, mask=token, other=0.0)
        s = s * scale + 1.4426950408889634 * more[None, :]
    if WINDOW:
        guard = guards & ~((guards >> 1) & 0x7FFFFFFF)
        # No window holds what has no guard bit, so keys that are no tokens are outside all of them.
        pos = tl.load(POS + start + within, mask=token, other=(guard & -guard) - 1)[None, :]
        word = pos - lo[:, None]
        if WINDOW == 2:
            word &= hi[:, None] - pos
        s = tl.where(((word ^ guard) & guards) == 0, s, float("-inf"))
    elif length < KEYS:
        s = tl.where(token[None, :], s, float("-inf"))
    # The scale is folded into the exponent: one multiply-add for each score.
    factor = 1.0 if BIAS else scale
    m_new = tl.maximum(m, tl.max(s, 1) * factor)
    p = tl.math.exp2(s * factor - m_new[:, None])
    shrink = tl.math.exp2(m - m_new)
    mass = mass * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    v = V.load([b, h, start, 0]).reshape(KEYS, D)
    p = p.to(v.dtype)
    acc = tl.dot(p.to(tl.float32), v.to(tl.float32), acc) if UPCAST else tl.dot(p, v, acc)
    return acc, m_new, mass


# Sizes change with every video; a kernel of its own for those that 16 divides is not worth its compile time.
@triton.jit(do_not_specialize=["guards", "bias_b", "bias_h", "row_stride", "k_len_stride", "lq", "lk"])
def block_sparse(
    Q,
    K,
    V,
    OUT,
    LSE,
    PTR,
    IDX,
    N_FULL,
    Q_LEN,
    K_LEN,
    LO,
    HI,
    POS,
    guards,
    KEY_BIAS,
    scale,
    bias_b,
    bias_h,
    bias_l,
    row_stride,
    k_len_stride,
    lq,
    lk,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program (query block, head, sample). See `tma.py`."""
    # The last blocks first: they may be text, which keeps the most.
    i = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2)
    TILES: tl.constexpr = BLOCK // KEYS
    start_q = i * BLOCK
    query = tl.arange(0, BLOCK)
    slot = start_q + query
    is_query = query < tl.minimum(tl.load(Q_LEN + i), lq - start_q)
    q = Q.load([b, h, start_q, 0]).reshape(BLOCK, D)

    row = h * row_stride + i
    first = tl.load(PTR + row)
    last = tl.load(PTR + row + 1)
    partial = first + tl.load(N_FULL + row)
    bias_head = KEY_BIAS + b.to(tl.int64) * bias_b + h.to(tl.int64) * bias_h
    lengths = K_LEN + b * k_len_stride

    # A finite floor in place of -inf: rows and tiles without any key need no care, exp2(-inf - floor) is 0.
    m = tl.full([BLOCK], -1.0e30, tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, D], tl.float32)

    for step in tl.range(first * TILES, partial * TILES):
        j = tl.load(IDX + step // TILES)
        inner = step % TILES * KEYS
        start = j * BLOCK + inner
        length = tl.minimum(tl.load(lengths + j) - inner, lk - start)
        acc, m, mass = _attend_tile(
            acc, m, mass, q, K, V, bias_head, b, h, start, length, scale, bias_l, slot, slot, POS, guards, D, KEYS,
            0, BIAS, UPCAST,
        )  # fmt: skip

    if WINDOW:
        lo = tl.load(LO + slot, mask=is_query, other=0)
        hi = tl.load(HI + slot, mask=is_query, other=0) if WINDOW == 2 else lo
        # Asked although the loop would do: without it, matrix instructions wait for one another in both loops.
        if partial < last:
            for step in tl.range(partial * TILES, last * TILES):
                j = tl.load(IDX + step // TILES)
                inner = step % TILES * KEYS
                start = j * BLOCK + inner
                length = tl.minimum(tl.load(lengths + j) - inner, lk - start)
                acc, m, mass = _attend_tile(
                    acc, m, mass, q, K, V, bias_head, b, h, start, length, scale, bias_l, lo, hi, POS, guards, D, KEYS,
                    WINDOW, BIAS, UPCAST,
                )  # fmt: skip

    nothing = (mass == 0.0) | ~is_query
    total = tl.where(nothing, 1.0, mass)
    out = tl.where(nothing[:, None], 0.0, acc / total[:, None])
    lse = tl.where(nothing, float("-inf"), (m + tl.math.log2(total)) * 0.6931471805599453)
    tl.store(LSE + (b.to(tl.int64) * tl.num_programs(1) + h) * lq + slot, lse, mask=slot < lq)
    # What lies beyond the tensor's end is not written.
    OUT.store([b, h, start_q, 0], out.to(OUT.dtype).reshape(1, 1, BLOCK, D))
