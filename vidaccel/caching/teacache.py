"""TeaCache: reuse until the time embedding has changed enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .gate import Accumulated
from .indicator import Change
from .policy import CachePolicy, Parts
from .published import TEACACHE, published


@dataclass(frozen=True, kw_only=True)
class TeaCache(CachePolicy):
    """TeaCache (arXiv 2411.19108): reuse what all layers add until the time embedding has changed by so much.

    Attributes:
        threshold: sum of the mapped changes. Wan 1.3B 0.05 (fast 0.1), 14B 0.1 (0.2), image to video 0.2 (0.3).
        warmup: first steps that are computed.
        coefficients: the polynomial that maps changes, highest power first. None: the published one, else the identity.
    """

    name: ClassVar[str] = "teacache"

    threshold: float | None = None
    warmup: int | None = None
    coefficients: tuple[float, ...] | None = None

    def parts(self, model: str, trait: str) -> Parts:
        """See `CachePolicy.parts`."""
        # Wan 2.2's experts are of Wan 2.1's architecture, but other weights.
        found = None if trait.startswith("experts") else published(TEACACHE, model, trait)
        known = found or {}
        return Parts(
            Accumulated(self.value("threshold", known, 0.1), self.value("coefficients", known, (1.0, 0.0))),
            self.limits(self.value("warmup", known, 1), max(self.last, known.get("last", 0))),
            lambda: Change("modulation", every_step=True),
            "input",
            self.reuse,
            "step",
            () if found else self.borrowed(model, "the identity for its polynomial", "coefficients"),
        )
