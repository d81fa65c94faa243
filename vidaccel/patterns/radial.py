"""Radial attention: near frames see much of each other, far ones little.

Idea: attention fades with distance in time and in space, so the budget goes to a neighbourhood and to the first frame.
Math: `released` keeps the blocks of `decay.py`, the rule of the authors' code.
    `ranked` sorts tiles by e^(-a |dt| - b |ds|), the decay the paper measured: between the centres of two tiles, |dt|
    in latent frames and |ds| the Euclidean distance over the frame's diagonal, so that both carry over to other sizes.
    Own tile first, then the first frame (where there is a sink), then the rest, ties by index, until the row has its
    share of tokens.
Cost: below 0.2 s at 75,600 tokens, once a grid; the mask is the same for all heads, layers and steps.
Source: Radial Attention, arXiv 2506.19852, sections 3 and 4; its released code (mit-han-lab/radial-attention 72788d4);
    b / a fitted to masks of that code, see `SPACE_DECAY`.
Limits: `released` has a density floor (0.25 at Wan 720p, 0.34 at 480p, 0.88 on a 9x16x16 grid with blocks of 128);
    `ranked` keeps whole tiles, so its first frame is as thick as a tile. Any token count, text before or after video.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch

from ..blocks import BlockMask
from ..errors import PatternError
from ..grid import Site, TokenLayout
from ..order import described, fullest
from .decay import decay_thresholds, keeps_neighbours
from .parameters import check_density, check_needed, check_reached
from .plan import Plan

Rule = Literal["auto", "released", "ranked"]

TOLERANCE = 0.05
"""How far, relative to the density asked for, `auto` lets the released rule be."""

TIME_DECAY = 1.0
"""a, the decay with each latent frame. Only b / a orders tiles, so that a = 1 is a choice of scale."""

SPACE_DECAY = 3.0
"""b, the decay with each diagonal of the frame.

It minimises the share of pairs that only one of two masks keeps, `ranked` at the released density and `released` at the
published decay, averaged over Wan 21x45x80 and 21x30x52 (0.2, sink) and HunyuanVideo 33x45x80 and 30x48x80 (0.95).
The minimum is flat: 0.3622 at 3, 0.3686 at 1, 0.3658 at 5, 0.377 at 8; `tests/vidaccel/test_radial.py` repeats the fit.
"""


@dataclass(frozen=True)
class Radial:
    """Radial attention by the authors' rule, or by rank where a density is wanted that their rule cannot give.

    Attributes:
        rule: "released" (knob: decay), "ranked" (knob: density), or "auto": released without a density, and with one
            where it comes within 5 % of it; ranked elsewhere.
        decay: the released rule's decay. None, without a density: what the authors published for the family, which is
            0.2 for Wan 2.1 (blocks of 128), 0.8 for Wan 2.2 (blocks of 64, taken for smaller ones too) and 0.95 for
            HunyuanVideo. CogVideoX and Mochi get the 0.3 of the SparseVideo port, anything else what Wan gets.
        block: tokens of a block.
        sink: every query sees the first frame. None: not for HunyuanVideo, as in the authors' code, but for Wan, as
            there, and for every other family, as in the paper.
    """

    name: ClassVar[str] = "radial"
    per_site: ClassVar[bool] = False
    knobs: ClassVar[tuple[str, ...]] = ("decay",)

    rule: Rule = "auto"
    decay: float | None = None
    block: int = 128
    sink: bool | None = None

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise PatternError(f"radial rule {self.rule!r} was asked for; possible: {', '.join(get_args(Rule))}")
        if self.decay is not None and not 0 <= self.decay < math.inf:
            raise PatternError(
                f"radial decay {self.decay} was asked for; it is a finite number from 0, usually 0.2 to 1"
            )
        if self.rule == "ranked" and self.decay is not None:
            raise PatternError("radial rule 'ranked' was given a decay; its knob is the density: leave the decay out")

    def check(self, density: float | None) -> None:
        """See `Pattern.check`."""
        check_density(density)
        if density is not None and self.decay is not None:
            raise PatternError(
                f"density {density} and decay {self.decay} were both given, and either decides alone; "
                "drop the decay to get the density, or the density to keep the decay"
            )
        if self.rule == "ranked":
            check_needed("radial rule 'ranked'", density)

    def plan(self, layout: TokenLayout, density: float | None, site: Site) -> Plan:
        """Plan all layers of one grid; see `Pattern.plan`.

        Raises:
            PatternError: density and decay together, `ranked` without a density, or `released` with one beyond it.
        """
        self.check(density)
        sink = not site.family.startswith("hunyuan") if self.sink is None else self.sink
        sink = sink and layout.grid.t > 1  # a single frame is no sink of itself
        raster = layout.to("cpu")
        if raster.tile is not None or raster.block != self.block:
            raster = raster.tiled(None, self.block)
        if self.rule == "ranked" or (self.rule == "auto" and density == 1):
            plan = _ranked(raster, density or 1.0, sink, [])
        else:
            plan = self._released(raster, density, sink, site.family)
        return plan.to(layout.device)

    def _released(self, layout: TokenLayout, density: float | None, sink: bool, family: str) -> Plan:
        grid = layout.grid
        thresholds = decay_thresholds(grid, self.block, sink)
        levels, delivered = _reach(thresholds, layout)
        notes: list[str] = []
        if density is None:
            decay = default_decay(family, self.block) if self.decay is None else self.decay
        else:
            best = int((delivered - density).abs().argmin())
            nearest, low, high = (float(delivered[n]) for n in (best, 0, -1))
            if abs(nearest - density) > TOLERANCE * density:
                reach = f"it reaches {low:.3f} to {high:.3f} on a {grid} grid with blocks of {self.block}"
                if self.rule == "auto":
                    reason = f"ranked, because the released rule has no {density}: {reach}"
                    return _ranked(layout, density, sink, [f"{reason}, and nearest {nearest:.3f}"])
                if not low <= density <= high:
                    side = f"below its floor of {low:.3f}" if density < low else f"above its ceiling of {high:.3f}"
                    raise PatternError(
                        f"density {density} was asked of radial rule 'released', {side}: {reach}; "
                        "use rule='ranked', which gives any density"
                    )
                notes.append(f"density {density} was asked for; the nearest that this rule has is {nearest:.3f}")
            above = float(levels[best + 1]) if best + 1 < len(levels) else math.inf
            decay = _shortest(float(levels[best]), above)
        if grid.t > 1 and not keeps_neighbours(grid):
            notes.append(
                f"frames of {grid.frame} tokens are too small for this rule: each loses its neighbours; see ranked"
            )
        if len(levels) > 1 and decay < levels[1]:
            notes.append(
                f"this is the rule's density floor here: every decay below {float(levels[1]):.3g} gives this mask"
            )
        return Plan.of(_mask(thresholds <= decay, layout), density, f"released, decay {decay:g}", tuple(notes))


def default_decay(family: str, block: int) -> float:
    """The published decay of a model family; sources in `Radial`."""
    if family.startswith("hunyuan"):
        return 0.95
    if family.startswith(("cogvideox", "mochi")):
        return 0.3
    return 0.2 if block == 128 else 0.8


def ranked_blocks(
    layout: TokenLayout, density: float, sink: bool, a: float = TIME_DECAY, b: float = SPACE_DECAY
) -> tuple[torch.Tensor, bool]:
    """The tiles that each tile ranks first, as many as the density allows.

    Args:
        layout: tile order.
        density: fraction of the video tokens that a row may keep.
        sink: rank the tiles of the first frame right behind the own tile.
        a: decay with each latent frame.
        b: decay with each diagonal of the frame.

    Returns:
        (video blocks, video blocks) bool, and whether every row has the whole first frame.
    """
    tiles, block = layout.video_blocks, layout.block
    length = layout.q_len[:tiles].long()
    position = layout.positions[: tiles * block].view(tiles, block, 3)
    filled = layout.filled[: tiles * block].view(tiles, block, 1)
    centre = (position * filled).sum(1).double() / length[:, None]
    apart = centre[:, None] - centre
    cost = a * apart[..., 0].abs() + b * apart[..., 1:].norm(dim=-1) / math.hypot(*layout.grid[1:])
    # Rounded, so that equally far tiles tie on every machine, and the lower index goes first.
    cost = cost.mul(1e6).round()
    first = position[:, 0, 0] == 0
    if sink:
        cost[:, first] -= cost.max() + 1
    order = cost.fill_diagonal_(-math.inf).argsort(dim=1, stable=True)

    reach = length[order].cumsum(1).double()
    budget = density * layout.grid.tokens
    keep = torch.zeros(tiles, tiles, dtype=torch.bool)
    owed = 0.0
    for row, sums in enumerate(reach):
        # What one row lacks goes to the next: the mask as a whole comes nearer than a row of whole tiles can.
        count = int((sums - budget - owed).abs().argmin()) + 1
        owed = max(min(owed + budget - float(sums[count - 1]), block / 2), -block / 2)
        keep[row, order[row, :count]] = True
    return keep, bool(keep[:, first].all())


def ranked_layout(layout: TokenLayout, sink: bool) -> TokenLayout:
    """The tiles to rank: compact ones without holes; for a sink, one frame thick.

    The first frame in tiles of three frames costs three: at Wan 720p and density 0.15, 95 % of a row.
    """
    return layout.tiled(fullest(layout.grid, layout.block, flat=sink))


def _ranked(layout: TokenLayout, density: float, sink: bool, notes: list[str]) -> Plan:
    tiled = ranked_layout(layout, sink)
    keep, whole = ranked_blocks(tiled, density, sink)
    if sink and not whole:
        thick = 1 if tiled.tile is None else min(tiled.tile[0], layout.grid.t)
        notes.append(
            "the first frame alone exceeds this density: each row keeps its own tile and the nearest of that frame; "
            f"ask for more than {thick / layout.grid.t:.3f}, or for sink=False"
        )
    mask = _mask(keep, tiled)
    rule = f"radial in whole tiles of {described(tiled.tile)}"
    check_reached(density, mask.density, rule, layout.grid, "ask for smaller blocks")
    if abs(mask.density - density) > TOLERANCE * density:
        notes.append(f"tiles of {described(tiled.tile)} come no nearer to {density} than {mask.density:.3f}")
    return Plan.of(mask, density, f"ranked, a={TIME_DECAY:g}, b={SPACE_DECAY:g}", tuple(notes))


def _mask(video: torch.Tensor, layout: TokenLayout) -> BlockMask:
    """Text sees and is seen by everything."""
    keep = torch.ones(layout.blocks, layout.blocks, dtype=torch.bool)
    keep[: layout.video_blocks, : layout.video_blocks] = video
    return BlockMask.of(keep, layout)


def _reach(thresholds: torch.Tensor, layout: TokenLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """All decays at which the mask changes, ascending from 0, and the density from each of them on."""
    length = layout.q_len[: layout.video_blocks].double()
    levels, level = torch.unique(thresholds, return_inverse=True)
    pairs = torch.outer(length, length).flatten()
    delivered = level.flatten().bincount(pairs).cumsum(0) / layout.grid.tokens**2
    return levels[levels < math.inf], delivered[levels < math.inf]


def _shortest(low: float, high: float) -> float:
    """The number in [low, high) that is quickest to type."""
    rounded = (math.ceil(low * 10**digits) / 10**digits for digits in range(9))
    return next((number for number in rounded if low <= number < high), low)
