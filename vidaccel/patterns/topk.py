"""Block top-k: each query block attends to the key blocks whose mean agrees best with its own.

Idea: what matters is decided by the content, call by call and head by head, at the price of one look at block means.
Math: score[i, j] = <mean q of tile i, mean k of tile j>; a row keeps its own tile, the tiles of the first frames, and
    the best of the rest, round(density x tiles) in all. With p[i, j] = softmax_j(score / sqrt(d)), rows may differ:
    `adaptive` takes one threshold on p for all rows and heads of a sample that keeps as many on average; `top_p` keeps
    the fewest best tiles of a row whose p add up to it, and no more than the density allows.
Cost: one pass over q and k and a product of their means a call: below 1 % of the flops of dense attention at 75,600
    tokens.
Source: MoBA (arXiv 2502.13189), VSA (arXiv 2505.13389); top-p per row: SpargeAttn (arXiv 2502.18137).
Limits: how many tiles are kept, or the most with top_p, is fixed, so that no call waits for a GPU; with clipped tiles
    the density of a call differs by as much as they do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..blocks import BlockMask
from ..errors import PatternError
from ..grid import Site, TokenLayout
from ..kernels.select import best_blocks, block_scores, likeliest_blocks
from ..order import described
from ..ranks import HeadPart
from .dynamic import (
    EqualRows,
    always_kept,
    check_dynamic,
    check_reselect,
    dynamic_plan,
    row_length,
    rows_up_to,
    tile_layout,
)
from .parameters import check_needed, check_sink
from .plan import Choice, Plan


@dataclass(frozen=True, eq=False)
class BestBlocks(EqualRows):
    """Chooses the best blocks of each row.

    Attributes:
        layout: tile order.
        forced: (video blocks, video blocks) bool, kept whatever their score.
        kept: video blocks in a row; on average, where rows are adaptive.
        adaptive: rows whose attention is spread keep more than others.
        top_p: mass at which a row ends, after at most `kept` blocks; None where all rows are full.
        part: the heads of a sample that are given, where other ranks have others: one threshold for all needs the
            scores of all, and no other sample's. None: what is given is one sample.
    """

    adaptive: bool = False
    top_p: float | None = None
    part: HeadPart | None = None

    def of_heads(self, part: HeadPart) -> BestBlocks:
        """See `patterns.plan.Select`."""
        return replace(self, part=part if self.adaptive else None)

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Choice:
        """See `patterns.plan.Select`."""
        scores = block_scores(q, k, self.layout)
        if self.top_p is not None:
            return Choice(self._until(self.top_p, (scores * q.shape[-1] ** -0.5).softmax(-1)))
        if self.adaptive:
            scores = scores * q.shape[-1] ** -0.5
            part = self.part or HeadPart.whole(len(scores))
            samples = part.gather(scores).split(part.total)
            masks = [likeliest_blocks(each, self.forced, self.kept, self.layout) for each in samples]
            if part.ranks is None:
                return Choice(BlockMask.stacked(masks))
            keep = part.own(torch.cat([mask.video_map() > 0 for mask in masks]))
            rows = (~keep).byte().argsort(dim=-1, stable=True)
            return Choice(rows_up_to(rows, keep.sum(-1), self.layout))
        return Choice(best_blocks(scores, self.forced, self.kept, self.layout))

    def _until(self, mass: float, likely: torch.Tensor) -> BlockMask:
        """The best blocks of each row up to a mass, of probabilities (h, video blocks, video blocks)."""
        best = likely.masked_fill(self.forced, torch.inf).topk(self.kept, dim=-1).indices
        each = likely.gather(2, best)
        needed = self.forced.expand_as(likely).gather(2, best) | (each.cumsum(-1) - each < mass)
        # What is not needed sorts behind every block.
        ascending = torch.where(needed, best, self.layout.blocks).sort(dim=-1).values
        return rows_up_to(ascending, needed.sum(-1), self.layout)


@dataclass(frozen=True)
class TopK:
    """Block top-k by pooled scores.

    Attributes:
        adaptive: rows and heads whose attention is spread keep more blocks, those that look at few keep fewer; every
            sample of a batch keeps as many.
        block: slots of a block.
        sink_frames: first latent frames that every query sees, in whole tiles.
        top_p: a row ends where its tiles hold this share of its attention, by their means; the density is then the most
            that any row keeps, and the trace records what was kept.
        reselect: how many steps a choice serves, or the steps at which it is made anew.
    """

    name: ClassVar[str] = "topk"
    per_site: ClassVar[bool] = False
    chooses: ClassVar[bool] = True

    adaptive: bool = False
    block: int = 128
    sink_frames: int = 1
    top_p: float | None = None
    reselect: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        check_reselect(self.name, self.reselect)
        if self.top_p is not None and not 0 < self.top_p < 1:
            raise PatternError(
                f"topk top_p={self.top_p} was asked for; it is a share of attention in (0, 1), such as 0.9"
            )
        if self.top_p is not None and self.adaptive:
            raise PatternError("topk got both adaptive and top_p, and either decides how long rows are; drop one")

    def check(self, density: float | None) -> None:
        """See `Pattern.check`."""
        check_needed(self.name, density)

    def plan(self, layout: TokenLayout, density: float | None, site: Site) -> Plan:
        """Plan all layers of one grid; see `Pattern.plan`.

        Raises:
            PatternError: no density, or one that the own tile and the first frames exceed.
        """
        density = check_dynamic(self.name, layout, density)
        check_sink(self.name, self.sink_frames, layout.grid)
        tiled = tile_layout(layout.to("cpu").tiled(None, self.block), self.sink_frames, density)
        forced = always_kept(tiled, self.sink_frames)
        kept = row_length(self.name, tiled, forced, density)
        select = BestBlocks(tiled, forced, kept, self.adaptive, self.top_p)
        rule = f"best {kept} of {tiled.video_blocks} tiles of {described(tiled.tile)}{', on average' * self.adaptive}"
        if self.top_p is not None:
            rule += f" at most, until they hold {self.top_p:g}"
        plan = dynamic_plan(select, density, rule, self.reselect)
        return replace(plan, varies=self.top_p is not None).to(layout.device)
