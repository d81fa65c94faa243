"""A consumer of the Gluon kernel whose warp groups belong to different rows of the mask and share one stream of keys.

Each entry of the stream says which rows keep it (see `joined.py`); a consumer lets pass what its row does not keep.
Whole tiles that follow one another do so without a stop: scores of the next one while this one's values are added.
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .gluon_parts import (
    AHEAD,
    FLOOR,
    ROWS,
    SHIFT,
    clear,
    entry_of,
    facts_of,
    interval,
    no_mass,
    place_of,
    scores,
    sent,
    shrunk,
    softmax,
    write,
)  # fmt: skip


@gluon.jit
def _next(entries_s, k_ready, step, place, n, own, STAGES: gl.constexpr):
    """Wait for the next tile of keys of the list.

    Returns:
        Its block, how many tokens that holds, and how the consumer keeps it: 0 not at all, 1 decided token by token, 2
        whole; behind the end of the list 0 at once.
    """
    block = place * 0
    length = block
    kind = block
    if place < n:
        entry, length = entry_of(entries_s, k_ready, step, STAGES)
        block = entry >> SHIFT
        kind = (entry >> (2 * own)) & 3
    return block, length, kind


@gluon.jit
def consumer(
    out_tma,
    LSE,
    shared,
    given,
    strides,
    KEYS: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    SHARE: gl.constexpr,
    WINDOW: gl.constexpr,
    BIAS: gl.constexpr,
    POLYNOMIAL: gl.constexpr,
    W: gl.constexpr,
):
    """Attend with 64 queries of each tile."""
    q_s, k_s, v_s, facts_s, entries_s, q_ready, q_free, k_ready, k_free, v_ready, v_free, facts_ready, facts_free = (
        shared
    )
    Q_LEN, LO, HI, POS, guards, KEY_BIAS, scale, total, q_tiles, heads, q_blocks, lq = given
    bias_b, bias_h = strides
    DT: gl.constexpr = k_s.dtype
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, O_L, 2)
    R_L: gl.constexpr = gl.SliceLayout(1, S_L)
    # With a bias the logits are spelled out; without one, the scale is folded into the exponent.
    factor = 1.0 if BIAS else scale
    done = 0
    step = 0
    tile, n, _full = facts_of(facts_s, facts_ready, done)
    while tile < total:
        slot = done % AHEAD
        mbarrier.arrive(facts_free.index(slot), count=1)
        sample, head, i = place_of(tile, q_tiles, heads)
        # The row that these queries belong to, counted from the first of this tile.
        own = (i * CONSUMERS + W) // SHARE - i * CONSUMERS // SHARE
        lo, hi = interval(LO, HI, (i * CONSUMERS + W) * ROWS + gl.arange(0, ROWS, R_L), lq, WINDOW)
        bias = KEY_BIAS + sample.to(gl.int64) * bias_b + head.to(gl.int64) * bias_h
        q = q_s.index(slot * CONSUMERS + W).reshape([ROWS, D])
        m = gl.full([ROWS], FLOOR, gl.float32, R_L)
        mass = no_mass(KEYS, S_L)
        acc = gl.zeros([ROWS, D], gl.float32, O_L)
        mbarrier.wait(q_ready.index(slot * CONSUMERS + W), done // AHEAD & 1)
        if done > 0:
            sent()
            mbarrier.arrive(q_free.index((done - 1) % AHEAD * CONSUMERS + W), count=1)
        place = 0
        block, length, kind = _next(entries_s, k_ready, step, place, n, own, STAGES)
        while place < n:
            ring = step % STAGES
            turn = step // STAGES & 1
            if kind == 0:
                mbarrier.arrive(k_free.index(ring), count=1)
                mbarrier.wait(v_ready.index(ring), turn)
                place += 1
                block, length, kind = _next(entries_s, k_ready, step + 1, place, n, own, STAGES)
            else:
                k = k_s.index(ring).reshape([KEYS, D]).permute((1, 0))
                running = warpgroup_mma(q, k, gl.zeros([ROWS, KEYS], gl.float32, S_L), use_acc=False, is_async=True)
                s = warpgroup_mma_wait(0, deps=(running,))
                mbarrier.arrive(k_free.index(ring), count=1)
                if length < KEYS:
                    mbarrier.wait(v_ready.index(ring), turn)
                    clear(v_s.index(ring).reshape([KEYS, D]), length, KEYS, D)
                if BIAS or length < KEYS or kind == 1:
                    s = scores(s, block, length, kind, lo, hi, POS, guards, bias, scale, WINDOW, BIAS, KEYS)
                p, m, mass, shrink = softmax(s, m, mass, factor, POLYNOMIAL)
                acc = shrunk(acc, shrink, D)
                weights = gl.convert_layout(p.to(DT), P_L)
                place += 1
                block, length, kind = _next(entries_s, k_ready, step + 1, place, n, own, STAGES)
                while place < n and kind == 2 and length == KEYS:
                    ring = (step + 1) % STAGES
                    k = k_s.index(ring).reshape([KEYS, D]).permute((1, 0))
                    running = warpgroup_mma(q, k, gl.zeros([ROWS, KEYS], gl.float32, S_L), use_acc=False, is_async=True)
                    last = step % STAGES
                    mbarrier.wait(v_ready.index(last), step // STAGES & 1)
                    adding = warpgroup_mma(weights, v_s.index(last).reshape([KEYS, D]), acc, is_async=True)
                    s = warpgroup_mma_wait(1, deps=(running,))
                    mbarrier.arrive(k_free.index(ring), count=1)
                    if BIAS:
                        s = scores(s, block, KEYS, 2, lo, hi, POS, guards, bias, scale, False, True, KEYS)
                    p, m, mass, shrink = softmax(s, m, mass, factor, POLYNOMIAL)
                    acc = warpgroup_mma_wait(0, deps=(adding,))
                    mbarrier.arrive(v_free.index(last), count=1)
                    acc = shrunk(acc, shrink, D)
                    weights = gl.convert_layout(p.to(DT), P_L)
                    step += 1
                    place += 1
                    block, length, kind = _next(entries_s, k_ready, step + 1, place, n, own, STAGES)
                ring = step % STAGES
                mbarrier.wait(v_ready.index(ring), step // STAGES & 1)
                adding = warpgroup_mma(weights, v_s.index(ring).reshape([KEYS, D]), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(adding,))
            mbarrier.arrive(v_free.index(ring), count=1)
            step += 1
        write(
            out_tma, LSE, Q_LEN, acc, m, mass, tile, q_s.index(slot * CONSUMERS + W), (q_tiles, heads, q_blocks, lq), W,
            D, CONSUMERS, SHARE, DT,
        )  # fmt: skip
        done += 1
        tile, n, _full = facts_of(facts_s, facts_ready, done)
    sent()
