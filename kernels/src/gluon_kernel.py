"""The Gluon program of `gluon.py`, in files of its own because importing them needs Triton 3.6 to 3.9.

Partitions run side by side on one processor of the GPU. A stream is a producer, one warp (`gluon_producer.py`), and one
or two consumers, warp groups of 64 queries each that belong to one row of the mask (`gluon_consumer.py`). Streams share
nothing but the counter that they draw rows from.
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .gluon_consumer import consumer
from .gluon_parts import FACTS, ROWS, words_ahead
from .gluon_producer import producer


@gluon.jit
def _stream(
    q_tma,
    k_tma,
    KEYS: gl.constexpr,
    D: gl.constexpr,
    SLOTS: gl.constexpr,
    AHEAD: gl.constexpr,
    UNITS: gl.constexpr,
    WINDOW: gl.constexpr,
    BIAS: gl.constexpr,
):
    """Shared memory of one stream. Barriers come in pairs: `ready`, what is awaited is there; `free`, it was read."""
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_s = gl.allocate_shared_memory(q_tma.dtype, [AHEAD * UNITS, 1, 1, ROWS, D], q_tma.layout)
    tiles_s = gl.allocate_shared_memory(k_tma.dtype, [SLOTS, 1, 1, 1, KEYS, D], k_tma.layout)
    words_s = gl.allocate_shared_memory(gl.int32, [words_ahead(SLOTS), KEYS if WINDOW else 1], PLAIN)
    bias_s = gl.allocate_shared_memory(gl.float32, [SLOTS, KEYS if BIAS else 1], PLAIN)
    facts_s = gl.allocate_shared_memory(gl.int32, [AHEAD * FACTS, 1], PLAIN)
    lengths_s = gl.allocate_shared_memory(gl.int32, [SLOTS, 1], PLAIN)
    q_ready = gl.allocate_shared_memory(gl.int64, [AHEAD * UNITS, 1], BARRIER)
    q_free = gl.allocate_shared_memory(gl.int64, [AHEAD * UNITS, 1], BARRIER)
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    facts_ready = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], BARRIER)
    facts_free = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], BARRIER)
    for n in gl.static_range(AHEAD * UNITS):
        mbarrier.init(q_ready.index(n), count=1)
        mbarrier.init(q_free.index(n), count=1)
    for n in gl.static_range(SLOTS):
        # The tile, and what is told of it.
        mbarrier.init(ready.index(n), count=2)
        mbarrier.init(free.index(n), count=UNITS)
    for n in gl.static_range(AHEAD):
        mbarrier.init(facts_ready.index(n), count=1)
        mbarrier.init(facts_free.index(n), count=UNITS)
    return q_s, tiles_s, words_s, bias_s, facts_s, lengths_s, q_ready, q_free, ready, free, facts_ready, facts_free


# Nothing is compiled for a value of an argument: `gluon.py` looks programs up by the constants alone.
@gluon.jit(
    do_not_specialize=[
        "guards", "total", "rows", "text_rows", "heads", "row_stride", "lq", "lk", "bias_b", "bias_h",
        "k_len_stride",
    ],
    do_not_specialize_on_alignment=[
        "LSE", "TICKET", "PTR", "IDX", "N_FULL", "Q_LEN", "K_LEN", "LO", "HI", "POS", "KEY_BIAS",
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
    Q_LEN,
    K_LEN,
    LO,
    HI,
    POS,
    guards,
    KEY_BIAS,
    scale,
    total,
    rows,
    text_rows,
    heads,
    row_stride,
    lq,
    lk,
    bias_b,
    bias_h,
    k_len_stride,
    D: gl.constexpr,
    KEYS: gl.constexpr,
    UNITS: gl.constexpr,
    SLOTS: gl.constexpr,
    STREAMS: gl.constexpr,
    AHEAD: gl.constexpr,
    REGISTERS: gl.constexpr,
    WINDOW: gl.constexpr,
    BIAS: gl.constexpr,
):
    """See `gluon.py`."""
    maps = (q_tma, k_tma, v_tma)
    lists = (PTR, IDX, N_FULL, Q_LEN, K_LEN, row_stride, k_len_stride)
    sizes = (total, rows, text_rows, heads, lk)
    rule = (LO, HI, POS, guards, KEY_BIAS, bias_b, bias_h)
    call = (out_tma, LSE, scale, heads, lq)
    W: gl.constexpr = WINDOW
    a = _stream(q_tma, k_tma, KEYS, D, SLOTS, AHEAD, UNITS, W, BIAS)
    R: gl.constexpr = REGISTERS
    # What is left of the 65,536 registers of a processor, less a few that no group of warps may have.
    PRODUCER: gl.constexpr = 504 - 2 * R if STREAMS == 1 else 512 - 3 * R
    if STREAMS == 1:
        fence_async_shared()
        gl.warp_specialize(
            [
                (consumer, (a, call, rule, D, KEYS, SLOTS, AHEAD, UNITS, W, BIAS, 0)),
                (consumer, (a, call, rule, D, KEYS, SLOTS, AHEAD, UNITS, W, BIAS, 1)),
                (producer, (a, maps, lists, sizes, rule, TICKET, D, KEYS, SLOTS, AHEAD, UNITS, STREAMS, W, BIAS, 0)),
            ],
            [4, 1],
            [R, PRODUCER],
        )
    else:
        b = _stream(q_tma, k_tma, KEYS, D, SLOTS, AHEAD, UNITS, W, BIAS)
        c = _stream(q_tma, k_tma, KEYS, D, SLOTS, AHEAD, UNITS, W, BIAS)
        fence_async_shared()
        gl.warp_specialize(
            [
                (consumer, (a, call, rule, D, KEYS, SLOTS, AHEAD, UNITS, W, BIAS, 0)),
                (consumer, (b, call, rule, D, KEYS, SLOTS, AHEAD, UNITS, W, BIAS, 0)),
                (consumer, (c, call, rule, D, KEYS, SLOTS, AHEAD, UNITS, W, BIAS, 0)),
                (producer, (a, maps, lists, sizes, rule, TICKET, D, KEYS, SLOTS, AHEAD, UNITS, STREAMS, W, BIAS, 0)),
                (producer, (b, maps, lists, sizes, rule, TICKET, D, KEYS, SLOTS, AHEAD, UNITS, STREAMS, W, BIAS, 1)),
                (producer, (c, maps, lists, sizes, rule, TICKET, D, KEYS, SLOTS, AHEAD, UNITS, STREAMS, W, BIAS, 2)),
            ],
            [4, 4, 1, 1, 1],
            [R, R, PRODUCER, PRODUCER, PRODUCER],
        )
