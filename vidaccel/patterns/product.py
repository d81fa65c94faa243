"""Masks and plans of patterns that are a product of one rule per axis.

Idea: a pair of tiles is full where it is on all axes, dropped where it is on any, and decided token by token elsewhere,
    by a window over those axes alone that cut a tile.
Cost: maps of all pairs of tiles, 0.4 million at 75,600 tokens.
Limits: one window per token, shared by the heads; heads that differ must keep whole tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from ..blocks import BlockMask, Window
from ..errors import PatternError
from ..grid import TokenLayout
from ..order import Sides
from .axes import Axis, Forecast, cheapest_box, tile_order
from .parameters import check_reached, is_beyond
from .plan import Plan
from .solve import TOLERANCE
from .touched import joined

_MOST_ROUNDS = 4


def settle(
    solve: Callable[[float], Sides], axes_of: Callable[[Sides], Sequence[Axis]], density: float, tile: Sides | None,
    block: int, sink: int,
) -> tuple[Sides, Forecast]:  # fmt: skip
    """A window whose density, with the sink's tiles, is nearest to one that is asked for, and its tile order.

    The thickness of the sink depends on the tile, and the best tile on the window, so a few rounds decide. Where the
    cheapest ones keep too much for the density to be reached at all, the sink fills its tiles: these are thinner, and
    cost more blocks for what they keep.

    Args:
        solve: the window for a density without a sink.
        axes_of: the rules of a window.
        density: wanted fraction of pairs.
        tile: tokens of a tile; None for the cheapest.
        block: slots of a block.
        sink: first frames that every query sees, in whole tiles.
    """
    if not sink:
        window = solve(density)
        return window, tile_order(axes_of(window), tile, block, sink)
    found: list[tuple[float, Sides, Forecast]] = []

    def take(share: float, *, filled: bool) -> float:
        """Solve for the rest of a share; returns the share that the sink really has."""
        window = solve(max(density - share, 0) / (1 - share) if share < 1 else 0.0)
        axes = axes_of(window)
        order = cheapest_box(axes, block, sink, filled=True) if filled else tile_order(axes, tile, block, sink)
        first = axes[0].sink(order.tile[0], order.fold[0], sink).repeat_interleave(order.tile[0])
        share = float(first[: len(axes[0].rank)].double().mean())
        kept = share + (1 - share) * math.prod(axis.density for axis in axes)
        found.append((abs(kept - density), window, order))
        return share

    shares = [0.0]
    while len(shares) <= _MOST_ROUNDS and shares[-1] not in shares[:-1]:
        shares.append(take(shares[-1], filled=False))
    if tile is None and is_beyond(density, density + min(found)[0]):
        take(sink / len(axes_of(found[0][1])[0].rank), filled=True)
    return min(found)[1:]


def product_plan(
    layout: TokenLayout,
    heads: Sequence[Sequence[Axis]],
    forecast: Forecast,
    block: int,
    rule: str,
    requested: float | None,
    sink: int = 0,
) -> Plan:
    """The plan of a product of axes, in the order of a forecast.

    Args:
        layout: the tokens, in any order.
        heads: the axes of every head, or of all heads together.
        forecast: the tile order.
        block: slots of a block.
        rule: what the pattern calls it.
        requested: the density that was asked for.
        sink: first frames that every query sees, in whole tiles.
    """
    tiled = layout.to("cpu").tiled(forecast.tile, block, forecast.fold)
    mask = product_mask(tiled, heads, sink)
    check_reached(requested, mask.density, rule, layout.grid, "ask for fewer sink_frames" if sink else "")
    notes = []
    if requested is not None and abs(mask.density - requested) > TOLERANCE * requested:
        notes.append(f"{rule} comes no nearer to {requested} than {mask.density:.3f} on a {layout.grid} grid")
    if mask.visited >= 1 > mask.density:
        notes.append(
            f"{rule} touches every tile of {tiled.tile} on a {layout.grid} grid, so that nothing is gained; "
            "use smaller blocks, a smaller window, or a stride of one tile"
        )
    return Plan.of(mask, requested, rule, tuple(notes)).to(layout.device)


def product_mask(layout: TokenLayout, heads: Sequence[Sequence[Axis]], sink: int = 0) -> BlockMask:
    """The mask of a product of axes.

    Args:
        layout: tile order.
        heads: the axes of every head, or of all heads together.
        sink: first frames that every query sees, in whole tiles.

    Raises:
        PatternError: heads that differ and need decisions token by token.
    """
    video = layout.video_blocks
    shape = (len(heads), layout.blocks, layout.blocks)
    keep, full = torch.ones(shape, dtype=torch.bool), torch.ones(shape, dtype=torch.bool)
    frame = layout.positions[:, 0]
    early = torch.nn.functional.pad((frame >= 0) & (frame < sink), (0, layout.blocks * layout.block - layout.slots))
    first = early.view(-1, layout.block).any(1)[:video]
    for head, axes in enumerate(heads):
        touched, whole, cut = _boxes(layout, axes) if layout.is_boxes else _any_blocks(layout, axes)
        keep[head, :video, :video] = touched | first
        full[head, :video, :video] = whole | first
    partial = keep & ~full
    if not bool(partial.any()):
        return BlockMask.of(keep, layout)
    if len(heads) > 1:
        raise PatternError("heads with windows of their own must keep whole tiles; give windows in tiles")
    return BlockMask.of(keep, layout, partial=partial, window=_window(layout, heads[0], cut))


def _boxes(layout: TokenLayout, axes: Sequence[Axis]) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
    """(video blocks, video blocks) bool twice: with any kept pair, with no other; and which axes cut a tile."""
    assert layout.tile is not None
    maps = [axis.tiles(side, apart) for axis, side, apart in zip(axes, layout.tile, layout.fold, strict=True)]
    touched, whole = (_outer(*kind) for kind in zip(*maps, strict=True))
    return touched, whole, [bool((some != every).any()) for some, every in maps]


def _any_blocks(layout: TokenLayout, axes: Sequence[Axis]) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
    """The same for blocks that are no boxes; an axis that is kept whole cuts none."""
    kept = [axis.kept() for axis in axes]
    return *joined(layout, kept), [not bool(each.all()) for each in kept]


def _outer(time: torch.Tensor, height: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """Maps of the tiles of each axis -> (tiles, tiles) of boxes, in the order in which a layout lists them."""
    outer = time[:, None, None, :, None, None] & height[:, None, None, :, None] & width[:, None, None, :]
    side = len(time) * len(height) * len(width)
    return outer.reshape(side, side)


def _window(layout: TokenLayout, axes: Sequence[Axis], cut: Sequence[bool]) -> Window:
    """The rule on the axes that are cut. Text and holes stand at -1 and keep nothing: they are in no partial block."""
    position = layout.positions.long()
    video = position[:, 0] >= 0
    sides = [
        [torch.where(video, table[at], none) for table, none in ((axis.lo, 0), (axis.hi, 0), (axis.rank, -1))]
        for axis, at, needed in zip(axes, position.T, cut, strict=True)
        if needed
    ]
    lo, hi, pos = (torch.stack(side, 1) for side in zip(*sides, strict=True))
    return Window.of(lo, hi, pos, [len(axis.rank) for axis, needed in zip(axes, cut, strict=True) if needed])
