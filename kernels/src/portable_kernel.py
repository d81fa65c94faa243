"""The Triton program of `portable.py`, in a file of its own because importing it needs Triton."""

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
    k_base,
    v_base,
    bias_base,
    length,
    inside,
    scale,
    k_stride,
    v_stride,
    bias_stride,
    D: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One step of the online softmax. The first `length` keys of the tile are tokens; the rest is never looked at."""
    within = tl.arange(0, KEYS)
    channel = tl.arange(0, D)
    token = within < length
    k = tl.load(k_base + within[:, None] * k_stride + channel[None, :], mask=token[:, None], other=0.0)
    v = tl.load(v_base + within[:, None] * v_stride + channel[None, :], mask=token[:, None], other=0.0)
    if UPCAST:
        s = tl.dot(q.to(tl.float32), tl.trans(k).to(tl.float32))
    else:
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if BIAS:
        s = s * scale + 1.4426950408889634 * tl.load(bias_base + within * bias_stride, mask=token, other=0.0)[None, :]
    s = tl.where(inside if WINDOW else token[None, :], s, float("-inf"))
    # The scale is folded into the exponent: one multiply-add for each score.
    factor = 1.0 if BIAS else scale
    m_new = tl.maximum(m, tl.max(s, 1) * factor)
    p = tl.math.exp2(s * factor - m_new[:, None])
    shrink = tl.math.exp2(m - m_new)
    mass = mass * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    if UPCAST:
        acc = tl.dot(p.to(v.dtype).to(tl.float32), v.to(tl.float32), acc)
    else:
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
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
    q_b,
    q_l,
    q_h,
    k_b,
    k_l,
    k_h,
    v_b,
    v_l,
    v_h,
    out_b,
    out_l,
    out_h,
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
    """Program (query block, head, sample). See `portable.py`."""
    # The last blocks first: they may be text, which keeps the most.
    i = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2)
    TILES: tl.constexpr = BLOCK // KEYS
    # A whole tensor can pass 2^31 elements; a block cannot, so inside it offsets stay 32-bit.
    h64 = h.to(tl.int64)
    b64 = b.to(tl.int64)
    start_q = i * BLOCK
    query = tl.arange(0, BLOCK)
    channel = tl.arange(0, D)
    length_q = tl.minimum(tl.load(Q_LEN + i), lq - start_q)
    is_query = query < length_q
    q_base = Q + b64 * q_b + h64 * q_h + start_q.to(tl.int64) * q_l
    q = tl.load(q_base + query[:, None] * q_l + channel[None, :], mask=is_query[:, None], other=0.0)

    row = h * row_stride + i
    first = tl.load(PTR + row)
    last = tl.load(PTR + row + 1)
    partial = first + tl.load(N_FULL + row)
    k_head = K + b64 * k_b + h64 * k_h
    v_head = V + b64 * v_b + h64 * v_h
    bias_head = KEY_BIAS + b64 * bias_b + h64 * bias_h
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
            acc,
            m,
            mass,
            q,
            k_head + start.to(tl.int64) * k_l,
            v_head + start.to(tl.int64) * v_l,
            bias_head + start * bias_l,
            length,
            length,
            scale,
            k_l,
            v_l,
            bias_l,
            D,
            KEYS,
            False,
            BIAS,
            UPCAST,
        )

    if WINDOW:
        key = tl.arange(0, KEYS)
        guard = guards & ~((guards >> 1) & 0x7FFFFFFF)
        # No window holds it, so keys that are no tokens are outside all of them.
        no_key = (guard & -guard) - 1
        # Asked although the loop would do: without it, matrix instructions wait for one another in both loops.
        if partial < last:
            lo = tl.load(LO + start_q + query, mask=is_query, other=0)[:, None]
            if WINDOW == 2:
                hi = tl.load(HI + start_q + query, mask=is_query, other=0)[:, None]
            for step in tl.range(partial * TILES, last * TILES):
                j = tl.load(IDX + step // TILES)
                inner = step % TILES * KEYS
                start = j * BLOCK + inner
                length = tl.minimum(tl.load(lengths + j) - inner, lk - start)
                pos = tl.load(POS + start + key, mask=key < length, other=no_key)[None, :]
                word = pos - lo
                if WINDOW == 2:
                    word &= hi - pos
                inside = ((word ^ guard) & guards) == 0
                acc, m, mass = _attend_tile(
                    acc,
                    m,
                    mass,
                    q,
                    k_head + start.to(tl.int64) * k_l,
                    v_head + start.to(tl.int64) * v_l,
                    bias_head + start * bias_l,
                    length,
                    inside,
                    scale,
                    k_l,
                    v_l,
                    bias_l,
                    D,
                    KEYS,
                    True,
                    BIAS,
                    UPCAST,
                )

    nothing = (mass == 0.0) | (query >= length_q)
    total = tl.where(nothing, 1.0, mass)
    out = tl.where(nothing[:, None], 0.0, acc / total[:, None])
    lse = tl.where(nothing, float("-inf"), (m + tl.math.log2(total)) * 0.6931471805599453)
    within = query < lq - start_q
    heads = tl.num_programs(1)
    tl.store(LSE + (b64 * heads + h) * lq + start_q + query, lse, mask=within)
    out_base = OUT + b64 * out_b + h64 * out_h + start_q.to(tl.int64) * out_l
    tl.store(out_base + query[:, None] * out_l + channel[None, :], out.to(OUT.dtype.element_ty), mask=within[:, None])
