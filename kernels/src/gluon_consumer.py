"""A consumer of a stream: one warp group, which attends with 64 queries of each row.

Tiles of keys follow one another without a stop: scores of the next one are multiplied while the values of this one are
added.
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .gluon_parts import (
    FLOOR,
    ROWS,
    entry_of,
    facts_of,
    interval,
    no_mass,
    scores,
    sent,
    shrunk,
    softmax,
    stay,
    write,
)  # fmt: skip


@gluon.jit
def consumer(
    stream,
    call,
    rule,
    D: gl.constexpr,
    KEYS: gl.constexpr,
    SLOTS: gl.constexpr,
    AHEAD: gl.constexpr,
    UNITS: gl.constexpr,
    WINDOW: gl.constexpr,
    BIAS: gl.constexpr,
    UNIT: gl.constexpr,
):
    """Attend with 64 queries of each row."""
    q_s, tiles_s, facts_s, entries_s, q_ready, q_free, ready, free, facts_ready, facts_free, _landed = stream
    out_tma, LSE, Q_LEN, scale, total, rows, heads, lq = call
    LO, HI, POS, guards, KEY_BIAS, bias_b, bias_h = rule
    DT: gl.constexpr = tiles_s.dtype
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, O_L, 2)
    R_L: gl.constexpr = gl.SliceLayout(1, S_L)
    # With a bias the logits are spelled out; without one, the scale is folded into the exponent.
    factor = 1.0 if BIAS else scale
    done = 0
    begin = 0
    row, n, full = facts_of(facts_s, facts_ready, done, AHEAD)
    while row < total:
        at = done % AHEAD
        mbarrier.arrive(facts_free.index(at), count=1)
        line = row // rows
        i = row % rows
        sample = line // heads
        head = line % heads
        start = (i * UNITS + UNIT) * ROWS
        lo, hi = interval(LO, HI, start + gl.arange(0, ROWS, R_L), lq, WINDOW)
        bias = KEY_BIAS + sample.to(gl.int64) * bias_b + head.to(gl.int64) * bias_h
        q = q_s.index(at * UNITS + UNIT).reshape([ROWS, D])
        m = gl.full([ROWS], FLOOR, gl.float32, R_L)
        mass = no_mass(KEYS, S_L)
        acc = gl.zeros([ROWS, D], gl.float32, O_L)
        if done > 0:
            sent()
            mbarrier.arrive(q_free.index((done - 1) % AHEAD * UNITS + UNIT), count=1)
        mbarrier.wait(q_ready.index(at * UNITS + UNIT), done // AHEAD & 1)
        if n > 0:
            slot = begin % SLOTS
            block, length = entry_of(entries_s, ready, begin, SLOTS)
            k = tiles_s.index(slot).reshape([KEYS, D]).permute((1, 0))
            running = warpgroup_mma(q, k, gl.zeros([ROWS, KEYS], gl.float32, S_L), use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=(running,))
            mbarrier.arrive(free.index(slot), count=1)
            s = scores(s, block, length, full <= 0, lo, hi, POS, guards, bias, scale, KEYS, WINDOW, BIAS)
            p, m, mass, shrink = softmax(s, m, mass, factor, D)
            weights = gl.convert_layout(p.to(DT), P_L)
            place = 1
            while place < n:
                number = begin + 2 * place
                slot = (number - 1) % SLOTS
                block, length = entry_of(entries_s, ready, number - 1, SLOTS)
                k = tiles_s.index(slot).reshape([KEYS, D]).permute((1, 0))
                running = warpgroup_mma(q, k, gl.zeros([ROWS, KEYS], gl.float32, S_L), use_acc=False, is_async=True)
                last = number % SLOTS
                mbarrier.wait(ready.index(last), number // SLOTS & 1)
                adding = warpgroup_mma(weights, tiles_s.index(last).reshape([KEYS, D]), acc, is_async=True)
                s = warpgroup_mma_wait(1, deps=(running,))
                mbarrier.arrive(free.index(slot), count=1)
                s = scores(s, block, length, place >= full, lo, hi, POS, guards, bias, scale, KEYS, WINDOW, BIAS)
                p, m, mass, shrink = softmax(s, m, mass, factor, D)
                # The multiplication that runs still reads the last ones.
                behind = gl.convert_layout(p.to(DT), P_L)
                mass = stay(mass)
                acc = warpgroup_mma_wait(0, deps=(adding,))
                mbarrier.arrive(free.index(last), count=1)
                acc = shrunk(acc, shrink, D)
                weights = behind
                place += 1
            number = begin + 2 * n - 1
            last = number % SLOTS
            mbarrier.wait(ready.index(last), number // SLOTS & 1)
            adding = warpgroup_mma(weights, tiles_s.index(last).reshape([KEYS, D]), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(adding,))
            mbarrier.arrive(free.index(last), count=1)
            begin += 2 * n
        tokens = gl.load(Q_LEN + start // KEYS) - start % KEYS
        write(out_tma, LSE, acc, m, mass, q_s.index(at * UNITS + UNIT), sample, head, heads, start, tokens, lq, D, DT)
        done += 1
        row, n, full = facts_of(facts_s, facts_ready, done, AHEAD)
    sent()
