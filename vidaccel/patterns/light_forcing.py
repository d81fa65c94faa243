"""Hierarchical selection: each query block first chooses frames, then blocks within them.

Idea: what matters to a query stands in few frames; choosing those first keeps its blocks together, at little cost.
Math: with the mean q_i of query block i, mean k_j of key block j and mean K_f of the keys of frame f, row i may look at
    `keep_frames` frames: the first ones, those within `near` of its own, and the best of the rest by <q_i, K_f>. Of
    the blocks in these frames it keeps its own and the best by <q_i, k_j>, round(density x blocks) in all.
Cost: that of block top-k, and frames / blocks more.
Source: Light Forcing, arXiv 2602.04789, section 3.3 (hierarchical sparse attention). Its chunk-aware growth belongs to
    autoregressive models; here, frames on both sides of the own one count, and density does not change.
Limits: a block at the end of one frame and the beginning of the next belongs to both. Its authors fine-tune; without
    that they report damage at density 0.12.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..errors import PatternError
from ..grid import Site, TokenLayout
from ..kernels.select import best_blocks, block_means
from ..order import described
from .dynamic import (
    EqualRows,
    always_kept,
    check_dynamic,
    check_reselect,
    dynamic_plan,
    frame_layout,
    row_length,
)
from .parameters import check_needed, check_sink
from .plan import Choice, Plan


@dataclass(frozen=True, eq=False)
class FramesThenBlocks(EqualRows):
    """Chooses frames, then blocks in them.

    Attributes:
        layout: tiles of one frame.
        forced: (video blocks, video blocks) bool, the own block.
        kept: video blocks in a row.
        seen: (video blocks, frames) bool, frames that each row may always look at.
        share: (frames, video blocks) fp32, which part of a frame each block holds.
        keep_frames: frames in a row.
    """

    seen: torch.Tensor
    share: torch.Tensor
    keep_frames: int

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Choice:
        """See `patterns.plan.Select`."""
        query, key = block_means(q, self.layout), block_means(k, self.layout)
        frame_key = self.share @ key
        affinity = (query @ frame_key.transpose(1, 2)).masked_fill(self.seen, torch.inf)
        chosen = affinity.topk(self.keep_frames, dim=-1, sorted=False).indices
        open_frames = torch.zeros_like(affinity).scatter(-1, chosen, 1.0)
        scores = (query @ key.transpose(1, 2)).masked_fill(open_frames @ self.share == 0, -torch.inf)
        return Choice(best_blocks(scores, self.forced, self.kept, self.layout))


@dataclass(frozen=True)
class LightForcing:
    """Light Forcing's hierarchical selection, for models that see all frames at once.

    Attributes:
        keep_frames: latent frames that a query block may look at. None: twice what the density fills, 3 or more.
        near: frames before and after its own that it may always look at.
        sink_frames: first frames that it may always look at.
        block: slots of a block.
        reselect: how many steps a choice serves, or the steps at which it is made anew.
    """

    name: ClassVar[str] = "light-forcing"
    per_site: ClassVar[bool] = False
    chooses: ClassVar[bool] = True

    keep_frames: int | None = None
    near: int = 1
    sink_frames: int = 1
    block: int = 128
    reselect: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        check_reselect(self.name, self.reselect)
        if self.near < 0:
            raise PatternError(f"light-forcing near={self.near} was asked for; give a number of frames from 0 on")

    def check(self, density: float | None) -> None:
        """See `Pattern.check`."""
        check_needed(self.name, density)

    def plan(self, layout: TokenLayout, density: float | None, site: Site) -> Plan:
        """Plan all layers of one grid; see `Pattern.plan`.

        Raises:
            PatternError: no density, or frames that the video does not have or that hold less than the density.
        """
        density = check_dynamic(self.name, layout, density)
        grid = layout.grid
        check_sink(self.name, self.sink_frames, grid)
        tiled = frame_layout(layout.to("cpu").tiled(None, self.block))
        share = frame_shares(tiled)
        frame = torch.arange(grid.t)
        near = (frame[:, None] - frame).abs() <= self.near
        near[:, : self.sink_frames] = True
        seen = share.T @ near.float() > 0
        least = max(int(seen.sum(1).max()), math.ceil(density * grid.t))
        wanted = min(grid.t, max(3, least, math.ceil(2 * density * grid.t)))
        keep_frames = wanted if self.keep_frames is None else self.keep_frames
        if not least <= keep_frames <= grid.t:
            raise PatternError(
                f"light-forcing keep_frames={keep_frames} was asked for; on a {grid} grid with density {density}, near "
                f"{self.near} and sink_frames {self.sink_frames} it lies in {least} to {grid.t}"
            )
        forced = always_kept(tiled, 0)
        # No choice of frames has fewer blocks than it fills.
        there = -(-keep_frames * grid.frame // int(tiled.q_len[: tiled.video_blocks].max()))
        kept = min(row_length(self.name, tiled, forced, density), there)
        select = FramesThenBlocks(tiled, forced, kept, seen, share, keep_frames)
        rule = (
            f"best {kept} of {tiled.video_blocks} tiles of {described(tiled.tile)}, in {keep_frames} of {grid.t} frames"
        )
        return dynamic_plan(select, density, rule, self.reselect).to(layout.device)


def frame_shares(layout: TokenLayout) -> torch.Tensor:
    """(frames, video blocks) fp32: which part of each frame each block of a tile order holds."""
    blocks, block = layout.video_blocks, layout.block
    frame = layout.positions[: blocks * block, 0].long()
    held = torch.zeros(layout.grid.t, blocks)
    slot = (frame >= 0).nonzero()[:, 0]
    held.index_put_((frame[slot], slot // block), torch.ones(len(slot)), accumulate=True)
    return held / layout.grid.frame
