"""MagCache: reuse by a magnitude schedule known beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..errors import RecipeError
from ..schedule import Step
from .gate import Magnitude
from .policy import CachePolicy, Parts, unpublished
from .published import MAGCACHE, MAGCACHE_RATIOS, published

_MEASURED = "ratios that the first video measures, computed in full"


@dataclass(frozen=True, kw_only=True)
class MagCache(CachePolicy):
    """MagCache (arXiv 2506.09045): reuse what all layers add while its magnitude, known beforehand, stays the same.

    Attributes:
        threshold: sum of the foreseen errors. Wan 1.3B 0.12, 14B 0.24, 2.2 A14B 0.06.
        max_skips: longest run of forecast steps. 4, 6 and 2.
        warmup: share of the steps that is computed first; with two experts, of each expert's half.
        ratios: the magnitude of each step's residual over that of the step before. None: the published ones, else the
            first video is computed in full and measures them.
    """

    name: ClassVar[str] = "magcache"

    threshold: float | None = None
    warmup: float | None = None
    ratios: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup is not None and self.warmup > 1:
            raise RecipeError(f"cache magcache: warmup is {self.warmup}; it is a share of the steps, from 0 to 1")

    def parts(self, model: str, trait: str) -> Parts:
        """See `CachePolicy.parts`."""
        expert = trait.partition(":")[2]
        found = published(MAGCACHE, model, trait) or MAGCACHE["wan"]
        known = self.ratios or published(MAGCACHE_RATIOS, model, trait) or ()
        ratios = Ratios(known)
        warmup = float(self.value("warmup", found, 0.2)) / (2 if expert else 1)
        if self.warmup is None and "i2v" in model and expert == "high":
            warmup = 1.0  # The authors compute all of this phase.
        return Parts(
            Magnitude(self.value("threshold", found, 0.24), ratios),
            self.limits(warmup, max_skips=found["max_skips"]),
            None,
            "input",
            self.reuse,
            "step",
            () if known else (unpublished(self.name, model, _MEASURED),),
            None if known else ratios.learn,
        )


class Ratios:
    """The ratio of each step: resampled from another number of steps, or measured.

    What one trajectory has measured counts from the next one on, for the same number of steps, and is never measured
    again: else a video would depend on those before it.
    """

    def __init__(self, known: Sequence[float]) -> None:
        self._known = tuple(known)
        self._measured: dict[int, float] = {}
        self._frozen: dict[int, float] = {}
        self._last: tuple[int, int | None] = (0, None)

    def learn(self, step: Step, ratio: float) -> None:
        """Take in what was measured at a step."""
        self._follow(step)
        self._measured.setdefault(step.index, ratio)

    def __call__(self, step: Step) -> float | None:
        """The ratio of a step, the nearest one where the numbers of steps differ; None while it is unknown."""
        if not self._known:
            self._follow(step)
            return self._frozen.get(step.index)
        most = len(self._known) - 1
        total = step.total or len(self._known)
        return self._known[min(most, round(step.index * most / max(1, total - 1)))]

    def _follow(self, step: Step) -> None:
        index, total = self._last
        if step.total != total:
            self._measured, self._frozen = {}, {}
        elif step.index < index:
            self._frozen = dict(self._measured)
        self._last = (step.index, step.total)
