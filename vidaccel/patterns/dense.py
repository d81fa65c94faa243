"""Every pair of tokens: the baseline, measured through the same door as the sparse patterns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..blocks import BlockMask
from ..grid import Site, TokenLayout
from .plan import Plan


@dataclass(frozen=True)
class Dense:
    """All pairs.

    Under `accelerate` a dense layer runs on the pipeline's own backend, and no plan is made. The plan below exists for
    those who want a sparse kernel to run on every block, such as tests.
    """

    name: ClassVar[str] = "dense"
    per_site: ClassVar[bool] = False
    block: int = 128

    def plan(self, layout: TokenLayout, density: float | None, site: Site) -> Plan:
        """Every block of every row."""
        every = torch.ones(layout.blocks, layout.blocks, dtype=torch.bool, device=layout.device)
        return Plan.of(BlockMask.of(every, layout), density, rule="every block")
