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
    facts_of,
    handed_back,
    interval,
    length_of,
    no_mass,
    scores,
    scores_begun,
    sent,
    shrunk,
    softmax,
    stay,
    tokens_of,
    words_ahead,
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
    q_s, tiles_s, words_s, bias_s, facts_s, lengths_s, q_ready, q_free, ready, free, facts_ready, facts_free = stream
    out_tma, LSE, scale, heads, lq = call
    LO, HI, _POS, guards, _KEY_BIAS, _bias_b, _bias_h = rule
    DT: gl.constexpr = tiles_s.dtype
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, O_L, 2)
    R_L: gl.constexpr = gl.SliceLayout(1, S_L)
    done = 0
    begin = 0
    n = length_of(facts_s, facts_ready, done, AHEAD)
    while n >= 0:
        at = done % AHEAD
        sample, head, start, tokens, full = facts_of(facts_s, at, UNIT)
        mbarrier.arrive(facts_free.index(at), count=1)
        lo, hi = interval(LO, HI, start + gl.arange(0, ROWS, R_L), lq, WINDOW)
        q = q_s.index(at * UNITS + UNIT).reshape([ROWS, D])
        m = gl.full([ROWS], FLOOR, gl.float32, R_L)
        mass = no_mass(KEYS, S_L)
        acc = gl.zeros([ROWS, D], gl.float32, O_L)
        if AHEAD == 2:
            handed_back(q_free, done, AHEAD, UNITS, UNIT)
        mbarrier.wait(q_ready.index(at * UNITS + UNIT), done // AHEAD & 1)
        if n > 0:
            slot = begin % SLOTS
            length = tokens_of(lengths_s, ready, begin, SLOTS)
            k = tiles_s.index(slot).reshape([KEYS, D]).permute((1, 0))
            running = scores_begun(q, k, bias_s.index(slot), KEYS, S_L, BIAS)
            s = warpgroup_mma_wait(0, deps=(running,))
            words = words_s.index(begin // 2 % words_ahead(SLOTS))
            s = scores(s, length, full <= 0, lo, hi, words, guards, KEYS, WINDOW)
            mbarrier.arrive(free.index(slot), count=1)
            p, m, mass, shrink = softmax(s, m, mass, scale, D)
            weights = gl.convert_layout(p.to(DT), P_L)
            place = 1
            while place < n:
                number = begin + 2 * place
                slot = (number - 1) % SLOTS
                length = tokens_of(lengths_s, ready, number - 1, SLOTS)
                k = tiles_s.index(slot).reshape([KEYS, D]).permute((1, 0))
                running = scores_begun(q, k, bias_s.index(slot), KEYS, S_L, BIAS)
                last = number % SLOTS
                mbarrier.wait(ready.index(last), number // SLOTS & 1)
                adding = warpgroup_mma(weights, tiles_s.index(last).reshape([KEYS, D]), acc, is_async=True)
                s = warpgroup_mma_wait(1, deps=(running,))
                mbarrier.arrive(free.index(slot), count=1)
                words = words_s.index((begin // 2 + place) % words_ahead(SLOTS))
                s = scores(s, length, place >= full, lo, hi, words, guards, KEYS, WINDOW)
                p, m, mass, shrink = softmax(s, m, mass, scale, D)
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
        write(out_tma, LSE, acc, m, mass, q_s.index(at * UNITS + UNIT), sample, head, heads, start, tokens, lq, D, DT)
        done += 1
        if AHEAD == 1:
            handed_back(q_free, done, AHEAD, UNITS, UNIT)
        n = length_of(facts_s, facts_ready, done, AHEAD)
    sent()
