"""Steps placed beforehand: many at the start, where features jump, then ever farther apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import RecipeError
from ..schedule import Step
from .forecast import Ladder
from .policy import STORAGE, CachePolicy, Parts, Site


@dataclass(frozen=True, kw_only=True)
class Placed(CachePolicy):
    """Compute a share of the steps, placed by `placed`, and repeat what the last computed one gave in between.

    No gate: the number of computed steps is known before the run, the same for every prompt and rank, and nothing waits
    for the device. At a quarter of 50 steps it was nearest to the video without a cache of all that was measured, on
    three small models (37.8 to 39.3 dB), and on wan-tiny at a third (46.7 dB), too; on the two with joint attention
    `cg-taylor` had three and four clips more that show what was asked for (`samples/models/*/README.md`).

    Attributes:
        share: of the steps that is computed, rounded down to whole steps.
        end: where the last computed step stands, a share of all.
        order: order of the forecast. 0 repeats: lines through two of the first steps, which still jump, carry that far.
        site: what is forecast, the last layer's output or the transformer's, which takes far less memory.
    """

    name: ClassVar[str] = "placed"

    share: float = 0.25
    end: float = 0.9
    order: int = 0
    site: Site = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("share", "end"):
            if not 0 < getattr(self, field) <= 1:
                raise RecipeError(f"cache placed: {field} is {getattr(self, field)}; it lies between 0 and 1")

    def parts(self, model: str, trait: str) -> Parts:
        """See `CachePolicy.parts`."""
        return Parts(
            Placement(self.share, self.end),
            self.limits(0),
            None,
            "nothing",
            lambda: Ladder(self.order, storage=STORAGE[self.storage]),
            "step",
            site=self.site,
        )


class Placement:
    """The rule of `Placed`: compute what `placed` names for the run's number of steps."""

    def __init__(self, share: float, end: float) -> None:
        self.share = share
        self.end = end

    def verdict(self, step: Step, error: float | None, run: int) -> tuple[bool, float | None]:
        """See `Rule`.

        Raises:
            RecipeError: the number of steps is unknown, or its share cannot be placed.
        """
        if step.total is None:
            raise RecipeError(
                "cache placed computes a share of the steps, but their number is unknown here; call the pipeline "
                "rather than its transformer, or take replay with a list of steps"
            )
        return step.index not in placed(step.total, max(1, int(self.share * step.total)), end=self.end), None

    def computed(self) -> None:
        """Nothing is remembered."""


def placed(steps: int, computed: int | None = None, *, first: int | None = None, end: float = 0.9) -> tuple[int, ...]:
    """Well placed steps: the first ones, where features jump, then ever farther apart.

    With `order=0` and the default, 12 of 50 steps, wan-tiny had 122 clips right where it has 123 without a cache, and
    on other prompts 120 as without; every gate lost five or more there. hunyuan-tiny had 101 of 110 and cogvideox-tiny
    114 of 118, where the best gates have 110 and 117 (their cards).

    Args:
        steps: denoising steps of a video.
        computed: how many of them are computed; None is a quarter.
        first: how many of these come first, without a gap; None is a little more than half.
        end: where the last computed step stands, a share of all; the steps behind it are forecast.

    Raises:
        RecipeError: numbers that leave nothing to place.
    """
    count = max(1, steps // 4) if computed is None else computed
    start = min(count, (7 * count + 11) // 12 if first is None else first)
    if not (1 <= start <= count <= steps and 0 < end <= 1 and end * (steps - 1) >= count - 1):
        raise RecipeError(
            f"{count} of {steps} steps, {start} of them first and the last one at {end} of all, cannot be placed; "
            "compute fewer, begin with at least one, and end between 0 and 1"
        )
    last, rest = end * (steps - 1), count - start
    chosen = list(range(start))
    for n in range(1, rest + 1):
        chosen.append(max(chosen[-1] + 1, round(start - 1 + (last - start + 1) * (n / rest) ** 1.4)))
    return tuple(chosen)
