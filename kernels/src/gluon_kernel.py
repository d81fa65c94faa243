"""The Gluon program of `gluon.py`, in files of its own because importing them needs Triton 3.6 to 3.9.

Partitions run side by side on one processor of the GPU. Two or three consumers, warp groups of 64 queries each, share
what the producer brings (`gluon_rows.py`, `gluon_joined.py`). The producer, one warp, which never waits for another,
draws tiles of queries and fills two rings, of keys and of values, by TMA.
Barriers come in pairs: `ready` (the producer has filled a slot) and `free` (the consumers have read it).
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .gluon_joined import consumer as joined_consumer
from .gluon_parts import AHEAD, COUNT, ENTRIES, FACTS, FULL, ROWS, SHIFT, TILE, tell
from .gluon_rows import consumer as rows_consumer

# Triton 3.9 gave it its other name.
_fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def _list(rows, head, i, CONSUMERS: gl.constexpr, SHARE: gl.constexpr):
    """Where the list of a tile of queries begins, how long it is, how many of its blocks are full."""
    PTR, N_FULL, COUNTS, row_stride, count_stride, spread = rows
    if CONSUMERS > SHARE:
        first = gl.load(PTR + head * row_stride + i * CONSUMERS // SHARE) + (i & 1) * spread
        n = gl.load(COUNTS + head * count_stride + i)
        full = n
    else:
        first = gl.load(PTR + head * row_stride + i)
        n = gl.load(PTR + head * row_stride + i + 1) - first
        full = gl.load(N_FULL + head * row_stride + i)
    return first, n, full


@gluon.jit
def _tile(ticket, lines, q_tiles, text_tiles):
    """The tile that is worked on as number `ticket`: those with text in them first, then the others, head by head.

    Lines are heads of samples.
    """
    rest = ticket - lines * text_tiles
    if rest < 0:
        line = ticket // text_tiles
        i = q_tiles - 1 - ticket % text_tiles
    else:
        line = rest // (q_tiles - text_tiles)
        i = rest % (q_tiles - text_tiles)
    return line, i


@gluon.jit
def producer(
    maps,
    shared,
    rows,
    given,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    SHARE: gl.constexpr,
    PERSISTENT: gl.constexpr,
):
    """Fetch queries, keys and values of tile after tile."""
    q_s, k_s, v_s, facts_s, entries_s, q_ready, q_free, k_ready, k_free, v_ready, v_free, facts_ready, facts_free = (
        shared
    )
    q_tma, k_tma, v_tma = maps
    TICKET, IDX, K_LEN, total, q_tiles, text_tiles, heads, lk, k_len_stride = given
    ticket = gl.program_id(0)
    done = 0
    step = 0
    while ticket < total:
        line, i = _tile(ticket, total // q_tiles, q_tiles, text_tiles)
        head = line % heads
        sample = line // heads
        first, n, full = _list(rows, head, i, CONSUMERS, SHARE)
        ahead = gl.load(IDX + first, mask=n > 0, other=0)
        if PERSISTENT:
            ticket = gl.num_programs(0) + gl.atomic_add(TICKET, 1)
        else:
            ticket = total
        slot = done % AHEAD
        turn = (done // AHEAD & 1) ^ 1
        mbarrier.wait(facts_free.index(slot), turn)
        tell(facts_s, slot * FACTS + TILE, line * q_tiles + i)
        tell(facts_s, slot * FACTS + COUNT, n)
        tell(facts_s, slot * FACTS + FULL, full)
        mbarrier.arrive(facts_ready.index(slot), count=1)
        for w in gl.static_range(CONSUMERS):
            at_q = slot * CONSUMERS + w
            mbarrier.wait(q_free.index(at_q), turn)
            mbarrier.expect(q_ready.index(at_q), q_tma.block_type.nbytes)
            start = i * (ROWS * CONSUMERS) + w * ROWS
            _fetch(q_tma, [sample, head, start, 0], q_ready.index(at_q), q_s.index(at_q))
        for place in range(first, first + n):
            entry = ahead
            ahead = gl.load(IDX + gl.minimum(place + 1, first + n - 1))
            block = entry
            if CONSUMERS > SHARE:
                block = entry >> SHIFT
            length = gl.minimum(gl.load(K_LEN + sample * k_len_stride + block), lk - block * KEYS)
            ring = step % STAGES
            turn = (step // STAGES & 1) ^ 1
            mbarrier.wait(k_free.index(ring), turn)
            tell(entries_s, ring * ENTRIES, entry)
            tell(entries_s, ring * ENTRIES + 1, length)
            mbarrier.expect(k_ready.index(ring), k_tma.block_type.nbytes)
            _fetch(k_tma, [sample, head, block * KEYS, 0], k_ready.index(ring), k_s.index(ring))
            mbarrier.arrive(k_ready.index(ring), count=1)
            mbarrier.wait(v_free.index(ring), turn)
            mbarrier.expect(v_ready.index(ring), v_tma.block_type.nbytes)
            _fetch(v_tma, [sample, head, block * KEYS, 0], v_ready.index(ring), v_s.index(ring))
            step += 1
        done += 1
    slot = done % AHEAD
    mbarrier.wait(facts_free.index(slot), (done // AHEAD & 1) ^ 1)
    tell(facts_s, slot * FACTS + TILE, total)
    mbarrier.arrive(facts_ready.index(slot), count=1)


# Nothing is compiled for a value of an argument: `gluon.py` looks programs up by the constants alone.
@gluon.jit(
    do_not_specialize=[
        "guards", "total", "q_tiles", "text_tiles", "heads", "q_blocks", "row_stride", "count_stride", "spread", "lq",
        "lk", "bias_b", "bias_h", "k_len_stride",
    ],
    do_not_specialize_on_alignment=[
        "LSE", "TICKET", "PTR", "IDX", "N_FULL", "COUNTS", "Q_LEN", "K_LEN", "LO", "HI", "POS", "KEY_BIAS",
    ],
)  # fmt: skip
def block_sparse(
    q_tma,
    k_tma,
    v_tma,
    out_tma,
    LSE,
    TICKET,
    PTR,
    IDX,
    N_FULL,
    COUNTS,
    Q_LEN,
    K_LEN,
    LO,
    HI,
    POS,
    guards,
    KEY_BIAS,
    scale,
    total,
    q_tiles,
    text_tiles,
    heads,
    q_blocks,
    row_stride,
    count_stride,
    spread,
    lq,
    lk,
    bias_b,
    bias_h,
    k_len_stride,
    D: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    SHARE: gl.constexpr,
    PERSISTENT: gl.constexpr,
    WINDOW: gl.constexpr,
    BIAS: gl.constexpr,
    POLYNOMIAL: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """See `gluon.py`."""
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_s = gl.allocate_shared_memory(q_tma.dtype, [AHEAD * CONSUMERS, 1, 1, ROWS, D], q_tma.layout)
    k_s = gl.allocate_shared_memory(k_tma.dtype, [STAGES, 1, 1, KEYS, D], k_tma.layout)
    v_s = gl.allocate_shared_memory(v_tma.dtype, [STAGES, 1, 1, KEYS, D], v_tma.layout)
    facts_s = gl.allocate_shared_memory(gl.int32, [AHEAD * FACTS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    entries_s = gl.allocate_shared_memory(gl.int32, [STAGES * ENTRIES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_ready = gl.allocate_shared_memory(gl.int64, [AHEAD * CONSUMERS, 1], BARRIER)
    q_free = gl.allocate_shared_memory(gl.int64, [AHEAD * CONSUMERS, 1], BARRIER)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    facts_ready = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], BARRIER)
    facts_free = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], BARRIER)
    for n in gl.static_range(AHEAD * CONSUMERS):
        mbarrier.init(q_ready.index(n), count=1)
        mbarrier.init(q_free.index(n), count=1)
    for n in gl.static_range(STAGES):
        # The keys, and what is told of them.
        mbarrier.init(k_ready.index(n), count=2)
        mbarrier.init(k_free.index(n), count=CONSUMERS)
        mbarrier.init(v_ready.index(n), count=1)
        mbarrier.init(v_free.index(n), count=CONSUMERS)
    for n in gl.static_range(AHEAD):
        mbarrier.init(facts_ready.index(n), count=1)
        mbarrier.init(facts_free.index(n), count=CONSUMERS)
    fence_async_shared()
    shared = (
        q_s, k_s, v_s, facts_s, entries_s, q_ready, q_free, k_ready, k_free, v_ready, v_free, facts_ready, facts_free
    )  # fmt: skip
    maps = (q_tma, k_tma, v_tma)
    rows = (PTR, N_FULL, COUNTS, row_stride, count_stride, spread)
    fetched = (TICKET, IDX, K_LEN, total, q_tiles, text_tiles, heads, lk, k_len_stride)
    given = (Q_LEN, LO, HI, POS, guards, KEY_BIAS, scale, total, q_tiles, heads, q_blocks, lq)
    strides = (bias_b, bias_h)
    C: gl.constexpr = CONSUMERS
    S: gl.constexpr = SHARE
    R: gl.constexpr = REGISTERS
    P: gl.constexpr = POLYNOMIAL
    M: gl.constexpr = WINDOW
    if C == S:
        gl.warp_specialize(
            [
                (rows_consumer, (out_tma, LSE, shared, given, strides, KEYS, D, STAGES, C, S, M, BIAS, P, 0)),
                (rows_consumer, (out_tma, LSE, shared, given, strides, KEYS, D, STAGES, C, S, M, BIAS, P, 1)),
                (producer, (maps, shared, rows, fetched, KEYS, STAGES, C, S, PERSISTENT)),
            ],
            [4, 1],
            [R, 24],
        )
    elif C == 2:
        gl.warp_specialize(
            [
                (joined_consumer, (out_tma, LSE, shared, given, strides, KEYS, D, STAGES, C, S, M, BIAS, P, 0)),
                (joined_consumer, (out_tma, LSE, shared, given, strides, KEYS, D, STAGES, C, S, M, BIAS, P, 1)),
                (producer, (maps, shared, rows, fetched, KEYS, STAGES, C, S, PERSISTENT)),
            ],
            [4, 1],
            [R, 24],
        )
    else:
        gl.warp_specialize(
            [
                (joined_consumer, (out_tma, LSE, shared, given, strides, KEYS, D, STAGES, C, S, M, BIAS, P, 0)),
                (joined_consumer, (out_tma, LSE, shared, given, strides, KEYS, D, STAGES, C, S, M, BIAS, P, 1)),
                (joined_consumer, (out_tma, LSE, shared, given, strides, KEYS, D, STAGES, C, S, M, BIAS, P, 2)),
                (producer, (maps, shared, rows, fetched, KEYS, STAGES, C, S, PERSISTENT)),
            ],
            [4, 4, 1],
            [R, R, 24],
        )
