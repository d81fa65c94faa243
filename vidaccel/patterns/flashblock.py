"""A sparse pattern, and from an earlier step what it leaves out (FlashBlock beside a sparse pattern).

Idea: the pairs that a pattern drops matter less, so their part of attention may be a few steps old; the kept pairs are
    always fresh. Nothing is dropped, only late.
Math: with L the log-sum-exp of a set of keys, the rest follows from everything and from what is kept:
    p = exp(L_kept - L_all);   L_rest = L_all + log(1 - p);   A_rest = (A_all - p A_kept) / (1 - p)
    and attention at a later step is merge((A_kept, L_kept) now, (A_rest, L_rest) then). Where 1 - p < 1e-4 there is no
    rest: rounding would be all of it. How far off a head is, is measured on some rows that see everything anew
    (`reuse.flashblock.late_error`); heads above `threshold` are computed whole, and kept, at once.
Density: a call in `every` is dense and keeps its rest, so that the pattern is given (density - 1 / every) /
    (1 - 1 / every), and the whole run spends what was asked for. Heads that had to be computed whole come on top, and
    the trace counts them.
Cost: a call that keeps its rest costs dense attention and the sparse one; the others the sparse one, `probe` rows, and
    two passes over the output. Memory: one attention output and LSE for each layer and guidance branch (Wan 1.3B at
    480p: 99 MiB each in 16 bits).
Source: FlashBlock, arXiv 2602.05305, which reports such a combination for language models; for videos that see all
    frames at once, the rest, its dense refresh and the probe are derived here.
Limits: guidance branches must be told apart. Parts that move or merge tokens (ann, tempcache, pyramid) do not say
    what they leave out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch

from ..blocks import BlockMask
from ..errors import PatternError
from ..grid import Site, TokenLayout, VideoGrid
from ..ranks import HeadPart
from .combine import as_pattern, as_recipe, check_shared
from .parameters import check_density, check_given
from .plan import Choice, Pattern, Plan, Residual, Select


@dataclass(frozen=True, eq=False)
class Kept(Select):
    """What a part keeps, as a choice that serves several steps.

    Attributes:
        layout: the part's token order.
        mask: its blocks, where it does not choose.
        part: what chooses them, where it does.
    """

    mask: BlockMask | None
    part: Select | None

    def of_heads(self, part: HeadPart) -> Kept:
        """See `patterns.plan.Select`."""
        mask = self.mask and self.mask.of_heads(part.first, part.end)
        return replace(self, mask=mask, part=self.part and self.part.of_heads(part))

    def for_text(self, layout: TokenLayout) -> Kept:
        """See `patterns.plan.Select`."""
        return replace(super().for_text(layout), part=self.part and self.part.for_text(layout))

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Choice:
        """See `patterns.plan.Select`."""
        if self.part is not None:
            mask = self.part.choose(q, k, v).mask
        else:
            assert self.mask is not None
            mask = self.mask
            if mask.heads > 1:
                mask = BlockMask.stacked([mask] * (q.shape[2] // mask.heads))
        # Lengths of this call's text, which the part does not know.
        return Choice(BlockMask(mask.ptr, mask.idx, mask.n_full, self.layout, mask.window))


@dataclass(frozen=True)
class FlashBlock:
    """A pattern, and its rest from an earlier step.

    Attributes:
        part: the pattern that is always fresh, or the recipe of one; it must not move or merge tokens.
        every: how many steps a rest serves.
        threshold: relative error of a head's output from which it is computed whole; 0 does so always.
        probe: rows of the video that see everything anew at every step, to measure it.
    """

    name: ClassVar[str] = "flashblock"
    chooses: ClassVar[bool] = True

    part: Any = "topk"
    every: int = 5
    threshold: float = 0.3
    probe: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "part", as_recipe(self.part))
        check_shared(self.name, self.patterns)
        if self.every < 2 or self.probe < 1 or not self.threshold >= 0:
            raise PatternError(
                f"flashblock every={self.every}, threshold={self.threshold}, probe={self.probe} was asked for; every "
                "starts at 2 steps, threshold at 0, probe at 1 row"
            )

    @cached_property
    def pattern(self) -> Pattern:
        """The part, as a pattern."""
        return as_pattern(self.part)

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """The part alone, as patterns of several parts have theirs."""
        return (self.pattern,)

    @property
    def per_site(self) -> bool:
        """The part's own."""
        return self.pattern.per_site

    @property
    def block(self) -> int:
        """Slots in a block."""
        return self.pattern.block

    def check(self, density: float | None) -> None:
        """See `Pattern.check`."""
        check_density(density)
        share = 1 / self.every
        if density is not None and density <= share:
            raise PatternError(
                f"density {density} was asked of flashblock, whose dense calls, one in {self.every}, take {share:.3f} "
                f"already; ask for more, or for every={int(2 / density)} or above"
            )
        try:
            check_given(self.pattern, self._left(density))
        except PatternError as error:
            raise self._refused(error, density) from None

    def _left(self, density: float | None) -> float | None:
        """What the dense calls leave the part of a density."""
        share = 1 / self.every
        return None if density is None else (density - share) / (1 - share)

    def _refused(self, error: PatternError, density: float | None) -> PatternError:
        """What the part cannot do, in terms of what was asked of the whole."""
        left = self._left(density)
        given = "" if left is None else f" is given {left:.3g} of density {density:g}, the rest pays for dense calls"
        return PatternError(f"flashblock's part {self.pattern.name}{given}: {error}")

    def plan(self, layout: TokenLayout, density: float | None, site: Site) -> Plan:
        """Plan one layer; see `Pattern.plan`.

        Raises:
            PatternError: a density that the dense calls exceed, or a part that moves or merges tokens.
        """
        self.check(density)
        share = 1 / self.every
        try:
            part = self.pattern.plan(layout.to("cpu"), self._left(density), site)
        except PatternError as error:
            raise self._refused(error, density) from None
        if getattr(part.select, "moves", False) or part.scale != 1:
            raise PatternError(
                f"flashblock was asked for beside {self.pattern.name}, which moves or merges tokens or changes logits: "
                "what it leaves out is not known. Take a part that keeps blocks, such as topk, light-forcing or radial"
            )
        made = part.layout
        count = min(self.probe, made.grid.tokens)
        # Text sees everything anyway, so that its rows would measure nothing.
        first = made.text if made.text_first else 0
        rows = made.slot_of[first + torch.arange(count) * made.grid.tokens // count]
        few = TokenLayout.of(VideoGrid(1, 1, count), block=made.block)
        plan = Plan(
            density,
            share + (1 - share) * part.delivered,
            share + (1 - share) * part.visited,
            None,
            f"{part.rule}; the rest from one step in {self.every}",
            (*part.notes, f"flashblock's rest takes {made.slots} x heads x head dim values a layer and branch"),
            select=Kept(made, part.mask, part.select),
            reselect=self.every,
            varies=True,
            residual=Residual(self.threshold, rows, few, torch.tensor(part.delivered)),
        )
        return plan.to(layout.device)
