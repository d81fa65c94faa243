"""EasyCache: reuse what the transformer adds to its latent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .gate import Accumulated
from .indicator import OutputChange
from .policy import CachePolicy, Parts
from .published import EASYCACHE, published


@dataclass(frozen=True, kw_only=True)
class EasyCache(CachePolicy):
    """EasyCache (arXiv 2507.02860): reuse what the transformer adds to the latent while the output hardly changes.

    Attributes:
        threshold: sum of the foreseen changes. Wan 0.05, HunyuanVideo 0.025.
        warmup: first steps that are computed.
        last: last steps that are computed; 0 saves one: on hunyuan-tiny no clip is lost, and 0.5 dB (its card).
    """

    name: ClassVar[str] = "easycache"

    threshold: float | None = None
    warmup: int | None = None
    last: int = 1

    def parts(self, model: str, trait: str) -> Parts:
        """See `CachePolicy.parts`."""
        found = published(EASYCACHE, model, trait)
        known = found or EASYCACHE["wan"]
        return Parts(
            Accumulated(self.value("threshold", known, None)),
            self.limits(self.value("warmup", known, 10)),
            OutputChange,
            "latent",
            self.reuse,
            "step",
            () if found else self.borrowed(model, "those of Wan 2.1", "threshold", "warmup"),
            site="output",
        )
