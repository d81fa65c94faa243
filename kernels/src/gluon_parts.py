"""What the consumers of the Gluon kernel share: facts of a tile, masks, the online softmax, the last write."""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

# Triton 3.9 gave it its other name.
_send = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
# Queries of one consumer: what a warp group multiplies at once.
ROWS = gl.constexpr(64)
# Slots of the rings of facts and of queries: the next tile is fetched while this one is worked on.
AHEAD = gl.constexpr(2)
# A finite floor in place of -inf: rows and tiles without any key need no care, exp2(-inf - floor) is 0.
FLOOR = gl.constexpr(-1.0e30)
LOG2E = gl.constexpr(1.4426950408889634)
# Where the block's number begins in an entry of a joined list (see `joined.py`).
SHIFT = gl.constexpr(8)
# What the producer tells of a tile of queries: its number, how long its list is, how many of its blocks are full.
FACTS = gl.constexpr(3)
TILE, COUNT, FULL = (gl.constexpr(n) for n in range(3))
# What it tells of a tile of keys: its entry in the list, and how many tokens it holds.
ENTRIES = gl.constexpr(2)


@gluon.jit
def tell(facts_s, at, value):
    """Write one fact; the producer is one warp."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    facts_s.index(at).store(gl.zeros([1], gl.int32, L) + value)


@gluon.jit
def _fact(facts_s, at):
    """Read one fact."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.sum(facts_s.index(at).load(L), 0)


@gluon.jit
def facts_of(facts_s, facts_ready, done):
    """Wait for the facts of tile of queries number `done` of this program, and read them."""
    slot = done % AHEAD
    mbarrier.wait(facts_ready.index(slot), done // AHEAD & 1)
    at = slot * FACTS
    return _fact(facts_s, at + TILE), _fact(facts_s, at + COUNT), _fact(facts_s, at + FULL)


@gluon.jit
def entry_of(entries_s, k_ready, step, STAGES: gl.constexpr):
    """Wait for tile of keys number `step` of this program, and read what it is."""
    ring = step % STAGES
    mbarrier.wait(k_ready.index(ring), step // STAGES & 1)
    return _fact(entries_s, ring * ENTRIES), _fact(entries_s, ring * ENTRIES + 1)


@gluon.jit
def place_of(tile, q_tiles, heads):
    """Sample, head, and number within the head, of a tile."""
    line = tile // q_tiles
    return line // heads, line % heads, tile % q_tiles


@gluon.jit
def scores(
    s,
    block,
    length,
    kind,
    query,
    bias,
    scale,
    queries,
    keys,
    LO,
    HI,
    POS,
    AXES: gl.constexpr,
    BIAS: gl.constexpr,
    KEYS: gl.constexpr,
):
    """Scores of a tile of keys, with its bias; -inf for keys behind its end and pairs beyond the window."""
    key = gl.arange(0, KEYS, gl.SliceLayout(0, s.type.layout))
    if BIAS:
        if length < KEYS:
            more = gl.load(bias + block * KEYS + key, mask=key < length, other=0.0)
        else:
            more = gl.load(bias + block * KEYS + key)
        s = s * scale + gl.expand_dims(more * LOG2E, 0)
    if length < KEYS:
        s = gl.where(gl.expand_dims(key < length, 0), s, float("-inf"))
    if AXES > 0:
        if kind == 1:
            # Not unrolled: one axis at a time is what the registers hold.
            for axis in range(AXES):
                pos = gl.expand_dims(gl.load(POS + axis * keys + block * KEYS + key), 0)
                lo = gl.expand_dims(gl.load(LO + axis * queries + query), 1)
                hi = gl.expand_dims(gl.load(HI + axis * queries + query), 1)
                s = gl.where((lo <= pos) & (pos < hi), s, float("-inf"))
    return s


@gluon.jit
def clear(v, length, KEYS: gl.constexpr, D: gl.constexpr):
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


# Powers of two of four numbers: three by the special function unit, one by the arithmetic units:
# 2^x = 2^round(x) * p(x - round(x)), p of degree 3, relative error 7.5e-5 (bf16 rounds by 2e-3).
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
def softmax(s, m, mass, factor, POLYNOMIAL: gl.constexpr):
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
def write(
    out_tma,
    LSE,
    Q_LEN,
    acc,
    m,
    mass,
    tile,
    q,
    given,
    W: gl.constexpr,
    D: gl.constexpr,
    CONSUMERS: gl.constexpr,
    SHARE: gl.constexpr,
    DT: gl.constexpr,
):
    """Divide by the mass, and store 64 rows and their LSE: 0 and -inf for holes and for rows that keep nothing.

    The rows leave by TMA, from the slot that held their queries: `sent` says when it is free again.
    """
    q_tiles, heads, q_blocks, lq = given
    R_L: gl.constexpr = m.type.layout
    O_L: gl.constexpr = acc.type.layout
    RO_L: gl.constexpr = gl.SliceLayout(1, O_L)
    sample, head, i = place_of(tile, q_tiles, heads)
    start = (i * CONSUMERS + W) * ROWS
    row = (i * CONSUMERS + W) // SHARE
    tokens = gl.load(Q_LEN + gl.minimum(row, q_blocks - 1)) - (i * CONSUMERS + W) % SHARE * ROWS
    tokens = gl.where(row < q_blocks, tokens, 0)
    query = gl.arange(0, ROWS, R_L)
    # A row that kept no key at all never left the floor.
    nothing = (m == FLOOR) | (query >= tokens)
    over = gl.where(nothing, 0.0, 1.0 / gl.where(nothing, 1.0, mass))
    # NaN times 0 is NaN, so what a hole holds is selected away.
    keep = gl.expand_dims(gl.convert_layout(nothing, RO_L), 1)
    out = gl.where(keep, 0.0, acc * gl.expand_dims(gl.convert_layout(over, RO_L), 1))
    q.reshape([ROWS, D]).store(out.to(DT))
    fence_async_shared()
    _send(out_tma, [sample, head, start, 0], q)
    lse = gl.where(nothing, float("-inf"), (m + gl.log2(gl.where(nothing, 1.0, mass))) * 0.6931471805599453)
    line = (sample * heads + head).to(gl.int64) * lq + start
    gl.store(LSE + line + query, lse, mask=start + query < lq)


@gluon.jit
def sent():
    """Wait until what was written last has left its slot."""
    tma.store_wait(0)
