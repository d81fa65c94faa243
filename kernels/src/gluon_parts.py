"""What the consumer of the Gluon kernel is made of: facts of a row, masks, the online softmax, the last write.

What a GPU at its power limit pays for is work, so the softmax does little of it: the sum of a row is kept in four
parts, one for each thread that holds some of its keys, and added up when the row ends; and what was added up so far
shrinks only where the maximum has grown much (FlashAttention-4's conditional rescaling).
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

# Triton 3.9 gave it its other name.
_send = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
# Queries of one consumer: what a warp group multiplies at once.
ROWS = gl.constexpr(64)
# A finite floor in place of -inf: rows and tiles without any key need no care, exp2(-inf - floor) is 0.
FLOOR = gl.constexpr(-1.0e30)
# What the producer tells of a row: whose it is, its first query, how many tokens follow there before a hole, how long
# its list is (-1: there are no more rows), how many of its blocks are full.
FACTS = gl.constexpr(6)
SAMPLE, HEAD, START, TOKENS, COUNT, FULL = (gl.constexpr(n) for n in range(6))


@gluon.jit
def _fact(facts_s, at):
    """Read one fact."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.sum(facts_s.index(at).load(L), 0)


@gluon.jit
def length_of(facts_s, facts_ready, done, AHEAD: gl.constexpr):
    """Wait for the facts of the row that is number `done` of this stream, and read how long its list is."""
    at = done % AHEAD
    mbarrier.wait(facts_ready.index(at), done // AHEAD & 1)
    return _fact(facts_s, at * FACTS + COUNT)


@gluon.jit
def facts_of(facts_s, at, UNIT: gl.constexpr):
    """The other facts, of the queries of one consumer."""
    facts = at * FACTS
    start = _fact(facts_s, facts + START) + UNIT * ROWS
    tokens = _fact(facts_s, facts + TOKENS) - UNIT * ROWS
    return _fact(facts_s, facts + SAMPLE), _fact(facts_s, facts + HEAD), start, tokens, _fact(facts_s, facts + FULL)


@gluon.jit
def tokens_of(lengths_s, ready, number, SLOTS: gl.constexpr):
    """Wait for tile `number` of this stream, which holds keys, and read how many."""
    slot = number % SLOTS
    mbarrier.wait(ready.index(slot), number // SLOTS & 1)
    return _fact(lengths_s, slot)


@gluon.jit
def scores_begun(q, k, bias, KEYS: gl.constexpr, S_L: gl.constexpr, BIAS: gl.constexpr):
    """Begin to multiply queries and keys; a bias, in units of their product, is what the tensor cores add to."""
    start = gl.zeros([ROWS, KEYS], gl.float32, S_L)
    if BIAS:
        start, _ = gl.broadcast(gl.expand_dims(bias.load(gl.SliceLayout(0, S_L)), 0), start)
    return warpgroup_mma(q, k, start, use_acc=BIAS, is_async=True)


@gluon.jit
def interval(LO, HI, query, lq, WINDOW: gl.constexpr):
    """The words of what queries keep, which serve all tiles of keys; both the same where there is only one."""
    if WINDOW == 2:
        return gl.load(LO + query, mask=query < lq, other=0), gl.load(HI + query, mask=query < lq, other=0)
    elif WINDOW:
        lo = gl.load(LO + query, mask=query < lq, other=0)
        return lo, lo
    else:
        return query, query


def _ending(n: int) -> tuple[str, str]:
    """PTX and its constraints: n scores of a thread, those behind the end of the tile -inf.

    A thread holds two keys of every eight, for two queries in turn. Most tiles end nowhere, the others near their end.
    """
    copies = "".join(f"mov.f32 ${i}, ${n + i}; " for i in range(n))
    length = f"${2 * n}"
    code = "mov.u32 c, %laneid; and.b32 c, c, 3; shl.b32 c, c, 1; sub.s32 c, " + length + ", c; "
    for first in range(n - 4, -1, -4):
        code += f"setp.ge.s32 p, {length}, {2 * first + 8}; @p bra DONE; "
        for i in range(4):
            code += f"setp.gt.s32 p, c, {2 * first + i % 2}; selp.f32 ${first + i}, ${first + i}, 0fFF800000, p; "
    return f"{{ .reg .pred p; .reg .s32 c; {copies}{code}DONE: }}", ",".join(["=f"] * n + ["f"] * n + ["r"] * n)


ENDING_64, ENDING_128 = (gl.constexpr(_ending(keys // 2)) for keys in (64, 128))


@gluon.constexpr_function
def words_ahead(SLOTS):
    """Tiles whose words of keys are held. As many go through the ring before one's slot is handed out again.

    Words are read after the product that hands back the slot of their keys; the first ones of a row, whose slot the
    third tile may have, before.
    """
    return SLOTS // 2 + 1


@gluon.jit
def scores(
    s,
    length,
    cut,
    lo,
    hi,
    words,
    guards,
    KEYS: gl.constexpr,
    WINDOW: gl.constexpr,
):
    """Scores of a tile of keys; -inf for keys behind its end and pairs beyond the window."""
    if length < KEYS:
        if KEYS == 128:
            s = gl.inline_asm_elementwise(ENDING_128[0], ENDING_128[1], [s, length], gl.float32, True, 64)
        else:
            s = gl.inline_asm_elementwise(ENDING_64[0], ENDING_64[1], [s, length], gl.float32, True, 32)
    if WINDOW:
        if cut:
            pos = gl.expand_dims(words.load(gl.SliceLayout(0, s.type.layout)), 0)
            guard = guards & ~((guards >> 1) & 0x7FFFFFFF)
            word = pos - gl.expand_dims(lo, 1)
            if WINDOW == 2:
                word &= gl.expand_dims(hi, 1) - pos
            s = gl.where(((word ^ guard) & guards) == 0, s, float("-inf"))
    return s


# By how many powers of two scores may exceed the maximum that weights are relative to: 256 is a number in 16 bits too.
GROWTH = gl.constexpr(8.0)


def _shrinking(n: int) -> tuple[str, str]:
    """PTX and its constraints: n numbers of a thread, each times its row's factor, where any of its warp's is not 1.

    A thread holds two rows, two columns of each in turn, so that factors 0 and 2 are all that it has.
    """
    copies = "".join(f"mov.f32 ${i}, ${n + i}; " for i in range(n))
    products = "".join(f"mul.f32 ${i}, ${i}, ${2 * n + i}; " for i in range(n))
    one = "0f3F800000"
    some = f"setp.neu.f32 p, ${2 * n}, {one}; setp.neu.or.f32 p, ${2 * n + 2}, {one}, p; vote.sync.any.pred q, p, -1; "
    return f"{{ .reg .pred p, q; {copies}{some}@!q bra DONE; {products}DONE: }}", ",".join(["=f"] * n + ["f"] * 2 * n)


SHRINK_64, SHRINK_128 = (gl.constexpr(_shrinking(d // 2)) for d in (64, 128))
# Does nothing, but ptxas cannot know that: what follows stays behind it. It would else move the wait for a product up
# to where that is issued, in front of the softmax that is to run beside it: nothing it looks at depends on their order.
STAY = gl.constexpr("{ .reg .pred n; setp.lt.f32 n, $1, 0f00000000; @n nanosleep.u32 1; mov.f32 $0, $1; }")


@gluon.jit
def no_mass(KEYS: gl.constexpr, S_L: gl.constexpr):
    """The mass of rows that have seen no key, in parts (ROWS, 4)."""
    return _parts(gl.zeros([ROWS, KEYS], gl.float32, S_L))


@gluon.jit
def _parts(p):
    """Sums of what each thread holds of a row."""
    return gl.sum(gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def _most(s, D: gl.constexpr):
    """The largest score of each row. Chains of comparisons are halved where little is multiplied beside them."""
    if D == 64:
        most = gl.max(gl.max(gl.max(s.reshape([s.shape[0], s.shape[1] // 8, 4, 2]), 3), 1), 1)
        return gl.convert_layout(most, gl.SliceLayout(1, s.type.layout))
    else:
        return gl.max(s, 1)


@gluon.jit
def softmax(s, m, mass, factor, D: gl.constexpr):
    """One step of the online softmax in base 2: weights, maximum, mass in parts, and by how much the past shrinks.

    Weights are relative to a maximum that scores may exceed by `GROWTH`.
    """
    m_new = gl.maximum(m, _most(s, D) * factor)
    m_new = gl.where(m_new > m + GROWTH, m_new, m)
    x = s * factor - gl.expand_dims(m_new, 1)
    p = gl.exp2(x)
    shrink = gl.exp2(m - m_new)
    parts = _parts(p)
    same = gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, parts.type.layout)), 1)
    return p, m_new, mass * same + parts, shrink


@gluon.jit
def stay(mass):
    """Keep what follows behind the softmax that made `mass`."""
    return gl.inline_asm_elementwise(STAY, "=f,f", [mass], gl.float32, False, 1)


@gluon.jit
def shrunk(acc, shrink, D: gl.constexpr):
    """What was added up, (ROWS, D), times shrink (ROWS,), which most of the time is 1 for all rows of a warp."""
    factor = gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout)), 1)
    if D == 128:
        return gl.inline_asm_elementwise(SHRINK_128[0], SHRINK_128[1], [acc, factor], gl.float32, True, 64)
    else:
        return gl.inline_asm_elementwise(SHRINK_64[0], SHRINK_64[1], [acc, factor], gl.float32, True, 32)


@gluon.jit
def write(out_tma, LSE, acc, m, mass, q, sample, head, heads, start, tokens, lq, D: gl.constexpr, DT: gl.constexpr):
    """Divide by the mass, and store 64 rows and their LSE: 0 and -inf for holes and for rows that keep nothing.

    The rows leave by TMA, from the slot that held their queries: `sent` says when it is free again.
    """
    R_L: gl.constexpr = m.type.layout
    O_L: gl.constexpr = acc.type.layout
    RO_L: gl.constexpr = gl.SliceLayout(1, O_L)
    query = gl.arange(0, ROWS, R_L)
    mass = gl.convert_layout(gl.sum(mass, 1), R_L)
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
def handed_back(q_free, done, AHEAD: gl.constexpr, UNITS: gl.constexpr, UNIT: gl.constexpr):
    """Hand back the slot that the row before number `done` was written from."""
    if done > 0:
        sent()
        mbarrier.arrive(q_free.index((done - 1) % AHEAD * UNITS + UNIT), count=1)


@gluon.jit
def sent():
    """Wait until what was written last has left its slot."""
    tma.store_wait(0)
