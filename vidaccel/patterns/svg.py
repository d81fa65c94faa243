"""Spatial and temporal heads: each head is tried on a few rows at every call, and gets the shape that fits it.

Idea: most heads of video models look either around themselves in near frames, or at the same place in all frames.
Math: two fixed masks keep round(density x tiles) tiles a row. `near` ranks tiles by distance in time, then in space;
    `across` by distance in space, then in time; own tile and first frames go first in both. For some query rows the
    outputs o of all keys, o_near and o_across are computed, and a head goes by the mask with the smaller
    sum |o_mask - o|^2 over them.
Cost: 8 samples x tokens x d flops a head, and 8 bytes for each logit: 0.8 GB for 32 rows of 40 heads at 75,600 tokens.
Source: Sparse VideoGen, arXiv 2502.01776, section 4.2. Its masks are bands of the raster order, and of the order that
    puts frames innermost; here both keep tiles of one order, so that nothing is moved, and the first frames are seen by
    either (its released sink follows the permutation, and misses the first frame in temporal heads).
Limits: one mask for a head; padded text counts for nothing, where heads are tried as in the attention itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..errors import PatternError
from ..grid import Site, TokenLayout
from ..kernels.select import rows_of
from ..order import described
from .dynamic import EqualRows, always_kept, check_dynamic, check_reselect, dynamic_plan, row_length, tile_layout
from .parameters import check_needed, check_sink
from .plan import Choice, Plan


@dataclass(frozen=True, eq=False)
class NearOrAcross(EqualRows):
    """Tries two masks on a few rows of each head.

    Attributes:
        layout: tile order.
        forced: (video blocks, video blocks) bool, kept by both masks.
        kept: video blocks in a row.
        masks: (2, video blocks, kept) int64, the blocks of `near` and of `across`, ascending.
        rows: (samples,) int64, slots of the queries that are tried.
        kept_keys: (2, samples, slots) bool, the keys that both masks keep for them.
        k_len: (blocks,) or (b, blocks) int32, tokens in each block, for each sample of a batch where they differ.
    """

    masks: torch.Tensor
    rows: torch.Tensor
    kept_keys: torch.Tensor
    k_len: torch.Tensor

    @classmethod
    def of(cls, layout: TokenLayout, forced: torch.Tensor, kept: int, rows: torch.Tensor) -> NearOrAcross:
        """Rank all tiles and mark the keys of the rows that are tried."""
        video, block = layout.video_blocks, layout.block
        masks = torch.stack([order[:, :kept].sort(dim=1).values for order in near_and_across(layout, forced)])
        maps = torch.zeros(2, video, layout.blocks, dtype=torch.bool)
        maps[:, :, video:] = True
        maps.scatter_(2, masks, True)
        keys = maps[:, rows // block].repeat_interleave(block, 2)[..., : layout.slots]
        return cls(layout, forced, kept, masks, rows, keys, layout.k_len)

    def forcing(self, forced: torch.Tensor, kept: int) -> NearOrAcross:
        """See `EqualRows`."""
        return self.of(self.layout, forced, kept, self.rows)

    def for_text(self, layout: TokenLayout) -> NearOrAcross:
        """See `patterns.plan.Select`. Padding is not looked at in any sample."""
        return replace(super().for_text(layout), k_len=layout.k_len)

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Choice:
        """See `patterns.plan.Select`."""
        # Not `layout.filled`, which is cached on first use: that cannot be asked for inside a compiled graph.
        slot = torch.arange(self.layout.slots, device=q.device)
        length = self.k_len.reshape(-1, self.layout.blocks)[:, slot // self.layout.block]
        # Samples are folded into heads, one after another.
        filled = (slot % self.layout.block < length).repeat_interleave(q.shape[2] // len(length), dim=0)
        value = torch.where(filled[..., None], v[0].transpose(0, 1), 0)
        # In q's own type, which the weights have for their product with the values anyway; sums are fp32.
        logits = (q[0, self.rows].transpose(0, 1) * q.shape[-1] ** -0.5) @ k[0].permute(1, 2, 0)
        weights = logits.masked_fill(~filled[:, None], -torch.inf).softmax(-1)
        each = torch.cat([weights, weights * self.kept_keys[0], weights * self.kept_keys[1]], 1)
        # A mask may miss all that a row looks at: in fp16 its weights are 0 then, and so is its output.
        mass = each.sum(-1, keepdim=True, dtype=torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
        output = (each @ value).float() / mass
        whole, near, across = output.unflatten(1, (3, -1)).unbind(1)
        errors = torch.stack([(output - whole).square().sum((1, 2)) for output in (near, across)])
        return Choice(rows_of(self.masks[errors.argmin(0)], self.layout))


@dataclass(frozen=True)
class SparseVideoGen:
    """Spatial or temporal attention, chosen online for each head.

    Attributes:
        samples: query rows on which heads are tried.
        sink_frames: first latent frames that every query sees, in whole tiles.
        seed: of the choice of these rows.
        block: slots of a block.
        reselect: how many steps a choice serves, or the steps at which it is made anew.
    """

    name: ClassVar[str] = "svg"
    per_site: ClassVar[bool] = False
    chooses: ClassVar[bool] = True

    samples: int = 32
    sink_frames: int = 1
    seed: int = 0
    block: int = 128
    reselect: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        check_reselect(self.name, self.reselect)
        if self.samples < 1:
            raise PatternError(f"svg samples={self.samples} was asked for; give 1 or more, usually 32")

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
        generator = torch.Generator().manual_seed(self.seed)
        # One row of each of equal stretches of the video.
        many = min(self.samples, layout.grid.tokens)
        place = (torch.arange(many) + torch.rand(many, generator=generator)) * (layout.grid.tokens / many)
        video = tiled.filled[: tiled.video_blocks * self.block].nonzero()[:, 0]
        rows = video[place.long().clamp(max=layout.grid.tokens - 1)]
        select = NearOrAcross.of(tiled, forced, kept, rows)
        rule = f"near or across, {kept} of {tiled.video_blocks} tiles of {described(tiled.tile)}"
        return dynamic_plan(select, density, rule, self.reselect).to(layout.device)


def near_and_across(layout: TokenLayout, forced: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(video blocks, video blocks) int64 twice: all tiles in the order in which each tile ranks them."""
    tiles, block = layout.video_blocks, layout.block
    length = layout.q_len[:tiles]
    missing = max(0, tiles * block - layout.slots)
    position = torch.nn.functional.pad(layout.positions[: tiles * block], (0, 0, 0, missing)).view(tiles, block, 3)
    token = torch.arange(block)[:, None] < length[:, None, None]
    centre = (position * token).sum(1).double() / length[:, None]
    apart = centre[:, None] - centre
    # Rounded, so that equally far tiles tie on every machine, and the lower index goes first.
    time, space = (
        distance.mul(1e6).round().masked_fill(forced, -1)
        for distance in (apart[..., 0].abs(), apart[..., 1:].norm(dim=-1))
    )
    return _ranked(time, space), _ranked(space, time)


def _ranked(first: torch.Tensor, then: torch.Tensor) -> torch.Tensor:
    """Columns of each row, sorted by one number and among equals by another."""
    order = then.argsort(dim=1, stable=True)
    return order.gather(1, first.gather(1, order).argsort(dim=1, stable=True))
