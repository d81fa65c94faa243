"""What a pattern is, and what it hands to a processor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch

from ..blocks import BlockMask
from ..errors import PatternError
from ..grid import Site, TokenLayout


@dataclass(frozen=True, eq=False)
class Plan:
    """How one layer attends.

    Attributes:
        requested: the density that was asked for; None where the pattern's own parameters decide.
        delivered: fraction of video-video pairs that is kept.
        visited: video tiles touched x their area over all video-video pairs; this bounds speed.
        mask: the kept blocks, in the token order of `mask.layout`.
        rule: which of the pattern's rules made it, for the report.
    """

    requested: float | None
    delivered: float
    visited: float
    mask: BlockMask
    rule: str = ""
    notes: tuple[str, ...] = field(default=())

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
        return self.mask.layout

    def to(self, device: torch.device | str) -> Plan:
        """The same plan with its tensors on `device`."""
        mask = self.mask.to(device)
        return Plan(self.requested, self.delivered, self.visited, mask, self.rule, self.notes)


class Pattern(Protocol):
    """Which pairs of tokens attend. A frozen dataclass; its fields are the keys of a recipe.

    Attributes:
        name: what recipes and reports call it.
        per_site: plans differ between layers, so that each is asked for its own.
    """

    name: ClassVar[str]
    per_site: ClassVar[bool]

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
