"""What a pattern is, and what it hands to a processor."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple, Protocol

import torch

from ..blocks import BlockMask
from ..errors import PatternError
from ..grid import Site, TokenLayout


class Selection(NamedTuple):
    """What was chosen for one call; every sample of a batch counts as heads of its own.

    Attributes:
        mask: kept blocks of the queries and of the keys below.
        k: (1, slots, h, d), the keys that `mask` counts: those given, sorted or merged.
        v: (1, slots, h, d), their values.
        key_bias: (1, h or 1, slots) fp32, added to the logits of each key; None for none.
        order: (1, slots, h) int64, which of the given queries stands in each slot of each head; None where none moves.
    """

    mask: BlockMask
    k: torch.Tensor
    v: torch.Tensor
    key_bias: torch.Tensor | None = None
    order: torch.Tensor | None = None


class Select(Protocol):
    """Chooses blocks from q and k. A frozen dataclass of tensors and numbers, so that torch.compile can trace it."""

    @property
    def layout(self) -> TokenLayout:
        """Token order in which it is given q, k and v."""
        ...

    def to(self, device: torch.device | str) -> Select:
        """The same with its tensors on `device`."""
        ...

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Selection:
        """Choose for q, k, v (1, slots, h, d) in kernel order, batches folded into heads."""
        ...


@dataclass(frozen=True, eq=False)
class Plan:
    """How one layer attends: by a mask, or by one that is chosen at every call.

    Attributes:
        requested: the density that was asked for; None where the pattern's own parameters decide.
        delivered: fraction of video-video pairs that is kept.
        visited: video tiles touched x their area over all video-video pairs; this bounds speed.
        mask: the kept blocks, in the token order of `mask.layout`; None where `select` chooses them.
        rule: which of the pattern's rules made it, for the report.
        notes: what the user should know about it.
        select: chooses the blocks from q and k. The densities above then hold for every call, up to the lengths of
            clipped tiles.
    """

    requested: float | None
    delivered: float
    visited: float
    mask: BlockMask | None
    rule: str = ""
    notes: tuple[str, ...] = field(default=())
    select: Select | None = None

    @classmethod
    def of(cls, mask: BlockMask, requested: float | None, rule: str = "", notes: tuple[str, ...] = ()) -> Plan:
        """A plan around `mask`, its densities counted.

        Raises:
            PatternError: a query block that would attend to nothing.
        """
        if mask.has_empty_rows:
            raise PatternError(
                f"the pattern leaves a query block of the {mask.layout.grid} grid without any key; "
                "keep at least the own block of each row, or ask for a higher density"
            )
        return cls(requested, mask.density, mask.visited, mask, rule, notes)

    @property
    def layout(self) -> TokenLayout:
        """Token order of the call."""
        made = self.mask or self.select
        assert made is not None
        return made.layout

    @property
    def static(self) -> BlockMask:
        """The mask.

        Raises:
            PatternError: it is chosen anew at every call.
        """
        if self.mask is None:
            raise PatternError(
                f"blocks that are chosen from q and k ({self.rule}) cannot be joined with others; "
                "give each its own layers with per-layer"
            )
        return self.mask

    def to(self, device: torch.device | str) -> Plan:
        """The same plan with its tensors on `device`."""
        mask, select = self.mask and self.mask.to(device), self.select and self.select.to(device)
        return replace(self, mask=mask, select=select)


class Pattern(Protocol):
    """Which pairs of tokens attend. A frozen dataclass; its fields are the keys of a recipe.

    Attributes:
        name: what recipes and reports call it.
    """

    name: ClassVar[str]

    @property
    def per_site(self) -> bool:
        """Plans differ between layers, so that each is asked for its own."""
        ...

    @property
    def block(self) -> int:
        """Slots in a block."""
        ...

    def plan(self, layout: TokenLayout, density: float | None, site: Site) -> Plan:
        """Plan one layer.

        Args:
            layout: raster order, in blocks of `self.block`; the plan may use another order of the same tokens.
            density: wanted fraction of video-video pairs, in (0, 1); None lets the pattern's own parameters decide.
            site: the layer.
        """
        ...
