"""Pyramid attention: what matters to a query is seen token by token, the rest as means of 2, 4 and 8 tokens.

Idea: a mean of h keys costs one key and stands for h of them, so a budget that would keep a quarter of the video covers
    nearly all of it.
Math: level h of a tile has the means of h neighbouring keys and of their values, with log(count) added to the logit:
    exp(<q, mean k> + log h) is what h equal keys would weigh. All levels share one softmax. A kernel block holds level
    h of h neighbouring tiles, so a row goes from coarse to fine: of all groups of 8 tiles, ranked by their best tile's
    <mean q, mean k>, it opens the first, keeps the next at level 8 and drops the rest; of the groups of 4 that it has
    opened it opens the best and keeps the others at level 4; and so on down to single tiles. With fractions f_h of the
    tiles at level h, density = sum f_h / h and coverage = sum f_h.
Cost: as many pairs as its density says, a copy of k and v for the means, and the selection of block top-k.
Source: Pyramid Sparse Attention, arXiv 2512.04025, section 3; fractions for a density as in its CogVideoX preset
    (.1/.15/.15/.35), which ranks each tile by itself.
Limits: neighbours in a tile are neighbours in its order. Its keys are no tokens, so that it joins no union.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch.nn.functional import pad

from ..blocks import BlockMask
from ..errors import PatternError
from ..grid import Site, TokenLayout
from ..kernels.select import block_scores, with_means
from ..order import described
from .dynamic import EqualRows, always_kept, check_dynamic, check_reselect, tile_layout
from .parameters import check_knob, check_sink
from .plan import Choice, Plan, Selection

LEVELS = (1, 2, 4, 8)
PUBLISHED = (0.1, 0.15, 0.15, 0.35)
"""Fractions of the tiles at each level: density 0.256, coverage 0.75."""


class Counts(NamedTuple):
    """What each row does.

    Attributes:
        open: groups of 8, of 4 and of 2 tiles that it opens; the last are seen token by token.
        coarse: groups of 8 tiles that it sees at level 8.
    """

    open: tuple[int, int, int]
    coarse: int

    @property
    def kept(self) -> tuple[int, int, int, int]:
        """Kernel blocks of each level, fine to coarse: what is opened and not opened further."""
        eight, four, two = self.open
        return 2 * two, 2 * four - two, 2 * eight - four, self.coarse

    @classmethod
    def of(cls, tiles: int, fractions: Sequence[float], least: tuple[int, int, int]) -> Counts:
        """Counts near some fractions of the tiles at each level, which keep as many blocks as those say.

        Args:
            tiles: video tiles.
            fractions: of the tiles at level 1, 2, 4 and 8.
            least: groups of 8, 4 and 2 tiles that must be opened.
        """
        groups = -(-tiles // 8)
        wanted = [share * tiles / level for share, level in zip(fractions, LEVELS, strict=True)]
        total = round(sum(wanted))
        # Each opened group has two parts: what is opened further, and what is kept at this level.
        four = max(least[1], -(-max(least[2], round(wanted[0] / 2)) // 2), round((wanted[1] + wanted[0] / 2) / 2))
        eight = min(groups, max(least[0], -(-four // 2), round((wanted[2] + four) / 2)))
        if least[2] + four + 2 * eight > total:
            # So few that the fractions give way: the fewest groups around what must be seen.
            four = max(least[1], -(-least[2] // 2))
            eight = max(least[0], -(-four // 2))
        four = min(four, 2 * eight)
        coarse = max(0, min(round(wanted[3]), groups - eight, total - least[2] - four - 2 * eight))
        two = max(least[2], min(2 * four, total - four - 2 * eight - coarse))
        # What all that is opened leaves goes to groups that are not.
        coarse += max(0, min(total - two - four - 2 * eight - coarse, groups - eight - coarse))
        return cls((eight, four, two), coarse)


@dataclass(frozen=True, eq=False)
class CoarseToFine(EqualRows):
    """Chooses a level for each group of tiles, and appends the means to the keys.

    Attributes:
        layout: tile order.
        forced: (video blocks, video blocks) bool, seen token by token.
        kept: kernel blocks of all levels in a row.
        counts: blocks of each level in a row.
        count: (means,) fp32, tokens in each mean of the levels 2, 4 and 8, one level after another.
        length: (blocks of means + 1,) int32, means in each block; the last block is empty.
    """

    moves: ClassVar[bool] = True
    biased: ClassVar[bool] = True

    counts: Counts
    count: torch.Tensor
    length: torch.Tensor

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Choice:
        """See `patterns.plan.Select`."""
        layout, (opened, coarse) = self.layout, self.counts
        scores = block_scores(q, k, layout)
        chosen = coarse_to_fine(scores, self.forced, opened, coarse, layout.blocks, len(self.length) - 1)
        return Choice(self._mask(chosen))

    def _mask(self, seen: torch.Tensor) -> BlockMask:
        """The mask of (h, video blocks, kept) key blocks. Text sees all tokens, and no mean."""
        layout, (heads, video, kept) = self.layout, seen.shape
        text = layout.blocks - video
        every = torch.arange(layout.blocks, device=seen.device).repeat(text).expand(heads, -1)
        count = torch.full((layout.blocks,), kept, device=seen.device)
        count[video:] = layout.blocks
        count = count.repeat(heads)
        ptr = pad(count.cumsum(0), (1, 0)).int()
        idx = torch.cat([seen.flatten(1), every], 1).flatten().int()
        given = layout.k_len if layout.k_len.ndim == 1 else layout.k_len[0]
        return BlockMask(ptr, idx, count.int(), layout, k_len=torch.cat([given, self.length]))

    def apply(self, choice: Choice, k: torch.Tensor, v: torch.Tensor) -> Selection:
        """See `patterns.plan.Select`."""
        given = self.layout.blocks * self.layout.block
        bias = pad(self.count.log(), (given, self.layout.block))[None, None]
        return Selection(choice.mask, with_means(k, self.layout), with_means(v, self.layout), bias)


@torch.library.custom_op("vidaccel::coarse_to_fine", mutates_args=())
def coarse_to_fine(
    scores: torch.Tensor, forced: torch.Tensor, opened: Sequence[int], coarse: int, blocks: int, means: int
) -> torch.Tensor:
    """The key blocks of each row, of all levels. An op, since sorts of a few hundred take torch.compile minutes.

    Args:
        scores: (h, video blocks, video blocks) fp32.
        forced: (video blocks, video blocks) bool, seen token by token.
        opened: groups of 8, of 4 and of 2 tiles that a row opens.
        coarse: groups of 8 that it sees at level 8.
        blocks: of the layout. Text follows the video's, and is seen by all; blocks of means follow it, level by level.
        means: blocks of means. One more block, which is empty, stands for tiles that do not exist.

    Returns:
        (h, video blocks, kept) int64, ascending.
    """
    video, device = scores.shape[-1], scores.device
    eight, *finer = opened
    groups = -(-video // 8)
    tiles = pad(scores.masked_fill(forced, torch.inf), (0, 8 * groups - video), value=-torch.inf)
    best = {level: tiles.unflatten(2, (-1, level)).amax(3) for level in LEVELS[1:]}
    rank = best[8].topk(eight + coarse, dim=-1).indices
    inside, kept = rank[..., :eight], [rank[..., eight:]]
    halves = torch.arange(2, device=device)
    for level, many in zip((4, 2), finer, strict=True):
        parts = (2 * inside[..., None] + halves).flatten(2)
        rank = parts.gather(2, best[level].gather(2, parts).argsort(dim=-1, descending=True, stable=True))
        inside, kept = rank[..., :many], [rank[..., many:], *kept]
    fine = (2 * inside[..., None] + halves).flatten(2)
    starts = [blocks + sum(8 * groups // below for below in LEVELS[1:level]) for level in (1, 2, 3)]
    text = torch.arange(video, blocks, device=device).expand(*scores.shape[:2], -1)
    found = [torch.where(fine < video, fine, blocks + means), text]
    found += [part + start for part, start in zip(kept, starts, strict=True)]
    return torch.cat(found, 2).sort(dim=2).values


@coarse_to_fine.register_fake
def _(
    scores: torch.Tensor, forced: torch.Tensor, opened: Sequence[int], coarse: int, blocks: int, means: int
) -> torch.Tensor:
    eight, four, two = opened
    kept = 2 * two + 2 * four - two + 2 * eight - four + coarse + blocks - scores.shape[-1]
    return scores.new_empty(*scores.shape[:2], kept, dtype=torch.int64)


@dataclass(frozen=True)
class Pyramid:
    """Pyramid attention by pooled scores.

    Attributes:
        levels: fractions of the tiles that a row sees at level 1, 2, 4 and 8. None: those of the density that is asked
            for, in published proportions; beyond the density at which these cover all, ever more at level 1.
        sink_frames: first latent frames that every query sees token by token, in whole tiles.
        block: slots of a block.
        reselect: how many steps a choice serves, or the steps at which it is made anew.
    """

    name: ClassVar[str] = "pyramid"
    per_site: ClassVar[bool] = False
    chooses: ClassVar[bool] = True

    levels: tuple[float, float, float, float] | None = None
    sink_frames: int = 0
    block: int = 128
    reselect: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        check_reselect(self.name, self.reselect)
        if self.levels is None:
            return
        object.__setattr__(self, "levels", tuple(self.levels))
        total = sum(self.levels)
        if len(self.levels) != len(LEVELS) or min(self.levels) < 0 or not 0 < total <= 1 + 1e-9:
            usual = "/".join(f"{share:g}" for share in PUBLISHED)
            raise PatternError(
                f"pyramid levels {self.levels} were asked for; give the fractions of the tiles seen at level 1, 2, 4 "
                f"and 8, from 0 on and at most 1 together, such as {usual}"
            )

    def check(self, density: float | None) -> None:
        """See `Pattern.check`."""
        check_knob(self.name, "levels", self.levels, density, "levels such as .1/.15/.15/.35")

    def plan(self, layout: TokenLayout, density: float | None, site: Site) -> Plan:
        """Plan all layers of one grid; see `Pattern.plan`.

        Raises:
            PatternError: levels and density together or neither, or a density that what is always kept exceeds.
        """
        self.check(density)
        check_sink(self.name, self.sink_frames, layout.grid)
        fractions = self.levels if density is None else fractions_for(density)
        assert fractions is not None
        asked = sum(share / level for share, level in zip(fractions, LEVELS, strict=True))
        check_dynamic(self.name, layout, asked)
        tiled = tile_layout(layout.to("cpu").tiled(None, self.block), self.sink_frames, asked)
        forced = always_kept(tiled, self.sink_frames)
        tiles, tokens = tiled.video_blocks, layout.grid.tokens
        grouped = pad(forced, (0, -tiles % 8))
        eight, four, two = (int(grouped.unflatten(1, (-1, level)).any(2).sum(1).max()) for level in (8, 4, 2))
        counts = Counts.of(tiles, fractions, (eight, four, two))
        kept = sum(counts.kept)
        if kept > max(round(asked * tiles), 1):
            raise PatternError(
                f"density {asked:.3g} was asked of pyramid, {round(asked * tiles)} of {tiles} blocks a row; the own "
                f"tile, those of the first frames, and what shares a group with them, are {kept} already: ask for "
                f"{kept / tiles:.3f} or more, for fewer sink_frames, or for smaller blocks"
            )
        means = [
            (pad(tiled.q_len[:tiles], (0, -tiles % 8))[:, None] - torch.arange(0, self.block, level)).clamp(0, level)
            for level in LEVELS[1:]
        ]
        # A block of level h holds h tiles of block / h means each; it ends with its last mean.
        place = torch.arange(1, self.block + 1)
        ends = [((count > 0).view(-1, self.block) * place).amax(1) for count in means]
        length = pad(torch.cat(ends), (0, 1)).int()
        count = torch.cat([each.flatten() for each in means]).float()
        select = CoarseToFine(tiled, forced, kept, counts, count, length)
        # What a block of each level holds on average: tokens, then means.
        held = [tokens / tiles] + [
            float((count > 0).sum()) / -(-tiles // level) for count, level in zip(means, LEVELS[1:], strict=True)
        ]
        delivered = sum(many * each for many, each in zip(counts.kept, held, strict=True)) / tokens
        shares = [many * level / tiles for many, level in zip(counts.kept, LEVELS, strict=True)]
        seen = ", ".join(f"{min(share, 1):.0%} at level {level}" for share, level in zip(shares, LEVELS, strict=True))
        rule = f"tiles of {described(tiled.tile)}: {seen}; covers {min(sum(shares), 1):.0%}"
        visited = kept * tiles * self.block**2 / tokens**2
        plan = Plan(density, delivered, visited, None, rule, select=select, reselect=self.reselect)
        return plan.to(layout.device)


def fractions_for(density: float) -> tuple[float, float, float, float]:
    """Fractions of the tiles at level 1, 2, 4 and 8 that make a density, in the published proportions.

    Beyond the density at which these cover all tiles, level 1 takes over from all of them alike.
    """
    whole = [share / sum(PUBLISHED) for share in PUBLISHED]
    full = math.fsum(share / level for share, level in zip(whole, LEVELS, strict=True))
    scale = min(density / full, (1 - density) / (1 - full))
    fine = 1 - scale if density > full else 0.0
    one, two, four, eight = (share * scale for share in whole)
    return one + fine, two, four, eight
