"""Patterns that are a product of one rule per axis, and what they cost in any tile order.

Idea: a query keeps a key iff it does so on every axis by itself, so all counts are products of small tables.
Math: on an axis of L tokens, query x keeps key y iff lo[x] <= rank[y] < hi[x]. For tiles of `side` tokens, T is the
    number of pairs of tiles with any kept pair of tokens. The mask touches prod T_i pairs of blocks, so
    visited = prod T_i * block^2 / tokens^2, and density = prod mean(hi_i - lo_i) / L_i.
Cost: O(L^2) for each side of a tile, below 0.1 s for all tiles of a 21x45x80 grid.
Source: the axes of generalized neighborhood attention separate (arXiv 2504.16922, section 4: NATTENSim).
Limits: each axis keeps one interval of ranks for a query.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ..grid import TokenLayout
from ..order import Sides, folded
from .touched import joined

WHOLE_RATE, PARTIAL_RATE = 0.85, 0.65
"""What a block-sparse kernel reaches of a dense one's rate on whole tiles, and on those decided token by token.

Sliding Tile Attention, arXiv 2502.04507, table 1, and Generalized Neighborhood Attention, arXiv 2504.16922, section 5:
measured 0.65 of the tile bound for token-wise masks, 0.94 and more for whole tiles.
"""

_FULL = 1.03
"""Boxes that need at most this many times the blocks that the tokens fill are full enough."""

_TRIED, _SAMPLE = 8, 16
"""How many rods are compared, and how many of their query blocks are looked at."""


class Axis(NamedTuple):
    """The rule of one axis.

    Attributes:
        lo: (length,) int64, first kept rank of each query.
        hi: (length,) int64, one past its last kept rank.
        rank: (length,) int64, the rank of each key: its coordinate, or its place after folding.
        fold: dilation; tiles of neighbours in rank are an option where it is above 1.
    """

    lo: torch.Tensor
    hi: torch.Tensor
    rank: torch.Tensor
    fold: int = 1

    @property
    def density(self) -> float:
        """Kept pairs over all pairs."""
        return float((self.hi - self.lo).double().mean()) / len(self.rank)

    def kept(self, fold: int = 1) -> torch.Tensor:
        """(length, length) bool: [query, key], both in the order of a fold."""
        order = folded(len(self.rank), fold)
        rank = self.rank[order]
        return (self.lo[order, None] <= rank) & (rank < self.hi[order, None])

    def tiles(self, side: int, fold: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """(tiles, tiles) bool twice: pairs of tiles with any kept pair of tokens, and with nothing else."""
        kept = self.kept(fold)
        count = -(-len(kept) // side)
        missing = count * side - len(kept)
        length = torch.full((count,), side)
        length[-1] -= missing
        padded = torch.nn.functional.pad(kept, (0, missing, 0, missing))
        pairs = padded.view(count, side, count, side).sum((1, 3))
        return pairs > 0, pairs == torch.outer(length, length)

    def sink(self, side: int, fold: int, first: int) -> torch.Tensor:
        """(tiles,) bool: which tiles hold one of the first tokens of the axis."""
        return torch.stack([(part < first).any() for part in folded(len(self.rank), fold).split(side)])


class Forecast(NamedTuple):
    """What a product of axes costs in one tile order.

    Attributes:
        visited: tiles touched x block^2 over all video-video pairs; by a sample, where it is said.
        full: fraction of the touched tiles that need no token-wise decision.
        tile: tokens of a tile along (t, y, x).
        fold: how far apart its neighbours are on each axis.
    """

    visited: float
    full: float
    tile: Sides
    fold: Sides = (1, 1, 1)

    @property
    def cost(self) -> float:
        """Time of attention over that of a dense kernel, by the rates of whole and of cut tiles."""
        return self.visited * (self.full / WHOLE_RATE + (1 - self.full) / PARTIAL_RATE)


class _Counts(NamedTuple):
    """One axis in tiles: how many there are, pairs touched, pairs with nothing dropped (both without sink tiles)."""

    touched: int
    partial: int
    full: int
    tiles: int
    sink: int
    fold: int

    @classmethod
    def of(cls, axis: Axis, side: int, fold: int, first: int) -> _Counts:
        sink = axis.sink(side, fold, first)
        touched, full = (int(pairs[:, ~sink].sum()) for pairs in axis.tiles(side, fold))
        return cls(touched, touched - full, full, len(sink), int(sink.sum()), fold)


def simulate(axes: Sequence[Axis], tile: Sides, block: int, fold: Sides = (1, 1, 1), sink: int = 0) -> Forecast:
    """Count what a tile order makes of a pattern, without building its mask.

    Args:
        axes: the rules of time, height and width.
        tile: tokens of a tile.
        block: slots of a tile.
        fold: the order of each axis.
        sink: first frames that every query sees; a tile that holds one of them is kept whole.
    """
    if not tile[2]:
        return rods(axes, tile, block, sink)
    first = (sink, 0, 0)
    return _forecast([_Counts.of(*each) for each in zip(axes, tile, fold, first, strict=True)], axes, tile, block)


def rods(axes: Sequence[Axis], tile: Sides, block: int, sink: int = 0, sample: int | None = None) -> Forecast:
    """Count what an order of rods makes of a pattern.

    Args:
        axes: the rules of time, height and width.
        tile: cross-section of the rods, and 0.
        block: slots of a block.
        sink: first frames that every query sees.
        sample: how many query blocks to look at, evenly spread; None for all.
    """
    time, height, width = (len(axis.rank) for axis in axes)
    layout = TokenLayout.of((time, height, width), 0, block, tile)
    many = layout.blocks
    rows = torch.linspace(0, many - 1, min(sample or many, many)).long()
    some, every = joined(layout, [axis.kept() for axis in axes], rows)
    frame = layout.positions[:, 0].view(many, block)
    first = ((frame >= 0) & (frame < sink)).any(1)
    touched, full = (int((pairs | first).sum()) for pairs in (some, every))
    visited = touched / len(rows) * many * block**2 / layout.grid.tokens**2
    return Forecast(visited, full / touched, tile)


def cheapest(axes: Sequence[Axis], block: int, sink: int = 0) -> Forecast:
    """The tile order that touches the fewest blocks; among equals, the one with the most full ones.

    Every box of at most `block` tokens is tried, with and without folding of each axis. Where the best of them leaves
    holes, so are rods: all by estimate, the best of these on a sample of their blocks, and the best of those must save
    what its cut blocks cost.
    """
    best = cheapest_box(axes, block, sink)
    length = [len(axis.rank) for axis in axes]
    tiles = math.prod(-(-n // side) for n, side in zip(length, best.tile, strict=True))
    is_full = tiles * block <= _FULL * math.prod(length)
    # A mask of whole tiles needs no window, and rods would cut some. Most rods are thicker than a sink.
    if is_full or best.full == 1 or sink or max(axis.fold for axis in axes) > 1:
        return best
    sections = list(_sections(length, block))
    if not sections:
        return best
    likely = sorted(sections, key=lambda tile: _estimate(axes, tile, block))[:_TRIED]
    section = min(likely, key=lambda tile: rods(axes, tile, block, sample=_SAMPLE).cost)
    return min(best, rods(axes, section, block), key=lambda forecast: forecast.cost)


def _estimate(axes: Sequence[Axis], tile: Sides, block: int) -> float:
    """What rods cost if their blocks were boxes: of the length that fills them, rounded up, or one token longer."""
    t, y = (-(-len(axis.rank) // side) / len(axis.rank) for axis, side in zip(axes, tile[:2], strict=False))
    long = math.ceil(block * t * y)
    some, every = 1.0, 1.0
    for axis, sides in zip(axes, ((tile[0],), (tile[1],), (long, long + 1)), strict=True):
        maps = [axis.tiles(side) for side in sides]
        some, every = (
            share * sum(float(each[kind].double().mean()) for each in maps) / len(maps)
            for kind, share in enumerate((some, every))
        )
    return Forecast(some, every / some, tile).cost


def _sections(length: Sequence[int], block: int) -> Iterator[Sides]:
    """Rods, each way of sharing out time and height once, with blocks that are not long and thin in the frame."""
    time, height = (sorted({-(-n // parts) for parts in range(1, n + 1)}) for n in length[:2])
    for t, y in itertools.product(time, height):
        long = block * -(-length[0] // t) * -(-length[1] // y) / (length[0] * length[1])
        if t * y <= block and max(y, long) <= 4 * min(y, long) and long <= length[2]:
            yield t, y, 0


def cheapest_box(axes: Sequence[Axis], block: int, sink: int = 0, *, filled: bool = False) -> Forecast:
    """The box that touches the fewest tiles, see `cheapest`; with `filled`, of those that the sink fills."""
    counts = [
        [
            min(_Counts.of(axis, side, fold, first) for fold in sorted({1, axis.fold}))
            for side in range(1, min(len(axis.rank), block) + 1)
        ]
        for axis, first in zip(axes, (sink, 0, 0), strict=True)
    ]
    thick = [t for t in range(1, len(counts[0]) + 1) if not filled or sink % t == 0]
    boxes = (
        (t, y, x)
        for t, y in itertools.product(thick, range(1, len(counts[1]) + 1))
        for x in range(1, min(len(counts[2]), block // (t * y)) + 1)
    )
    forecasts = (
        _forecast([table[side - 1] for table, side in zip(counts, box, strict=True)], axes, box, block) for box in boxes
    )
    return min(forecasts, key=lambda forecast: (forecast.visited, -forecast.full))


def _forecast(counts: Sequence[_Counts], axes: Sequence[Axis], tile: Sides, block: int) -> Forecast:
    tokens = math.prod(len(axis.rank) for axis in axes)
    always = counts[0].sink * counts[0].tiles * (counts[1].tiles * counts[2].tiles) ** 2
    touched = always + math.prod(count.touched for count in counts)
    full = always + math.prod(count.full for count in counts)
    time, height, width = (count.fold for count in counts)
    return Forecast(touched * block**2 / tokens**2, full / touched, tile, (time, height, width))


def tile_order(axes: Sequence[Axis], tile: Sides | None, block: int, sink: int) -> Forecast:
    """The cheapest tile order, or the one of a given tile."""
    return cheapest(axes, block, sink) if tile is None else simulate(axes, tile, block, sink=sink)
