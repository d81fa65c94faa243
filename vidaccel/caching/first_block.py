"""First block cache: reuse while the first layer adds the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .gate import Below
from .indicator import Change
from .policy import CachePolicy, Parts
from .published import FIRST_BLOCK, published


@dataclass(frozen=True, kw_only=True)
class FirstBlock(CachePolicy):
    """First block cache (ParaAttention, diffusers): reuse what the other layers add while the first one adds the same.

    Attributes:
        threshold: relative change of the first layer's residual since the last computed step. 0.05, HunyuanVideo 0.06.
        warmup: first steps that are computed.
    """

    name: ClassVar[str] = "first-block"

    threshold: float | None = None
    warmup: int = 1

    def parts(self, model: str, trait: str) -> Parts:
        """See `CachePolicy.parts`."""
        known = published(FIRST_BLOCK, model, trait) or {}
        return Parts(
            Below(self.value("threshold", known, 0.05)),
            self.limits(self.warmup),
            lambda: Change("residual", every_step=False),
            "first",
            self.reuse,
            "step",
        )
