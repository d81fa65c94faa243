"""The gather plan of a block mask: which query tokens attend to which key tokens, as dense index matrices.

It depends on the mask alone, so it is made once and lives as long as the mask does. Blocks that keep the very same keys
become one long query, and queries that keep equally many keys form a group, so nothing is ever padded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..window import inside
from .problem import Rows

# Window decisions of partial blocks are kept up to this size, and made again at every call beyond it.
KEPT_WINDOW_BYTES = 64 * 2**20


class Group(NamedTuple):
    """Rows of equal size. Token numbers are slots, or `slot * h + head` where heads have their own rows.

    Attributes:
        queries: (n, tq) int64, tokens of each row's queries.
        keys: (n, tk) int32, tokens of each row's kept keys.
        full: (n, tk) bool, keys of full blocks; None where all are.
        window: (n, 1, tq, tk) fp32, 0 or -inf; None where not needed or not kept.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    full: torch.Tensor | None
    window: torch.Tensor | None

    def parts(self, most: int) -> Iterator[Group]:
        """Even parts of at most `most` rows."""
        n = self.queries.shape[0]
        size = -(-n // -(-n // max(1, most)))
        for start in range(0, n, size):
            own = slice(start, start + size)
            full = None if self.full is None else self.full[own]
            window = None if self.window is None else self.window[own]
            yield Group(self.queries[own], self.keys[own], full, window)


class Plan(NamedTuple):
    """All rows of a mask that keep something.

    Attributes:
        queries: (all queries,) int64, those of each group one after another.
        groups: the same, cut up.
    """

    queries: torch.Tensor
    groups: list[Group]


class _Made(NamedTuple):
    source: tuple[torch.Tensor, ...]
    sizes: tuple[int, ...]
    plan: Plan


# A plan is found by its mask's `idx` and dies with it. Contents are compared too, as a mask may be written in place.
_made: WeakIdKeyDictionary = WeakIdKeyDictionary()
_MADE_OF_ONE_MASK = 4


def plan(rows: Rows, heads: int, lq: int, lk: int) -> Plan:
    """The plan, made or remembered, of a mask whose `k_len` is one-dimensional, over `lq` and `lk` slots."""
    source = tuple(x for x in rows[:-1] if isinstance(x, torch.Tensor))
    sizes = (heads, lq, lk, rows.block, rows.guards)
    known: list[_Made] = _made.setdefault(rows.idx, [])
    for made in known:
        if made.sizes == sizes and _same(made.source, source):
            return made.plan
    # Somebody's default may be another device.
    with torch.device("cpu"):
        made = _Made(tuple(x.clone() for x in source), sizes, _make(rows, heads, lq, lk))
    known[:] = [made, *known[: _MADE_OF_ONE_MASK - 1]]
    return made.plan


def _same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def window_bias(rows: Rows, group: Group, heads: int) -> torch.Tensor:
    """(n, 1, tq, tk) fp32: 0 where the query keeps the key, -inf elsewhere."""
    assert group.full is not None
    assert rows.lo is not None
    assert rows.pos is not None
    together = heads if rows.heads > 1 else 1
    query, key = group.queries // together, group.keys.long() // together
    hi = None if rows.hi is None else rows.hi[query][..., None]
    keep = inside(rows.lo[query][..., None], hi, rows.pos[key][:, None], rows.guards)
    keep = keep | group.full[:, None]
    return torch.where(keep, 0.0, -torch.inf)[:, None]


def _make(rows: Rows, heads: int, lq: int, lk: int) -> Plan:
    block, n = rows.block, rows.n_full.shape[0]
    stride = heads if rows.heads > 1 else 1
    q_len, k_len = _clip(rows.q_len, lq, block), _clip(rows.k_len, lk, block)
    number = torch.arange(n)
    head, q_block = number // rows.q_blocks, number % rows.q_blocks
    owner = number.repeat_interleave(rows.ptr.diff())
    kept = rows.idx[: len(owner)].long()
    keys_of = torch.zeros(n, dtype=torch.int64).index_add_(0, owner, k_len[kept])
    partial = rows.n_full < rows.ptr.diff()

    # Rows with the same keys get the same random code: 64 bits a key block, added up, are never equal by accident.
    word = torch.randint(-(2**63), 2**63 - 1, (rows.k_blocks,), generator=torch.Generator().manual_seed(0))
    code = torch.zeros(n, dtype=torch.int64).index_add_(0, owner, word[kept]) * stride + head
    code = torch.where(partial, -1 - number, code)
    active = ((q_len[q_block] > 0) & (keys_of > 0)).nonzero()[:, 0]
    if not len(active):
        return Plan(active, [])
    joined = torch.full((n,), -1)
    joined[active] = code[active].unique(return_inverse=True)[1]
    members = active[joined[active].argsort(stable=True)]
    first = torch.ones(len(members), dtype=torch.bool)
    first[1:] = joined[members].diff() != 0
    leaders = members[first]

    queries, tq = _tokens(q_block[members], q_len, head[members], stride, block, joined[members])
    lead = torch.zeros(n, dtype=torch.bool).index_fill_(0, leaders, True)[owner]
    order = joined[owner[lead]].argsort(stable=True)
    entry = lead.nonzero()[order, 0]
    keys, tk = _tokens(kept[entry], k_len, head[owner[entry]], stride, block, joined[owner[entry]])
    is_full = entry - rows.ptr.long()[owner[entry]] < rows.n_full[owner[entry]]
    full = is_full.repeat_interleave(k_len[kept[entry]])

    q_start, k_start = tq.cumsum(0) - tq, tk.cumsum(0) - tk
    kind = torch.stack([tq, tk, partial[leaders].long()], 1)
    kinds, which, sizes = kind.unique(dim=0, return_inverse=True, return_counts=True)
    found: list[Group] = []
    for (many_q, many_k, has_window), row in zip(
        kinds.tolist(), which.argsort(stable=True).split(sizes.tolist()), strict=True
    ):
        at = k_start[row, None] + torch.arange(many_k)
        group_full = full[at] if has_window else None
        found.append(Group(queries[q_start[row, None] + torch.arange(many_q)], keys[at].int(), group_full, None))
    size = 4 * sum(g.queries.numel() * g.keys.shape[1] for g in found if g.full is not None)
    if size <= KEPT_WINDOW_BYTES:
        found = [g if g.full is None else g._replace(window=window_bias(rows, g, heads)) for g in found]
    flat = torch.cat([g.queries.flatten() for g in found])
    ends = flat.split([g.queries.numel() for g in found])
    return Plan(flat, [g._replace(queries=own.view_as(g.queries)) for g, own in zip(found, ends, strict=True)])


def _clip(length: torch.Tensor, slots: int, block: int) -> torch.Tensor:
    """Block lengths, none past the end of the tensor."""
    return torch.minimum(length.long(), slots - torch.arange(len(length)) * block)


def _tokens(
    number: torch.Tensor, length: torch.Tensor, head: torch.Tensor, stride: int, block: int, owner: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """All tokens of a list of blocks, one after another, and how many each owner (ascending from 0) has."""
    within = torch.arange(block)
    token = (number[:, None] * block + within) * stride + (head[:, None] if stride > 1 else 0)
    count = torch.zeros(int(owner[-1]) + 1, dtype=torch.int64).index_add_(0, owner, length[number])
    return token[within < length[number, None]], count
