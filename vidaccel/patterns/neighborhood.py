"""Neighborhood attention, generalized: each query sees a box of keys around it.

Idea: attention is local, and a window that shifts inward at borders gives every query equally many keys.
Math: on an axis of L tokens with window k, stride s and dilation d, tokens with the same remainder by d form a group of
    n tokens; with x' the place of the query in its group, its leader is l = min(floor(x' / s) s + floor(s / 2), n - 1),
    and it keeps the k tokens of its group from clamp(l - floor(k / 2), 0, n - k) on.
    Causal: l = min(floor(x' / s) s + s - 1, n - 1), kept from max(l - k + 1, 0) up to x'. A pair is kept iff all three
    axes keep it. Density is prod k_i / L_i, whatever stride and dilation. Stride 1 is neighborhood attention, stride k
    blocked attention; a stride of one tile with a window of an odd number of tiles keeps whole tiles.
Cost: about 2 s at 75,600 tokens, once a grid; the mask is the same for all heads, layers and steps. Small strides
    touch more tiles than they keep pairs for: see `axes.simulate`.
Source: Generalized Neighborhood Attention, arXiv 2504.16922, sections 3 and 4; NATTEN, arXiv 2204.07143.
Limits: window x dilation within the axis, stride within the window. Any token count, text before or after video.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..errors import PatternError
from ..grid import Site, TokenLayout, VideoGrid
from ..order import Sides
from .axes import Axis, tile_order
from .parameters import AXES, check_knob, check_sides, check_sink, check_tile, sides
from .plan import Plan
from .product import product_plan, settle
from .solve import TOLERANCE, Choice, most_even


def neighborhood_axis(length: int, window: int, stride: int = 1, dilation: int = 1, causal: bool = False) -> Axis:
    """The rule of one axis. Ranks put the dilation groups one after another."""
    token = torch.arange(length)
    group, place = token % dilation, token // dilation
    size = (length - group + dilation - 1) // dilation
    start = group * (length // dilation) + group.clamp(max=length % dilation)
    leader = place // stride * stride
    if causal:
        lo = (torch.minimum(leader + stride - 1, size - 1) - window + 1).clamp(min=0)
        hi = place + 1
    else:
        leader = torch.minimum(leader + stride // 2, size - 1)
        lo = torch.minimum((leader - window // 2).clamp(min=0), size - window)
        hi = lo + window
    return Axis(start + lo, start + hi, start + place, dilation)


@dataclass(frozen=True)
class Neighborhood:
    """Generalized neighborhood attention in three dimensions; all tuples are (time, height, width) in latent tokens.

    Attributes:
        window: keys along each axis, 0 for the whole axis. None: solved for the density that is asked for, as nearly
            the same share of each axis as possible; with a stride above 1, odd multiples of it where they come within
            10 % of that density.
        stride: how many neighbouring queries share one window.
        dilation: how far apart the keys of a window are.
        causal: no key after the query on this axis.
        tile: tokens of a block, see `order`; None for what touches the fewest blocks.
        block: slots of a block.
        sink_frames: first latent frames that every query sees, in whole tiles.
    """

    name: ClassVar[str] = "neighborhood"
    per_site: ClassVar[bool] = False
    knobs: ClassVar[tuple[str, ...]] = ("window",)

    window: Sides | None = None
    stride: Sides = (1, 1, 1)
    dilation: Sides = (1, 1, 1)
    causal: tuple[bool, bool, bool] = (False, False, False)
    tile: Sides | None = None
    block: int = 128
    sink_frames: int = 0

    def __post_init__(self) -> None:
        for name, least in (("window", 0), ("stride", 1), ("dilation", 1), ("causal", 0)):
            check_sides(self.name, name, getattr(self, name), least)
        check_tile(self.name, self.tile)

    def check(self, density: float | None) -> None:
        """See `Pattern.check`."""
        check_knob(self.name, "window", self.window, density)

    def plan(self, layout: TokenLayout, density: float | None, site: Site) -> Plan:
        """Plan all layers of one grid; see `Pattern.plan`.

        Raises:
            PatternError: window and density together or neither, or parameters that do not fit the grid.
        """
        self.check(density)
        grid = layout.grid
        check_sink(self.name, self.sink_frames, grid)
        self._check_dilation(grid)
        if density is None:
            window = self._fitting(grid)
            forecast = tile_order(self._axes(grid, window), self.tile, self.block, self.sink_frames)
        else:
            window, forecast = settle(
                lambda target: self._solve(grid, density, target),
                lambda window: self._axes(grid, window),
                density,
                self.tile,
                self.block,
                self.sink_frames,
            )
        axes = self._axes(grid, window)
        parts = [f"window {sides(window)}"]
        parts += [
            f"{name} {sides(value)}"
            for name, value in (("stride", self.stride), ("dilation", self.dilation))
            if max(value) > 1
        ]
        return product_plan(layout, [axes], forecast, self.block, ", ".join(parts), density, self.sink_frames)

    def _axes(self, grid: VideoGrid, window: Sides) -> list[Axis]:
        return [
            neighborhood_axis(*each) for each in zip(grid, window, self.stride, self.dilation, self.causal, strict=True)
        ]

    def _check_dilation(self, grid: VideoGrid) -> None:
        for name, length, apart in zip(AXES, grid, self.dilation, strict=True):
            if apart > length:
                raise PatternError(
                    f"neighborhood dilation {apart} along {name} was asked for, but a {grid} grid has {length} tokens "
                    f"there; at most {length} fits"
                )

    def _fitting(self, grid: VideoGrid) -> Sides:
        """The window on this grid, 0 replaced by the whole axis."""
        assert self.window is not None
        found = []
        for name, length, asked, stride, apart in zip(AXES, grid, self.window, self.stride, self.dilation, strict=True):
            most = length // apart
            size = asked or most
            if size > most:
                with_dilation = f" with dilation {apart}" if apart > 1 else ""
                raise PatternError(
                    f"neighborhood window {asked} along {name} was asked for, but a {grid} grid has room for "
                    f"{most}{with_dilation}; use {most}, or 0 for the whole axis"
                )
            if stride > size:
                raise PatternError(
                    f"neighborhood stride {stride} along {name} was asked for with a window of {size}; "
                    f"use a stride of at most {size}, or a window of {min(stride, most)} or more"
                )
            found.append(size)
        time, height, width = found
        return time, height, width

    def _solve(self, grid: VideoGrid, density: float, target: float) -> Sides:
        """The window for a target that may be less than the density, where a sink provides the rest."""
        # Windows of whole strides touch no tile for a few pairs, so they go first where they come near enough.
        aligned, exact = (self._choices(grid, whole) for whole in (True, False))
        least, most = (math.prod(pick(c.density for c in axis) for axis in exact) for pick in (min, max))
        if not least * (1 - TOLERANCE) <= density <= most * (1 + TOLERANCE):
            raise PatternError(
                f"density {density:.3g} was asked of neighborhood windows with stride {sides(self.stride)} and "
                f"dilation {sides(self.dilation)}; on a {grid} grid they have {least:.3g} to {most:.3g}"
            )
        _, window = most_even(aligned, target)
        found = math.prod(axis.density for axis in self._axes(grid, window))
        return window if abs(found - target) <= 2 * TOLERANCE * target else most_even(exact, target)[1]

    def _choices(self, grid: VideoGrid, whole: bool) -> list[list[Choice]]:
        """Every legal window of each axis; with `whole`, those of an odd number of strides, and the largest."""
        choices = []
        for name, length, stride, apart, causal in zip(
            AXES, grid, self.stride, self.dilation, self.causal, strict=True
        ):
            most = length // apart
            if stride > most:
                raise PatternError(
                    f"neighborhood stride {stride} along {name} was asked for, but windows there end at {most} on a "
                    f"{grid} grid; use a stride of at most {most}"
                )
            step = 2 * stride if whole and stride > 1 else 1
            choices.append(
                [
                    Choice(size, size / length, neighborhood_axis(length, size, stride, apart, causal).density)
                    for size in sorted({*range(stride, most + 1, step), most})
                ]
            )
        return choices
