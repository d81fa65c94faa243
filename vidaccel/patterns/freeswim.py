"""The inward sliding window: beyond its training size, a query sees as many keys as it did in training.

Idea: the window is the model's native frame; at borders it shifts inward, so it never shrinks. Time is seen whole.
Math: with half windows dy = floor(native height / 2), dx = floor(native width / 2), query (y, x) keeps key (y', x') iff
    y - dy - max(0, dy + y - H + 1) <= y' <= y + dy + max(0, dy - y), and likewise for x. This is neighborhood attention
    with window (T, 2 dy + 1, 2 dx + 1), and the whole axis where that is longer than it. Logits may be scaled by
    sqrt(log(r n) / log n) / sqrt(d), n the tokens of a native frame and r `logit_scale`: sharper, for more keys.
Cost: that of neighborhood attention. At 21x68x120 (1088x1920 pixels) tiles of 21x3x2 touch 23 % of the pairs for the
    20 % that are kept; in raster order it would be 48 %.
Source: FreeSwim, arXiv 2511.14712, section 3.
Limits: only sizes above the native one become sparse. The second path (`guide`) is in `vidaccel/guide.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from ..errors import PatternError
from ..grid import Site, TokenLayout, VideoGrid
from ..order import Sides
from .axes import Axis, tile_order
from .neighborhood import neighborhood_axis
from .parameters import check_density, check_sides, check_sink, check_tile, sides
from .plan import Plan
from .product import product_plan, settle
from .solve import Choice, most_even


@dataclass(frozen=True)
class FreeSwim:
    """FreeSwim's self-attention window.

    Attributes:
        native: (height, width) in latent tokens of the frames that the model was trained on. None: what its family says
            (Wan 2.1: 30x52, for 480x832 pixels), or what a density that is asked for allows, of the same shape as the
            video.
        tile: tokens of a block along (time, height, width), see `order`; None for what touches the fewest blocks.
        block: slots of a block.
        sink_frames: first latent frames that every query sees, in whole tiles.
        logit_scale: r above; 1 leaves the logits alone, the authors take 2 at every size (1.046 for 30x52 tokens).
        guide: every how many steps a second path with full attention runs, whose cross-attention guides this one; 0 for
            never. 1 guides both branches at every step; from 2 on the conditional branch alone (both where they are one
            call, as in LTX-Video), and in between what the second path has said is kept. The authors take 2.
        guide_gib: GiB that this may take on the GPU; the rest waits in host memory. None: all is on the GPU.
    """

    name: ClassVar[str] = "freeswim"
    per_site: ClassVar[bool] = False
    knobs: ClassVar[tuple[str, ...]] = ("native",)

    native: tuple[int, int] | None = None
    tile: Sides | None = None
    block: int = 128
    sink_frames: int = 0
    logit_scale: float = 1.0
    guide: int = 0
    guide_gib: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.logit_scale < math.inf:
            raise PatternError(
                f"freeswim logit_scale={self.logit_scale} was asked for; give 1 for none, 2 as its authors, or more"
            )
        if self.guide < 0:
            raise PatternError(
                f"freeswim guide={self.guide} was asked for; give 0 for none, 1 for every step, or a period"
            )
        if self.guide_gib is not None and not 0 <= self.guide_gib < math.inf:
            raise PatternError(
                f"freeswim guide_gib={self.guide_gib} was asked for; give GiB from 0 on, or None for all"
            )
        check_sides(self.name, "native", self.native, 1, ("height", "width"))
        if self.native is not None and math.prod(self.native) < 2:
            raise PatternError(
                f"freeswim native={self.native} was asked for, a frame of one token; give the tokens (height, width) "
                "of a frame at the model's own size"
            )
        check_tile(self.name, self.tile)

    def check(self, density: float | None) -> None:
        """See `Pattern.check`."""
        check_density(density)
        if density is not None and self.native is not None:
            raise PatternError(
                f"density {density} and native {self.native} were both given, and either decides alone; drop one"
            )

    def plan(self, layout: TokenLayout, density: float | None, site: Site) -> Plan:
        """Plan all layers of one grid; see `Pattern.plan`.

        Raises:
            PatternError: a native size and a density together, or neither for a site that has none.
        """
        self.check(density)
        grid, native = layout.grid, self.native or site.native
        if native is None and (density is None or self.logit_scale != 1):
            raise PatternError(
                f"freeswim was asked for without native, and at which size this {site.family} model was trained is not "
                "known here; give native=(height, width) in latent tokens of a frame, such as (30, 52) for 480x832 "
                "pixels of Wan 2.1"
            )
        check_sink(self.name, self.sink_frames, grid)
        if density is None:
            assert native is not None
            height, width = native
            window = (grid.t, min(height // 2 * 2 + 1, grid.y), min(width // 2 * 2 + 1, grid.x))
            forecast = tile_order(_axes(grid, window), self.tile, self.block, self.sink_frames)
        else:
            window, forecast = settle(
                lambda target: self._solve(grid, target),
                lambda window: _axes(grid, window),
                density,
                self.tile,
                self.block,
                self.sink_frames,
            )
        axes = _axes(grid, window)
        plan = product_plan(layout, [axes], forecast, self.block, f"window {sides(window)}", density, self.sink_frames)
        if self.guide:
            often = "every step"
            if self.guide > 1:
                often = f"one of {self.guide} steps (of the conditional branch, where it has calls of its own)"
            note = f"in {often} a second path attends to all; densities leave it out"
            plan = replace(plan, notes=(*plan.notes, note))
        if native is None or self.logit_scale == 1:
            return plan
        tokens = math.prod(native)
        return replace(plan, scale=math.sqrt(math.log(tokens * self.logit_scale) / math.log(tokens)))

    def _solve(self, grid: VideoGrid, density: float) -> Sides:
        choices = [
            [Choice(size, size / length, size / length) for size in sorted({*range(1, length + 1, 2), length})]
            for length in grid[1:]
        ]
        # Time is whole, and no reason to widen the window.
        whole = [Choice(grid.t, 1, 1)]
        return most_even([whole, *choices], density)[1]


def _axes(grid: VideoGrid, window: Sides) -> list[Axis]:
    return [neighborhood_axis(*each) for each in zip(grid, window, strict=True)]
