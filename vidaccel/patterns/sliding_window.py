"""Sliding tile attention: tiles see the tiles around them, so that no block is ever decided token by token.

Idea: a window that moves by whole tiles touches only what it keeps.
Math: on an axis of n tiles with a window of w tiles, query tile q has its centre at c = clamp(q, floor(w / 2),
    n - 1 - floor(w / 2)), the upper bound counting last, and keeps key tile k iff |c - k| <= floor(w / 2). So an odd
    window keeps w tiles, an even one w + 1, and w = n all of them; density is the product of the kept shares.
    An odd window over tiles that divide the axis is generalized neighborhood attention with window w x tile and stride
    tile. In one dimension the tiles are blocks of the raster order.
Cost: below 0.2 s at 75,600 tokens, once a grid.
Source: Sliding Tile Attention, arXiv 2502.04507, section 3; the rule of even windows as in its released code (FastVideo
    2f3d407).
Limits: any canvas: the last tile of an axis is clipped. Windows of single heads are in tiles of one shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch

from ..blocks import BlockMask
from ..errors import PatternError
from ..grid import Site, TokenLayout, VideoGrid
from ..order import Sides, choose_tile
from .axes import Axis, simulate
from .parameters import AXES, check_heads, check_knob, check_sides, check_sink, sides
from .plan import Plan
from .product import product_plan
from .solve import Choice, most_even

_COMPACTNESS = 5
"""How much an e-fold of visited pairs weighs against an e-fold of unevenness, when a tile is chosen with a window."""


def window_of_tiles(tiles: int, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tiles,) int64 twice: the first tile that each tile keeps, and one past the last.

    The first and last tile are clamped to the axis, as a window of n tiles reaches beyond it.
    """
    half = window // 2
    centre = torch.arange(tiles).clamp(min=half).clamp(max=tiles - 1 - half)
    return (centre - half).clamp(min=0), (centre + half + 1).clamp(max=tiles)


def sliding_axis(length: int, window: int, side: int) -> Axis:
    """The rule of one axis, in tokens."""
    first, last = window_of_tiles(-(-length // side), window)
    token = torch.arange(length)
    return Axis(first[token // side] * side, (last[token // side] * side).clamp(max=length), token)


@dataclass(frozen=True)
class SlidingWindow:
    """Sliding tile attention; all tuples are (time, height, width).

    Attributes:
        window: tiles that a tile sees along each axis, 0 for the whole axis. One number: blocks of the raster order
            that a block sees. None: solved for the density that is asked for, of odd windows.
        heads: windows of single heads, instead of one for all; as many as the model has heads.
        tile: tokens of a tile. None: a compact box that divides the grid where that costs little; with a density, one
            whose windows come near it.
        block: slots of a block.
        sink_frames: first latent frames that every query sees, in whole tiles.
    """

    name: ClassVar[str] = "sliding-window"
    per_site: ClassVar[bool] = False
    knobs: ClassVar[tuple[str, ...]] = ("window", "heads")

    window: Sides | int | None = None
    heads: tuple[Sides, ...] | None = None
    tile: Sides | None = None
    block: int = 128
    sink_frames: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or self.window < 0:
            check_sides(self.name, "window", self.window, 0)
        check_sides(self.name, "tile", self.tile, 1)
        if self.heads is not None:
            # Recipes hold lists.
            object.__setattr__(self, "heads", tuple(tuple(window) for window in self.heads))
            for window in self.heads:
                check_sides(self.name, "heads", window, 0)
        if self.heads is not None and (self.window is not None or not self.heads):
            raise PatternError(
                f"sliding-window got window {self.window} and heads {self.heads}; give one window for all heads, or "
                "one for each head"
            )

    def check(self, density: float | None) -> None:
        """See `Pattern.check`."""
        check_knob(self.name, "window", self.window if self.heads is None else self.heads, density)

    def check_model(self, layers: int, heads: int) -> None:
        """See `Pattern`."""
        if self.heads is not None:
            check_heads(self.name, len(self.heads), heads)

    def plan(self, layout: TokenLayout, density: float | None, site: Site) -> Plan:
        """Plan all layers of one grid; see `Pattern.plan`.

        Raises:
            PatternError: windows and density together or neither, or a window larger than its axis.
        """
        self.check(density)
        grid = layout.grid
        check_sink(self.name, self.sink_frames, grid)
        if isinstance(self.window, int):
            return self._plan_line(layout.to("cpu").tiled(None, self.block), self.window).to(layout.device)
        if density is None:
            tile = self.tile or choose_tile(grid, self.block)
            tiles = _tiles(grid, tile)
            windows = [self._fitting(window, tiles, tile) for window in self.heads or (self.window or tiles,)]
        else:
            candidates = [self.tile] if self.tile else _full_tiles(grid, self.block)
            (_, window), tile = min((self._solve(grid, tile, density), tile) for tile in candidates)
            windows, tiles = [window], _tiles(grid, tile)
        heads = [[sliding_axis(*each) for each in zip(grid, window, tile, strict=True)] for window in windows]
        rule = f"window {sides(windows[0])} of {sides(tiles)} tiles"
        if self.heads is not None:
            rule = f"{len(windows)} windows of {sides(tiles)} tiles"
        forecast = simulate(heads[0], tile, self.block, sink=self.sink_frames)
        plan = product_plan(layout, heads, forecast, self.block, rule, density, self.sink_frames)
        apart = [name for name, size, most in zip(AXES, windows[0], tiles, strict=True) if size == 1 < most]
        if density is None or not apart:
            return plan
        note = (
            f"{rule}, the nearest to density {density}, never looks past its tile of {sides(tile)} along "
            f"{' and '.join(apart)}, so that seams may show there; smaller blocks, more density or neighborhood do"
        )
        return replace(plan, notes=(*plan.notes, note))

    def _plan_line(self, layout: TokenLayout, window: int) -> Plan:
        """One dimension: blocks of the raster order."""
        blocks = layout.video_blocks
        if window > blocks:
            raise PatternError(
                f"sliding-window window {window} was asked for, but there are {blocks} blocks of {self.block}; "
                f"use {blocks}, or 0 for all"
            )
        first, last = window_of_tiles(blocks, window or blocks)
        key = torch.arange(blocks)
        keep = torch.ones(layout.blocks, layout.blocks, dtype=torch.bool)
        keep[:blocks, :blocks] = (first[:, None] <= key) & (key < last[:, None])
        keep[:, : -(-self.sink_frames * layout.grid.frame // self.block)] = True
        return Plan.of(BlockMask.of(keep, layout), None, f"window {window} of {blocks} blocks")

    def _fitting(self, window: Sides, tiles: Sides, tile: Sides) -> Sides:
        for name, size, most in zip(AXES, window, tiles, strict=True):
            if size > most:
                raise PatternError(
                    f"sliding-window window {size} along {name} was asked for, but there are {most} tiles of "
                    f"{sides(tile)}; use {most}, or 0 for the whole axis"
                )
        time, height, width = (size or most for size, most in zip(window, tiles, strict=True))
        return time, height, width

    def _solve(self, grid: VideoGrid, tile: Sides, density: float) -> tuple[float, Sides]:
        """The window of a tile shape, and its cost."""
        thick = -(-self.sink_frames // tile[0]) * tile[0]
        share = min(thick, grid.t) / grid.t
        choices = [_choices(length, side) for length, side in zip(grid, tile, strict=True)]
        cost, window = most_even(choices, density, share)
        # Half-empty blocks cost what full ones do, as queries and as keys.
        slots = math.prod(_tiles(grid, tile)) * self.block
        return cost + _COMPACTNESS * 2 * math.log(slots / grid.tokens), window


@lru_cache(maxsize=4096)
def _choices(length: int, side: int) -> list[Choice]:
    tiles = -(-length // side)
    windows = sorted({*range(1, tiles + 1, 2), tiles})
    return [
        Choice(window, min(window * side / length, 1), sliding_axis(length, window, side).density) for window in windows
    ]


def _tiles(grid: VideoGrid, tile: Sides) -> Sides:
    time, height, width = (-(-length // side) for length, side in zip(grid, tile, strict=True))
    return time, height, width


def _full_tiles(grid: VideoGrid, block: int) -> list[Sides]:
    """Compact boxes that need few more blocks than the tokens would."""
    best = choose_tile(grid, block)
    most = 1.1 * math.prod(_tiles(grid, best))
    return [best] + [
        (t, y, x)
        for t in range(1, grid.t + 1)
        for y in range(1, min(grid.y, block // t) + 1)
        if (x := min(grid.x, block // (t * y)))
        and max(y, x) <= 4 * min(y, x)
        and math.prod(_tiles(grid, (t, y, x))) <= most
    ]
