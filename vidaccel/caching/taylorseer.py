"""TaylorSeer: a forecast at fixed intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from .forecast import Form, Ladder
from .gate import Interval
from .policy import STORAGE, CachePolicy, Parts, Site


@dataclass(frozen=True, kw_only=True)
class TaylorSeer(CachePolicy):
    """TaylorSeer (arXiv 2503.06923): compute every n-th step, forecast the others.

    The authors forecast every module of every layer, 3 tensors a layer and order; here the last layer's output is
    forecast, which holds 1 / (3 x layers) of the memory.

    Attributes:
        interval: compute every n-th step.
        warmup: first steps that are computed.
        order: order of the forecast.
        form: "taylor" (the authors') or "newton".
        axis: forecast along the step's index, or along sigma.
        site: what is forecast, the last layer's output or the transformer's, which takes far less memory.
    """

    name: ClassVar[str] = "taylorseer"

    interval: int = 5
    warmup: int = 1
    order: int = 1
    form: Form = "taylor"
    axis: Literal["step", "sigma"] = "step"
    site: Site = "layer"

    def parts(self, model: str, trait: str) -> Parts:
        """See `CachePolicy.parts`."""
        return Parts(
            Interval(self.interval),
            self.limits(self.warmup),
            None,
            "nothing",
            lambda: Ladder(self.order, self.form, STORAGE[self.storage]),
            self.axis,
            site=self.site,
        )
