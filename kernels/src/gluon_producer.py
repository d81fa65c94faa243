"""The producer of a stream: one warp that draws rows of the mask, and fetches their queries, keys and values by TMA.

Keys of the next tile come before values of the last one, which are needed later: K0 K1 V0 K2 V1 ... through one ring.
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .gluon_parts import COUNT, ENTRIES, FACTS, FULL, ROW, ROWS

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
def _clear(v, length, KEYS: gl.constexpr, D: gl.constexpr):
    """Zero the values behind the last key of a short tile: whatever stood there, times 0, must be 0."""
    PART: gl.constexpr = 8
    L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [1, 1], [1, 0])
    for part in gl.static_range(KEYS // PART):
        piece = v.slice(part * PART, PART)
        if part * PART >= length:
            piece.store(gl.zeros([PART, D], v.dtype, L))
        elif (part + 1) * PART > length:
            row = part * PART + gl.arange(0, PART, gl.SliceLayout(1, L))
            kept = piece.load(L)
            piece.store(gl.where(gl.expand_dims(row < length, 1), kept, gl.zeros_like(kept)))
    fence_async_shared()


@gluon.jit
def _values(
    stream,
    maps,
    sample,
    head,
    block,
    length,
    fill,
    at,
    shorts,
    D: gl.constexpr,
    KEYS: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """Fetch a tile of values; return how many short ones there were so far."""
    _q_tma, _k_tma, v_tma, filled_tma = maps
    _q_s, tiles_s, _facts, _entries, _q_ready, _q_free, ready, free, _facts_ready, _facts_free, landed = stream
    slot = at % SLOTS
    mbarrier.wait(free.index(slot), (at // SLOTS & 1) ^ 1)
    if length == KEYS:
        mbarrier.expect(ready.index(slot), v_tma.block_type.nbytes)
        _fetch(v_tma, [sample, head, 0, block * KEYS, 0], ready.index(slot), tiles_s.index(slot))
        mbarrier.arrive(ready.index(slot), count=1)
    elif length == fill:
        # This map ends there, and TMA fetches zeros from behind an end.
        mbarrier.expect(ready.index(slot), v_tma.block_type.nbytes)
        _fetch(filled_tma, [sample, head, block, 0, 0], ready.index(slot), tiles_s.index(slot))
        mbarrier.arrive(ready.index(slot), count=1)
    else:
        mbarrier.expect(landed.index(0), v_tma.block_type.nbytes)
        _fetch(v_tma, [sample, head, 0, block * KEYS, 0], landed.index(0), tiles_s.index(slot))
        mbarrier.wait(landed.index(0), shorts & 1)
        _clear(tiles_s.index(slot).reshape([KEYS, D]), length, KEYS, D)
        mbarrier.arrive(ready.index(slot), count=2)
        shorts += 1
    return shorts


@gluon.jit
def producer(
    stream,
    maps,
    lists,
    sizes,
    TICKET,
    D: gl.constexpr,
    KEYS: gl.constexpr,
    SLOTS: gl.constexpr,
    AHEAD: gl.constexpr,
    UNITS: gl.constexpr,
    STREAMS: gl.constexpr,
    NUMBER: gl.constexpr,
):
    """Fetch what belongs to row after row."""
    q_s, tiles_s, facts_s, entries_s, q_ready, q_free, ready, free, facts_ready, facts_free, _landed = stream
    q_tma, k_tma, _v_tma, _filled_tma = maps
    PTR, IDX, N_FULL, K_LEN, row_stride, k_len_stride = lists
    total, rows, text_rows, heads, lk, fill = sizes
    ticket = gl.program_id(0) * STREAMS + NUMBER
    done = 0
    begin = 0
    shorts = 0
    while ticket < total:
        line, i = _drawn(ticket, total // rows, rows, text_rows)
        head = line % heads
        sample = line // heads
        row = head * row_stride + i // (KEYS // (UNITS * ROWS))
        first = gl.load(PTR + row)
        n = gl.load(PTR + row + 1) - first
        full = gl.load(N_FULL + row)
        ahead = gl.load(IDX + first, mask=n > 0, other=0)
        ticket = gl.num_programs(0) * STREAMS + gl.atomic_add(TICKET, 1)
        at = done % AHEAD
        turn = (done // AHEAD & 1) ^ 1
        mbarrier.wait(facts_free.index(at), turn)
        _tell(facts_s, at * FACTS + ROW, line * rows + i)
        _tell(facts_s, at * FACTS + COUNT, n)
        _tell(facts_s, at * FACTS + FULL, full)
        mbarrier.arrive(facts_ready.index(at), count=1)
        for unit in gl.static_range(UNITS):
            at_q = at * UNITS + unit
            mbarrier.wait(q_free.index(at_q), turn)
            mbarrier.expect(q_ready.index(at_q), q_tma.block_type.nbytes)
            _fetch(q_tma, [sample, head, (i * UNITS + unit) * ROWS, 0], q_ready.index(at_q), q_s.index(at_q))
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
                mbarrier.wait(free.index(slot), (number // SLOTS & 1) ^ 1)
                _tell(entries_s, slot * ENTRIES, block)
                _tell(entries_s, slot * ENTRIES + 1, length)
                mbarrier.expect(ready.index(slot), k_tma.block_type.nbytes)
                _fetch(k_tma, [sample, head, 0, block * KEYS, 0], ready.index(slot), tiles_s.index(slot))
                mbarrier.arrive(ready.index(slot), count=1)
            if place > 0:
                number = begin + 2 * place - gl.where(place < n, 0, 1)
                shorts = _values(
                    stream, maps, sample, head, last_block, last_length, fill, number, shorts, D, KEYS, SLOTS
                )
            last_block = block
            last_length = length
        begin += 2 * n
        done += 1
    at = done % AHEAD
    mbarrier.wait(facts_free.index(at), (done // AHEAD & 1) ^ 1)
    _tell(facts_s, at * FACTS + ROW, total)
    mbarrier.arrive(facts_ready.index(at), count=1)
