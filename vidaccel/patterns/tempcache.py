"""What stays the same from frame to frame is one key: the most similar neighbours in time are merged, all others stay.

Idea: a still background gives nearly the same key in every frame; attending to one of them, counted as often, is
    enough.
Math: a link joins a key with the key at the same place in the next frame. Each head cuts its links to the most similar
    ones (cosine), just so many that density x tokens groups are left. A group is the mean of its keys and of its
    values, and log(size) on its logit: exactly what equal keys would weigh. Every query attends to every group.
Cost: d products a token, one sort of the links, sums along time, and a copy of k and v; then density x the pairs.
Source: TempCache of FAST-AR, arXiv 2602.01801, section 4.1, within one clip. There a threshold is fixed, and the latest
    key stands for a group; a mean is nearer where all frames are there at once, and a fixed number keeps shapes fixed.
Limits: at least one group a place, so density is no lower than 1 / frames. Its keys are no tokens: it joins no union.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize, pad

from ..blocks import BlockMask
from ..errors import PatternError
from ..grid import Site, TokenLayout
from .dynamic import EqualRows, check_dynamic, check_reselect
from .parameters import check_needed
from .plan import Choice, Plan, Selection


@dataclass(frozen=True, eq=False)
class SameOverTime(EqualRows):
    """Merges keys that hardly change.

    Attributes:
        layout: raster order.
        forced: (video blocks, video blocks) bool, nothing.
        kept: blocks of groups.
        groups: how many in each head.
        length: (kept,) int32, groups in each block.
    """

    moves: ClassVar[bool] = True
    biased: ClassVar[bool] = True

    groups: int
    length: torch.Tensor

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Choice:
        """See `patterns.plan.Select`; the choice's `k_order` is (1, groups, h), where each group starts."""
        unit = normalize(self._by_place(k).float(), dim=-1)
        alike = (unit[:, 1:] * unit[:, :-1]).sum(-1).flatten(0, 1).T
        places, frames, heads, _ = unit.shape
        links = torch.zeros_like(alike, dtype=torch.bool)
        most = alike.topk(places * frames - self.groups, dim=1, sorted=False).indices
        links = links.scatter(1, most, True).unflatten(1, (places, frames - 1))
        begins = pad(~links, (1, 0), value=True).flatten(1)
        # Stable, so that the groups come first, each where it was.
        starts = (~begins).byte().argsort(dim=1, stable=True)[:, : self.groups]
        return Choice(self._mask(heads), k_order=starts.T[None])

    def apply(self, choice: Choice, k: torch.Tensor, v: torch.Tensor) -> Selection:
        """See `patterns.plan.Select`."""
        assert choice.k_order is not None
        start = choice.k_order[0]
        tokens = self.layout.grid.tokens
        end = torch.cat([start[1:], torch.full_like(start[:1], tokens)]) - 1
        size = end - start + 1
        given = self.layout.blocks * self.layout.block
        bias = pad(size.float().log().T, (given, self.kept * self.layout.block - self.groups))[None]
        merged = [self._with_groups(x, start, end, size, given) for x in (k, v)]
        return Selection(choice.mask, merged[0], merged[1], bias)

    def _by_place(self, x: torch.Tensor) -> torch.Tensor:
        """(1, slots, h, d) -> (places, frames, h, d)."""
        grid = self.layout.grid
        video: torch.Tensor = x[0, : grid.tokens].unflatten(0, (grid.t, grid.frame))
        return video.transpose(0, 1)

    def _with_groups(
        self, x: torch.Tensor, start: torch.Tensor, end: torch.Tensor, size: torch.Tensor, given: int
    ) -> torch.Tensor:
        """(1, slots, h, d) -> what was given, holes filled up, and the means of the groups."""
        cells = self._by_place(x).float()
        # Sums up to each frame: a group's is a difference of two, whatever order a GPU adds in.
        upto = cells.cumsum(1).flatten(0, 1)
        first, last = (place[..., None].expand(-1, -1, x.shape[-1]) for place in (start, end))
        total = upto.gather(0, last) - upto.gather(0, first) + cells.flatten(0, 1).gather(0, first)
        means = (total / size[..., None]).to(x.dtype)
        rest = self.kept * self.layout.block - self.groups
        return torch.cat(
            [x, x.new_zeros(1, given - x.shape[1], *x.shape[2:]), pad(means, (0, 0, 0, 0, 0, rest))[None]], 1
        )

    def _mask(self, heads: int) -> BlockMask:
        """Video sees all groups and all text; text sees all tokens, and no group."""
        layout, device = self.layout, self.length.device
        video, blocks = layout.video_blocks, layout.blocks
        groups = torch.arange(blocks, blocks + self.kept, device=device)
        text = torch.arange(video, blocks, device=device)
        seen = torch.cat([text, groups]).repeat(video)
        every = torch.arange(blocks, device=device).repeat(blocks - video)
        count = torch.full((blocks,), len(text) + self.kept, device=device)
        count[video:] = blocks
        ptr = pad(count.cumsum(0), (1, 0)).int()
        given = layout.k_len if layout.k_len.ndim == 1 else layout.k_len[0]
        return BlockMask(
            ptr, torch.cat([seen, every]).int(), count.int(), layout, k_len=torch.cat([given, self.length])
        )


@dataclass(frozen=True)
class TempCache:
    """Merging of keys that stay the same over time.

    Attributes:
        block: slots of a block.
        reselect: how many steps a choice of groups serves, or the steps at which it is made anew.
    """

    name: ClassVar[str] = "tempcache"
    per_site: ClassVar[bool] = False
    chooses: ClassVar[bool] = True

    block: int = 128
    reselect: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        check_reselect(self.name, self.reselect)

    def check(self, density: float | None) -> None:
        """See `Pattern.check`."""
        check_needed(self.name, density)

    def plan(self, layout: TokenLayout, density: float | None, site: Site) -> Plan:
        """Plan all layers of one grid; see `Pattern.plan`.

        Raises:
            PatternError: no density, or one below one group a place.
        """
        wanted = check_dynamic(self.name, layout, density)
        raster = layout.to("cpu").tiled(None, self.block)
        grid = raster.grid
        groups = min(grid.tokens, round(wanted * grid.tokens))
        if groups < grid.frame:
            raise PatternError(
                f"density {wanted} was asked of tempcache; on a {grid} grid it merges along {grid.t} frames, so ask "
                f"for {1 / grid.t:.3f} or more"
            )
        kept = -(-groups // self.block)
        length = (groups - torch.arange(kept) * self.block).clamp(max=self.block).int()
        forced = torch.zeros(raster.video_blocks, raster.video_blocks, dtype=torch.bool)
        select = SameOverTime(raster, forced, kept, groups, length)
        visited = kept * raster.video_blocks * self.block**2 / grid.tokens**2
        rule = f"{groups} groups of {grid.tokens} keys, along {grid.t} frames"
        plan = Plan(density, groups / grid.tokens, visited, None, rule, select=select, reselect=self.reselect)
        return plan.to(layout.device)
