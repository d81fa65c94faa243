"""The producer of a stream: one warp that draws rows of the mask, and fetches their queries, keys and values by TMA.

Keys of the next tile come before values of the last one, which are needed later: K0 K1 V0 K2 V1 ... through one ring.
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .gluon_parts import COUNT, FACTS, FULL, HEAD, ROWS, SAMPLE, START, TOKENS, words_ahead

# Triton 3.9 gave it its other name.
_fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def _drawn(ticket, lines, rows, text_rows):
    """The row that is worked on as number `ticket`: text first, which keeps most, then the others, head by head.

    Lines are heads of samples.
    """
    rest = ticket - lines * text_rows
    if rest < 0:
        line = ticket // text_rows
        i = rows - 1 - ticket % text_rows
    else:
        line = rest // (rows - text_rows)
        i = rest % (rows - text_rows)
    return line, i


@gluon.jit
def _tell(facts_s, at, value):
    """Write one fact."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    facts_s.index(at).store(gl.zeros([1], gl.int32, L) + value)


@gluon.jit
def producer(
    stream,
    maps,
    lists,
    sizes,
    rule,
    TICKET,
    D: gl.constexpr,
    KEYS: gl.constexpr,
    SLOTS: gl.constexpr,
    AHEAD: gl.constexpr,
    UNITS: gl.constexpr,
    STREAMS: gl.constexpr,
    WINDOW: gl.constexpr,
    BIAS: gl.constexpr,
    NUMBER: gl.constexpr,
):
    """Fetch what belongs to row after row."""
    q_s, tiles_s, words_s, bias_s, facts_s, lengths_s, q_ready, q_free, ready, free, facts_ready, facts_free = stream
    q_tma, k_tma, v_tma = maps
    PTR, IDX, N_FULL, Q_LEN, K_LEN, row_stride, k_len_stride = lists
    total, rows, text_rows, heads, lk = sizes
    _LO, _HI, POS, _guards, KEY_BIAS, bias_b, bias_h = rule
    QUERIES: gl.constexpr = UNITS * ROWS
    key = gl.arange(0, KEYS, gl.BlockedLayout([KEYS // 32], [32], [1], [0]))
    ticket = gl.program_id(0) * STREAMS + NUMBER
    done = 0
    begin = 0
    while ticket < total:
        line, i = _drawn(ticket, total // rows, rows, text_rows)
        sample = line // heads
        head = line % heads
        start = i * QUERIES
        row = head * row_stride + start // KEYS
        first = gl.load(PTR + row)
        n = gl.load(PTR + row + 1) - first
        full = gl.load(N_FULL + row)
        tokens = gl.load(Q_LEN + start // KEYS) - start % KEYS
        at = done % AHEAD
        turn = (done // AHEAD & 1) ^ 1
        for unit in gl.static_range(UNITS):
            at_q = at * UNITS + unit
            mbarrier.wait(q_free.index(at_q), turn)
            mbarrier.expect(q_ready.index(at_q), q_tma.block_type.nbytes)
            _fetch(q_tma, [sample, head, start + unit * ROWS, 0], q_ready.index(at_q), q_s.index(at_q))
        ahead = gl.load(IDX + first, mask=n > 0, other=0)
        ticket = gl.num_programs(0) * STREAMS + gl.atomic_add(TICKET, 1)
        mbarrier.wait(facts_free.index(at), turn)
        _tell(facts_s, at * FACTS + SAMPLE, sample)
        _tell(facts_s, at * FACTS + HEAD, head)
        _tell(facts_s, at * FACTS + START, start)
        _tell(facts_s, at * FACTS + TOKENS, tokens)
        _tell(facts_s, at * FACTS + COUNT, n)
        _tell(facts_s, at * FACTS + FULL, full)
        mbarrier.arrive(facts_ready.index(at), count=1)
        bias = KEY_BIAS + sample.to(gl.int64) * bias_b + head.to(gl.int64) * bias_h
        # Not begun as `ahead`: Triton 3.6 takes numbers that begin as the same one for one.
        last_block = 0
        last_length = KEYS
        # One round more than there are tiles, for the last one's values.
        for place in range(n + gl.where(n > 0, 1, 0)):
            block = ahead
            length = ahead
            if place < n:
                ahead = gl.load(IDX + gl.minimum(first + place + 1, first + n - 1))
                length = gl.minimum(gl.load(K_LEN + sample * k_len_stride + block), lk - block * KEYS)
                number = begin + 2 * place - gl.minimum(place, 1)
                slot = number % SLOTS
                if WINDOW:
                    # On their way while the slot is awaited.
                    words = gl.load(POS + block * KEYS + key, mask=key >= gl.where(place >= full, 0, KEYS), other=0)
                mbarrier.wait(free.index(slot), (number // SLOTS & 1) ^ 1)
                mbarrier.expect(ready.index(slot), k_tma.block_type.nbytes)
                _fetch(k_tma, [sample, head, 0, block * KEYS, 0], ready.index(slot), tiles_s.index(slot))
                _tell(lengths_s, slot, length)
                if WINDOW:
                    if place >= full:
                        words_s.index((begin // 2 + place) % words_ahead(SLOTS)).store(words)
                if BIAS:
                    bias_s.index(slot).store(gl.load(bias + block * KEYS + key))
                mbarrier.arrive(ready.index(slot), count=1)
            if place > 0:
                number = begin + 2 * place - gl.where(place < n, 0, 1)
                slot = number % SLOTS
                mbarrier.wait(free.index(slot), (number // SLOTS & 1) ^ 1)
                mbarrier.expect(ready.index(slot), v_tma.block_type.nbytes)
                if last_length > 0:
                    # This map's rows end where the tile does, and TMA fetches zeros from behind an end.
                    end = last_block * KEYS + last_length
                    _fetch(v_tma, [sample, head, end, KEYS - last_length, 0], ready.index(slot), tiles_s.index(slot))
                else:
                    # Wholly outside, TMA asks for where the map begins, and nobody knows what is before the values.
                    _fetch(k_tma, [sample, head, 1, 0, 0], ready.index(slot), tiles_s.index(slot))
                mbarrier.arrive(ready.index(slot), count=1)
            last_block = block
            last_length = length
        begin += 2 * n
        done += 1
    at = done % AHEAD
    mbarrier.wait(facts_free.index(at), (done // AHEAD & 1) ^ 1)
    _tell(facts_s, at * FACTS + COUNT, -1)
    mbarrier.arrive(facts_ready.index(at), count=1)
