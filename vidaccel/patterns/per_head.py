"""Another pattern for each head.

Idea: heads of one layer look at different things, so that one shape for all keeps what some of them do not need.
Math: all heads share one token order, that of the first part which chooses from q and k, or of the first part of all.
    There, a part keeps the blocks that hold any pair of tokens that it keeps; only where no part chooses, and for the
    first, blocks are decided token by token.
Cost: the parts' own; where one chooses, a map of (heads, blocks, blocks) bytes a call.
Source: per-head windows of Sliding Tile Attention (arXiv 2502.04507, section 3.3); head classes of Sparse VideoGen
    (arXiv 2502.01776, section 3).
Limits: parts that move or merge tokens (ann, pyramid) have no common order with others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch

from ..blocks import BlockMask
from ..errors import PatternError
from ..grid import Site, TokenLayout
from ..ranks import HeadPart
from .combine import as_pattern, as_recipe, check_shared, reblocked
from .dynamic import EqualRows, rows_up_to
from .parameters import check_given, check_heads
from .plan import Choice, Pattern, Plan, Select


@dataclass(frozen=True, eq=False)
class HeadsChoose(Select):
    """Lets parts choose for their heads, and joins the rows of all.

    Attributes:
        layout: token order of all parts.
        fixed: (heads, video blocks, video blocks) bool, blocks of the heads whose part does not choose.
        own: for each part that chooses, (heads of it,) int64.
        parts: what chooses, in the same order.
        most: video blocks in the longest row.
    """

    fixed: torch.Tensor
    own: tuple[torch.Tensor, ...]
    parts: tuple[EqualRows, ...]
    most: int

    def to(self, device: torch.device | str) -> HeadsChoose:
        """See `patterns.plan.Select`."""
        own, parts = tuple(each.to(device) for each in self.own), tuple(each.to(device) for each in self.parts)
        return replace(self, layout=self.layout.to(device), fixed=self.fixed.to(device), own=own, parts=parts)

    def of_heads(self, part: HeadPart) -> HeadsChoose:
        """See `patterns.plan.Select`."""
        heads = self.fixed.shape[0]
        check_heads(PerHead.name, heads, part.total)
        if part.ranks is None:
            return self
        if any(getattr(each, "adaptive", False) for each in self.parts):
            raise PatternError(
                "per-head with an adaptive topk shares one threshold among the heads of that part, which are on "
                "several ranks; use adaptive=False, or topk alone"
            )
        mine = [each[(part.first <= each) & (each < part.end)] - part.first for each in self.own]
        left = [n for n, each in enumerate(mine) if len(each)]
        own, parts = tuple(mine[n] for n in left), tuple(self.parts[n] for n in left)
        return replace(self, fixed=self.fixed[part.first : part.end], own=own, parts=parts)

    def for_text(self, layout: TokenLayout) -> HeadsChoose:
        """See `patterns.plan.Select`."""
        return replace(super().for_text(layout), parts=tuple(part.for_text(layout) for part in self.parts))

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Choice:
        """See `patterns.plan.Select`."""
        heads = self.fixed.shape[0]
        samples = q.shape[2] // heads
        keep = self.fixed.repeat(samples, 1, 1)
        first = heads * torch.arange(samples, device=q.device)[:, None]
        for own, part in zip(self.own, self.parts, strict=True):
            mine = (first + own).flatten()
            chosen = part.choose(q[:, :, mine], k[:, :, mine], v[:, :, mine])
            keep = keep.index_copy(0, mine, chosen.mask.video_map() > 0)
        rows = (~keep).byte().argsort(dim=-1, stable=True)[..., : self.most]
        return Choice(rows_up_to(rows, keep.sum(-1), self.layout))


@dataclass(frozen=True)
class PerHead:
    """One of some patterns for each head.

    Attributes:
        parts: patterns, or their recipes such as {"name": "radial", "rule": "ranked"}. Each is given the density.
        heads: for each head, the number of its part; as many as the model has heads.
    """

    name: ClassVar[str] = "per-head"

    parts: tuple[Any, ...]
    heads: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(as_recipe(part) for part in self.parts))
        object.__setattr__(self, "heads", tuple(self.heads))
        check_shared(self.name, self.patterns)
        if set(self.heads) != set(range(len(self.parts))):
            raise PatternError(
                f"per-head heads {self.heads} were asked for with {len(self.parts)} parts; give each head the number "
                f"of its part, 0 to {max(len(self.parts) - 1, 0)}, and each part a head"
            )
        sizes = sorted({part.block for part in self.patterns})
        if len(sizes) > 1:
            raise PatternError(f"per-head parts with blocks of {sizes} were asked for; give all the same block")

    @cached_property
    def patterns(self) -> tuple[Pattern, ...]:
        """The parts, as patterns."""
        return tuple(as_pattern(part) for part in self.parts)

    @property
    def per_site(self) -> bool:
        """Some part differs between layers."""
        return any(part.per_site for part in self.patterns)

    @property
    def block(self) -> int:
        """Slots in a block."""
        return self.patterns[0].block

    def check(self, density: float | None) -> None:
        """See `Pattern.check`."""
        for part in self.patterns:
            check_given(part, density)

    def check_model(self, layers: int, heads: int) -> None:
        """See `Pattern`."""
        check_heads(self.name, len(self.heads), heads)

    def plan(self, layout: TokenLayout, density: float | None, site: Site) -> Plan:
        """Plan one layer; see `Pattern.plan`.

        Raises:
            PatternError: parts that have no common token order.
        """
        plans = [part.plan(layout.to("cpu"), density, site) for part in self.patterns]
        first = next((plan for plan in plans if plan.select is not None), plans[0])
        rule = ", ".join(f"{self.heads.count(n)} heads {plan.rule}" for n, plan in enumerate(plans))
        plan = (
            self._fixed(plans, density, rule) if first.select is None else self._choosing(plans, first, density, rule)
        )
        return plan.to(layout.device)

    def _choosing(self, plans: list[Plan], first: Plan, density: float | None, rule: str) -> Plan:
        """Rows of all heads, in the order of the first part that chooses."""
        video = first.layout.video_blocks
        fixed = torch.zeros(len(self.heads), video, video, dtype=torch.bool)
        own: list[torch.Tensor] = []
        choosing: list[EqualRows] = []
        kept: list[tuple[float, float]] = []
        most = 0
        for number, (part, plan) in enumerate(zip(self.patterns, plans, strict=True)):
            mine, select = torch.tensor([head for head, of in enumerate(self.heads) if of == number]), plan.select
            if select is None:
                mask = reblocked(plan.static, first.layout)
                fixed[mine] = (mask.video_map() > 0).expand_as(fixed)[mine]
                own_masks = [mask.of_heads(head, head + 1) for head in mine.tolist()]
                kept += [(each.density, each.visited) for each in own_masks]
                continue
            same = torch.equal(select.layout.order, first.layout.order)
            if not isinstance(select, EqualRows) or select.moves or not same:
                raise PatternError(
                    f"per-head part {part.name} moves or merges tokens, or has a tile order of its own, and all heads "
                    "of a layer share one; give it layers of its own with per-layer"
                )
            own.append(mine)
            choosing.append(select.of_heads(HeadPart.whole(len(mine))))
            kept += [(plan.delivered, plan.visited)] * len(mine)
            # Rows of one threshold may be longer than they are on average.
            most = max(most, video if getattr(select, "adaptive", False) else select.kept)
        most = max(most, int(fixed.sum(-1).max()))
        delivered, visited = (sum(each) / len(self.heads) for each in zip(*kept, strict=True))
        choose = HeadsChoose(first.layout, fixed, tuple(own), tuple(choosing), most)
        varies = any(plan.varies for plan in plans)
        return Plan(density, delivered, visited, None, rule, select=choose, reselect=first.reselect, varies=varies)

    def _fixed(self, plans: list[Plan], density: float | None, rule: str) -> Plan:
        """Masks of all heads, in the order of the first part."""
        first = plans[0].static
        masks = [first, *(reblocked(plan.static, first.layout) for plan in plans[1:])]
        # A part may differ between heads itself.
        maps = [mask.block_map().expand(len(self.heads), -1, -1) for mask in masks]
        kinds = torch.stack([maps[n][head] for head, n in enumerate(self.heads)])
        mask = BlockMask.of(kinds > 0, first.layout, partial=kinds == 1, window=first.window)
        notes = tuple(note for plan in plans for note in plan.notes)
        return Plan.of(mask, density, rule, notes)
