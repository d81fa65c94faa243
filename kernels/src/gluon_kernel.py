"""The Gluon program of `gluon.py`, in a file of its own because importing it needs Triton 3.6 to 3.8.

Partitions run side by side on one processor of the GPU. The producer, a warp group of its own, draws tiles of queries and
fills two rings, of keys and of values, by TMA. Two to four consumers, warp groups of 64 queries each, share what it brings:
while the tensor cores multiply the scores of the next tile of keys, a consumer adds the values of the last one.
Barriers come in pairs: `ready` (the producer has filled a slot) and `free` (the consumers have read it).
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Triton 3.9 gave it its other name.
_fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

# Queries of one consumer: what a warp group multiplies at once.
ROWS = gl.constexpr(64)
# Slots of the rings of tiles and of queries: the next tile is fetched while this one is worked on.
AHEAD = gl.constexpr(2)
# A finite floor in place of -inf: rows and tiles without any key need no care, exp2(-inf - floor) is 0.
FLOOR = gl.constexpr(-1.0e30)
LOG2E = gl.constexpr(1.4426950408889634)


# Where the block's number begins in an entry of a joined list (see `joined.py`).
SHIFT = gl.constexpr(8)


@gluon.jit
def _list(
    PTR,
    N_FULL,
    COUNT,
    head,
    i,
    q_blocks,
    row_stride,
    count_stride,
    spread,
    CONSUMERS: gl.constexpr,
    SHARE: gl.constexpr,
):
    """Where the list of a tile of queries begins, how long it is, how many of its blocks are full."""
    if CONSUMERS > SHARE:
        first = gl.load(PTR + head * row_stride + i * CONSUMERS // SHARE) + (i & 1) * spread
        n = gl.load(COUNT + head * count_stride + i)
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
def _fact(facts, which: gl.constexpr):
    """One of the four numbers that the producer tells of a tile."""
    at = gl.arange(0, 4, gl.BlockedLayout([1], [32], [4], [0]))
    return gl.sum(gl.where(at == which, facts, 0), 0)


@gluon.jit
def producer(
    maps,
    shared,
    rows,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    SHARE: gl.constexpr,
    PERSISTENT: gl.constexpr,
):
    """Fetch queries, keys and values of tile after tile."""
    q_tma, k_tma, v_tma = maps
    TICKET, PTR, IDX, N_FULL, COUNT, total, q_tiles, text_tiles, heads, q_blocks, row_stride, count_stride, spread = (
        rows
    )
    q_s, k_s, v_s, facts_s, q_ready, q_free, k_ready, k_free, v_ready, v_free, facts_ready, facts_free = shared
    L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    at = gl.arange(0, 4, L)
    ticket = gl.program_id(0)
    done = 0
    step = 0
    while ticket < total:
        line, i = _tile(ticket, total // q_tiles, q_tiles, text_tiles)
        head = line % heads
        sample = line // heads
        first, n, full = _list(
            PTR, N_FULL, COUNT, head, i, q_blocks, row_stride, count_stride, spread, CONSUMERS, SHARE
        )
        if PERSISTENT:
            ticket = gl.num_programs(0) + gl.atomic_add(TICKET, 1)
        else:
            ticket = total
        slot = done % AHEAD
        phase = (done // AHEAD & 1) ^ 1
        mbarrier.wait(facts_free.index(slot), phase)
        facts = gl.where(at == 0, line * q_tiles + i, gl.where(at == 1, first, gl.where(at == 2, n, full)))
        facts_s.index(slot).store(facts)
        mbarrier.arrive(facts_ready.index(slot), count=1)
        for w in gl.static_range(CONSUMERS):
            at_q = slot * CONSUMERS + w
            mbarrier.wait(q_free.index(at_q), phase)
            mbarrier.expect(q_ready.index(at_q), q_tma.block_type.nbytes)
            start = i * (ROWS * CONSUMERS) + w * ROWS
            _fetch(q_tma, [sample, head, start, 0], q_ready.index(at_q), q_s.index(at_q))
        for place in range(first, first + n):
            block = gl.load(IDX + place)
            if CONSUMERS > SHARE:
                block = block >> SHIFT
            ring = step % STAGES
            turn = (step // STAGES & 1) ^ 1
            mbarrier.wait(k_free.index(ring), turn)
            mbarrier.expect(k_ready.index(ring), k_tma.block_type.nbytes)
            _fetch(k_tma, [sample, head, block * KEYS, 0], k_ready.index(ring), k_s.index(ring))
            mbarrier.wait(v_free.index(ring), turn)
            mbarrier.expect(v_ready.index(ring), v_tma.block_type.nbytes)
            _fetch(v_tma, [sample, head, block * KEYS, 0], v_ready.index(ring), v_s.index(ring))
            step += 1
        done += 1
    slot = done % AHEAD
    mbarrier.wait(facts_free.index(slot), (done // AHEAD & 1) ^ 1)
    facts_s.index(slot).store(gl.where(at == 0, total, at * 0))
    mbarrier.arrive(facts_ready.index(slot), count=1)


@gluon.jit
def _word(IDX, first, place, n):
    """The entry at a place of a list, or the last one beyond its end: it is loaded before anybody knows of the end."""
    return gl.load(IDX + first + gl.minimum(place, n - 1))


@gluon.jit
def _kind(word, place, full, own, JOINED: gl.constexpr):
    """0: this consumer does not keep the block, 1: it is decided token by token, 2: it keeps it whole."""
    if JOINED:
        kind = (word >> (2 * own)) & 3
    else:
        kind = gl.where(place < full, 2, 1)
    return kind


@gluon.jit
def _block(word, JOINED: gl.constexpr):
    block = word
    if JOINED:
        block = word >> SHIFT
    return block


@gluon.jit
def _drop(s, start, length, kind, query, queries, keys, LO, HI, POS, AXES: gl.constexpr, KEYS: gl.constexpr):
    """Scores of a short or partial tile, with -inf for what is not kept."""
    C_L: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    key = gl.arange(0, KEYS, C_L)
    s = gl.where(gl.expand_dims(key < length, 0), s, float("-inf"))
    if AXES > 0:
        if kind == 1:
            # Not unrolled: one axis at a time is what the registers hold.
            for axis in range(AXES):
                pos = gl.expand_dims(gl.load(POS + axis * keys + start + key), 0)
                lo = gl.expand_dims(gl.load(LO + axis * queries + query), 1)
                hi = gl.expand_dims(gl.load(HI + axis * queries + query), 1)
                s = gl.where((lo <= pos) & (pos < hi), s, float("-inf"))
    return s


@gluon.jit
def _clear(v, length, KEYS: gl.constexpr, D: gl.constexpr):
    """Zero the values behind the last key of a short tile: whatever stood there, times 0, must be 0."""
    PART: gl.constexpr = 16
    L: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16] if D == 128 else [4, 8], [4, 1], [1, 0])
    for part in gl.static_range(KEYS // PART):
        if (part + 1) * PART > length:
            piece = v.slice(part * PART, PART)
            row = part * PART + gl.arange(0, PART, gl.SliceLayout(1, L))
            kept = piece.load(L)
            piece.store(gl.where(gl.expand_dims(row < length, 1), kept, gl.zeros_like(kept)))
    fence_async_shared()


# Powers of two of four numbers: three by the special function unit, which is what head dim 64 waits for, one by the
# arithmetic units: 2^x = 2^round(x) * p(x - round(x)), p of degree 3, relative error 7.5e-5 (bf16 rounds by 2e-3).
EXP2 = gl.constexpr(
    """
{
    .reg .f32 x, n, r, p;
    .reg .b32 i, j;
    ex2.approx.ftz.f32 $0, $4;
    ex2.approx.ftz.f32 $1, $5;
    ex2.approx.ftz.f32 $2, $6;
    max.f32 x, $7, 0fC2FC0000;
    add.f32 n, x, 0f4B400000;
    sub.f32 r, n, 0f4B400000;
    sub.f32 r, x, r;
    fma.rn.f32 p, r, 0f3D61FBB1, 0f3E786F0E;
    fma.rn.f32 p, p, r, 0f3F31798D;
    fma.rn.f32 p, p, r, 0f3F7FFB49;
    mov.b32 i, n;
    shl.b32 i, i, 23;
    mov.b32 j, p;
    add.s32 j, i, j;
    mov.b32 $3, j;
}
"""
)


@gluon.jit
def _softmax(s, m, mass, factor, POLYNOMIAL: gl.constexpr):
    """One step of the online softmax in base 2: weights, maximum, mass, and by how much the past shrinks."""
    m_new = gl.maximum(m, gl.max(s, 1) * factor)
    x = s * factor - gl.expand_dims(m_new, 1)
    if POLYNOMIAL:
        p = gl.inline_asm_elementwise(EXP2, "=f,=f,=f,=f,f,f,f,f", [x], gl.float32, True, 4)
    else:
        p = gl.exp2(x)
    shrink = gl.exp2(m - m_new)
    return p, m_new, mass * shrink + gl.sum(p, 1), shrink


@gluon.jit
def consumer(
    OUT,
    LSE,
    shared,
    given,
    strides,
    KEYS: gl.constexpr,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    SHARE: gl.constexpr,
    AXES: gl.constexpr,
    BIAS: gl.constexpr,
    POLYNOMIAL: gl.constexpr,
    W: gl.constexpr,
):
    """Attend with 64 queries of each tile."""
    IDX, Q_LEN, K_LEN, LO, HI, POS, KEY_BIAS, scale, total, q_tiles, heads, q_blocks, lq, lk, k_len_stride = given
    out_b, out_l, out_h, bias_b, bias_h = strides
    q_s, k_s, v_s, facts_s, q_ready, q_free, k_ready, k_free, v_ready, v_free, facts_ready, facts_free = shared
    JOINED: gl.constexpr = CONSUMERS > SHARE
    DT: gl.constexpr = k_s.dtype
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, O_L, 2)
    R_L: gl.constexpr = gl.SliceLayout(1, S_L)
    RO_L: gl.constexpr = gl.SliceLayout(1, O_L)
    # With a bias the logits are spelled out; without one, the scale is folded into the exponent.
    factor = 1.0 if BIAS else scale
    # Padded lengths of the window's tables.
    queries = q_tiles * (ROWS * CONSUMERS)
    keys = (lk + KEYS - 1) // KEYS * KEYS
    done = 0
    step = 0
    mbarrier.wait(facts_ready.index(0), 0)
    facts = facts_s.index(0).load(gl.BlockedLayout([1], [32], [4], [0]))
    tile = _fact(facts, 0)
    while tile < total:
        first, n, full = _fact(facts, 1), _fact(facts, 2), _fact(facts, 3)
        slot = done % AHEAD
        mbarrier.arrive(facts_free.index(slot), count=1)
        i = tile % q_tiles
        head = tile // q_tiles % heads
        sample = tile // q_tiles // heads
        start_q = i * (ROWS * CONSUMERS) + W * ROWS
        # The row of the mask that these queries belong to, counted from the first of this tile, and where they begin in it.
        row = (i * CONSUMERS + W) // SHARE
        own = row - i * CONSUMERS // SHARE
        n_query = gl.load(Q_LEN + gl.minimum(row, q_blocks - 1)) - (i * CONSUMERS + W) % SHARE * ROWS
        n_query = gl.where(row < q_blocks, n_query, 0)
        # One past the last query; holes of this tile lie behind it.
        n_query = start_q + gl.minimum(gl.minimum(n_query, ROWS), lq - start_q)
        query = start_q + gl.arange(0, ROWS, R_L)
        bias = KEY_BIAS + sample.to(gl.int64) * bias_b + head.to(gl.int64) * bias_h
        lengths = K_LEN + sample * k_len_stride
        at_q = slot * CONSUMERS + W
        q = q_s.index(at_q).reshape([ROWS, D])

        m = gl.full([ROWS], FLOOR, gl.float32, R_L)
        mass = gl.zeros([ROWS], gl.float32, R_L)
        acc = gl.zeros([ROWS, D], gl.float32, O_L)
        mbarrier.wait(q_ready.index(at_q), done // AHEAD & 1)
        place = 0
        word = 0
        ahead = 0
        length = 0
        if n > 0:
            word = _word(IDX, first, 0, n)
            ahead = _word(IDX, first, 1, n)
            length = gl.load(lengths + _block(word, JOINED))
        kind = _kind(word, 0, full, own, JOINED)
        while place < n:
            if JOINED and kind == 0:
                # Only neighbours keep this block: let it pass.
                ring = step % STAGES
                turn = step // STAGES & 1
                mbarrier.wait(k_ready.index(ring), turn)
                mbarrier.arrive(k_free.index(ring), count=1)
                mbarrier.wait(v_ready.index(ring), turn)
                mbarrier.arrive(v_free.index(ring), count=1)
                step += 1
                place += 1
                word = ahead
                ahead = _word(IDX, first, place + 1, n)
                length = gl.load(lengths + _block(word, JOINED))
                kind = _kind(word, place, full, own, JOINED)
            else:
                ring = step % STAGES
                mbarrier.wait(k_ready.index(ring), step // STAGES & 1)
                k = k_s.index(ring).reshape([KEYS, D]).permute((1, 0))
                running = warpgroup_mma(q, k, gl.zeros([ROWS, KEYS], gl.float32, S_L), use_acc=False, is_async=True)
                s = warpgroup_mma_wait(0, deps=(running,))
                mbarrier.arrive(k_free.index(ring), count=1)
                start = _block(word, JOINED) * KEYS
                short = gl.minimum(length, lk - start)
                if BIAS:
                    s = _biased(s, bias, start, short, scale, KEYS)
                if short < KEYS or (AXES > 0 and kind == 1):
                    s = _drop(s, start, short, kind, query, queries, keys, LO, HI, POS, AXES, KEYS)
                p, m, mass, shrink = _softmax(s, m, mass, factor, POLYNOMIAL)
                acc = acc * gl.expand_dims(gl.convert_layout(shrink, RO_L), 1)
                weights = gl.convert_layout(p.to(DT), P_L)
                place += 1
                word = ahead
                ahead = _word(IDX, first, place + 1, n)
                length = gl.load(lengths + _block(word, JOINED))
                kind = _kind(word, place, full, own, JOINED)
                while place < n and kind != 0:
                    ring = (step + 1) % STAGES
                    last = step % STAGES
                    mbarrier.wait(k_ready.index(ring), (step + 1) // STAGES & 1)
                    k = k_s.index(ring).reshape([KEYS, D]).permute((1, 0))
                    running = warpgroup_mma(q, k, gl.zeros([ROWS, KEYS], gl.float32, S_L), use_acc=False, is_async=True)
                    mbarrier.wait(v_ready.index(last), step // STAGES & 1)
                    v = v_s.index(last).reshape([KEYS, D])
                    if short < KEYS:
                        _clear(v, short, KEYS, D)
                    adding = warpgroup_mma(weights, v, acc, is_async=True)
                    s = warpgroup_mma_wait(1, deps=(running,))
                    mbarrier.arrive(k_free.index(ring), count=1)
                    start = _block(word, JOINED) * KEYS
                    short = gl.minimum(length, lk - start)
                    if BIAS:
                        s = _biased(s, bias, start, short, scale, KEYS)
                    if short < KEYS or (AXES > 0 and kind == 1):
                        s = _drop(s, start, short, kind, query, queries, keys, LO, HI, POS, AXES, KEYS)
                    p, m, mass, shrink = _softmax(s, m, mass, factor, POLYNOMIAL)
                    acc = warpgroup_mma_wait(0, deps=(adding,))
                    mbarrier.arrive(v_free.index(last), count=1)
                    acc = acc * gl.expand_dims(gl.convert_layout(shrink, RO_L), 1)
                    weights = gl.convert_layout(p.to(DT), P_L)
                    step += 1
                    place += 1
                    word = ahead
                    ahead = _word(IDX, first, place + 1, n)
                    length = gl.load(lengths + _block(word, JOINED))
                    kind = _kind(word, place, full, own, JOINED)
                last = step % STAGES
                mbarrier.wait(v_ready.index(last), step // STAGES & 1)
                v = v_s.index(last).reshape([KEYS, D])
                if short < KEYS:
                    _clear(v, short, KEYS, D)
                adding = warpgroup_mma(weights, v, acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(adding,))
                mbarrier.arrive(v_free.index(last), count=1)
                step += 1
        mbarrier.arrive(q_free.index(at_q), count=1)

        # A row that kept no key at all never left the floor.
        nothing = (m == FLOOR) | (query >= n_query)
        over = gl.where(nothing, 0.0, 1.0 / gl.where(nothing, 1.0, mass))
        lse = gl.where(nothing, float("-inf"), (m + gl.log2(gl.where(nothing, 1.0, mass))) * 0.6931471805599453)
        line = (sample * heads + head).to(gl.int64) * lq
        gl.store(LSE + line + query, lse, mask=query < lq)
        # NaN times 0 is NaN, so what a hole holds is selected away.
        keep = gl.expand_dims(gl.convert_layout(nothing, RO_L), 1)
        out = gl.where(keep, 0.0, acc * gl.expand_dims(gl.convert_layout(over, RO_L), 1))
        slot_q = start_q + gl.arange(0, ROWS, RO_L)
        channel = gl.arange(0, D, gl.SliceLayout(0, O_L))
        base = OUT + sample.to(gl.int64) * out_b + head.to(gl.int64) * out_h
        place_out = gl.expand_dims(slot_q.to(gl.int64) * out_l, 1) + gl.expand_dims(channel, 0)
        gl.store(base + place_out, out.to(DT), mask=gl.expand_dims(slot_q < lq, 1))

        done += 1
        slot = done % AHEAD
        mbarrier.wait(facts_ready.index(slot), done // AHEAD & 1)
        facts = facts_s.index(slot).load(gl.BlockedLayout([1], [32], [4], [0]))
        tile = _fact(facts, 0)


@gluon.jit
def _biased(s, bias, start, length, scale, KEYS: gl.constexpr):
    """Logits in base 2, with the bias of each key."""
    key = gl.arange(0, KEYS, gl.SliceLayout(0, s.type.layout))
    if length < KEYS:
        more = gl.load(bias + start + key, mask=key < length, other=0.0)
    else:
        more = gl.load(bias + start + key)
    return s * scale + gl.expand_dims(more * LOG2E, 0)


@gluon.jit(
    do_not_specialize=[
        "total", "q_tiles", "text_tiles", "heads", "q_blocks", "row_stride", "count_stride", "spread", "lq", "lk", "bias_b",
        "bias_h", "k_len_stride",
    ]
)  # fmt: skip
def block_sparse(
    q_tma,
    k_tma,
    v_tma,
    OUT,
    LSE,
    TICKET,
    PTR,
    IDX,
    N_FULL,
    COUNT,
    Q_LEN,
    K_LEN,
    LO,
    HI,
    POS,
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
    out_b,
    out_l,
    out_h,
    bias_b,
    bias_h,
    k_len_stride,
    D: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    SHARE: gl.constexpr,
    PERSISTENT: gl.constexpr,
    AXES: gl.constexpr,
    BIAS: gl.constexpr,
    POLYNOMIAL: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """See `gluon.py`."""
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_s = gl.allocate_shared_memory(q_tma.dtype, [AHEAD * CONSUMERS, 1, 1, ROWS, D], q_tma.layout)
    k_s = gl.allocate_shared_memory(k_tma.dtype, [STAGES, 1, 1, KEYS, D], k_tma.layout)
    v_s = gl.allocate_shared_memory(v_tma.dtype, [STAGES, 1, 1, KEYS, D], v_tma.layout)
    facts_s = gl.allocate_shared_memory(gl.int32, [AHEAD, 4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
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
        mbarrier.init(k_ready.index(n), count=1)
        mbarrier.init(k_free.index(n), count=CONSUMERS)
        mbarrier.init(v_ready.index(n), count=1)
        mbarrier.init(v_free.index(n), count=CONSUMERS)
    for n in gl.static_range(AHEAD):
        mbarrier.init(facts_ready.index(n), count=1)
        mbarrier.init(facts_free.index(n), count=CONSUMERS)
    fence_async_shared()
    shared = (
        q_s, k_s, v_s, facts_s, q_ready, q_free, k_ready, k_free, v_ready, v_free, facts_ready, facts_free
    )  # fmt: skip
    maps = (q_tma, k_tma, v_tma)
    rows = (
        TICKET,
        PTR,
        IDX,
        N_FULL,
        COUNT,
        total,
        q_tiles,
        text_tiles,
        heads,
        q_blocks,
        row_stride,
        count_stride,
        spread,
    )
    given = (IDX, Q_LEN, K_LEN, LO, HI, POS, KEY_BIAS, scale, total, q_tiles, heads, q_blocks, lq, lk, k_len_stride)
    strides = (out_b, out_l, out_h, bias_b, bias_h)
    R: gl.constexpr = REGISTERS
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (producer, (maps, shared, rows, KEYS, STAGES, CONSUMERS, SHARE, PERSISTENT)),
                (
                    consumer,
                    (OUT, LSE, shared, given, strides, KEYS, D, STAGES, CONSUMERS, SHARE, AXES, BIAS, POLYNOMIAL, 0),
                ),
                (
                    consumer,
                    (OUT, LSE, shared, given, strides, KEYS, D, STAGES, CONSUMERS, SHARE, AXES, BIAS, POLYNOMIAL, 1),
                ),
            ],
            [4, 4],
            [R, R],
        )
    elif CONSUMERS == 3:
        gl.warp_specialize(
            [
                (producer, (maps, shared, rows, KEYS, STAGES, CONSUMERS, SHARE, PERSISTENT)),
                (
                    consumer,
                    (OUT, LSE, shared, given, strides, KEYS, D, STAGES, CONSUMERS, SHARE, AXES, BIAS, POLYNOMIAL, 0),
                ),
                (
                    consumer,
                    (OUT, LSE, shared, given, strides, KEYS, D, STAGES, CONSUMERS, SHARE, AXES, BIAS, POLYNOMIAL, 1),
                ),
                (
                    consumer,
                    (OUT, LSE, shared, given, strides, KEYS, D, STAGES, CONSUMERS, SHARE, AXES, BIAS, POLYNOMIAL, 2),
                ),
            ],
            [4, 4, 4],
            [R, R, R],
        )
    else:
        gl.warp_specialize(
            [
                (producer, (maps, shared, rows, KEYS, STAGES, CONSUMERS, SHARE, PERSISTENT)),
                (
                    consumer,
                    (OUT, LSE, shared, given, strides, KEYS, D, STAGES, CONSUMERS, SHARE, AXES, BIAS, POLYNOMIAL, 0),
                ),
                (
                    consumer,
                    (OUT, LSE, shared, given, strides, KEYS, D, STAGES, CONSUMERS, SHARE, AXES, BIAS, POLYNOMIAL, 1),
                ),
                (
                    consumer,
                    (OUT, LSE, shared, given, strides, KEYS, D, STAGES, CONSUMERS, SHARE, AXES, BIAS, POLYNOMIAL, 2),
                ),
                (
                    consumer,
                    (OUT, LSE, shared, given, strides, KEYS, D, STAGES, CONSUMERS, SHARE, AXES, BIAS, POLYNOMIAL, 3),
                ),
            ],
            [4, 4, 4, 4],
            [R, R, R, R],
        )
