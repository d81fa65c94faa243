"""A recorded schedule, replayed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..errors import RecipeError
from ..trace import CallRecord
from .forecast import Form, Ladder
from .gate import Recorded
from .policy import STORAGE, CachePolicy, Parts, Site


@dataclass(frozen=True, kw_only=True)
class Replay(CachePolicy):
    """Compute the steps of a list and forecast the others: what another policy once decided, now the same every time.

    It needs no gate, so that ranks cannot disagree and nothing waits for the device.

    Attributes:
        computed: steps that are computed, from 0. `recorded` reads them from a run.
        total: of how many; another number is refused. None: any.
        order: order of the forecast of the last layer's output.
        form: its form.
        axis: forecast along the step's index, or along sigma.
        site: what is forecast, the last layer's output or the transformer's, which takes far less memory.
        reach: how far a forecast goes on, in gaps between the last two computed steps, before it stays what it is;
            None is without end.
    """

    name: ClassVar[str] = "replay"

    computed: tuple[int, ...]
    total: int | None = None
    order: int = 1
    form: Form = "newton"
    axis: Literal["step", "sigma"] = "step"
    site: Site = "layer"
    reach: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.computed or not all(isinstance(step, int) and step >= 0 for step in self.computed):
            raise RecipeError(f"cache replay: computed is {self.computed}; it lists step numbers, such as [0, 1, 4]")

    def parts(self, model: str, trait: str) -> Parts:
        """See `CachePolicy.parts`."""
        return Parts(
            Recorded(self.computed, self.total),
            self.limits(0),
            None,
            "nothing",
            lambda: Ladder(self.order, self.form, STORAGE[self.storage], self.reach),
            self.axis,
            site=self.site,
        )


def placed(steps: int, computed: int | None = None, *, first: int | None = None, end: float = 0.9) -> tuple[int, ...]:
    """Well placed steps for `Replay(computed=...)`: the first ones, where features jump, then ever farther apart.

    With `order=0` and the default, 12 of 50 steps, wan-tiny had 122 clips right where it has 123 without a cache, and
    on other prompts 120 as without; every gate that was measured lost four or more (its card).

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
            f"cache replay: {count} of {steps} steps, {start} of them first and the last one at {end} of all, cannot "
            "be placed; compute fewer, begin with at least one, and end between 0 and 1"
        )
    last, rest = end * (steps - 1), count - start
    chosen = list(range(start))
    for n in range(1, rest + 1):
        chosen.append(max(chosen[-1] + 1, round(start - 1 + (last - start + 1) * (n / rest) ** 1.4)))
    return tuple(chosen)


def recorded(calls: Sequence[CallRecord], **settings: object) -> Replay:
    """The schedule of a run's last video, as a policy that repeats it (a recipe's `cache`, in YAML or JSON).

    Args:
        calls: `run.trace.calls`.
        settings: other parameters of `Replay`.

    Raises:
        RecipeError: nothing was cached in this run.
    """
    cached = [call for call in calls if call.cache_bytes is not None and not call.failed]
    if not cached:
        raise RecipeError("this run holds no cached call; record a schedule from a run with a cache")
    last = [call for call in cached if call.trajectory == cached[-1].trajectory]
    steps = tuple(sorted({call.step for call in last if not call.forecast}))
    return Replay(computed=steps, total=last[-1].total, **settings)  # type: ignore[arg-type]
