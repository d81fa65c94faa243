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
        base: what the forecast is added to: "nothing", or "latent", as EasyCache does; then what is forecast is what
            the transformer adds to its latent, and the site is its output.
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
    base: Literal["nothing", "latent"] = "nothing"
    reach: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.computed or not all(isinstance(step, int) and step >= 0 for step in self.computed):
            raise RecipeError(f"cache replay: computed is {self.computed}; it lists step numbers, such as [0, 1, 4]")
        if self.base not in ("nothing", "latent"):
            raise RecipeError(f"cache replay: base {self.base!r} is unknown; possible: nothing, latent")

    def parts(self, model: str, trait: str) -> Parts:
        """See `CachePolicy.parts`."""
        return Parts(
            Recorded(self.computed, self.total),
            self.limits(0),
            None,
            self.base,
            lambda: Ladder(self.order, self.form, STORAGE[self.storage], self.reach),
            self.axis,
            site="output" if self.base == "latent" else self.site,
        )


def recorded(calls: Sequence[CallRecord], **settings: object) -> Replay:
    """The schedule of a run's last video, as a policy that repeats it (a recipe's `cache`, in YAML or JSON).

    Args:
        calls: `run.trace.calls`.
        settings: other parameters of `Replay`; for a run of EasyCache, base="latent" and order=0 repeat its video.

    Raises:
        RecipeError: nothing was cached in this run.
    """
    cached = [call for call in calls if call.cache_bytes is not None and not call.failed]
    if not cached:
        raise RecipeError("this run holds no cached call; record a schedule from a run with a cache")
    last = [call for call in cached if call.trajectory == cached[-1].trajectory]
    steps = tuple(sorted({call.step for call in last if not call.forecast}))
    return Replay(computed=steps, total=last[-1].total, **settings)  # type: ignore[arg-type]
