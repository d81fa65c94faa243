"""CG-Taylor: a forecast, gated by the error of a cheap twin of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from .forecast import Form, Ladder
from .gate import Below
from .indicator import ForecastError
from .policy import STORAGE, CachePolicy, Parts, Site, unpublished
from .published import CG_TAYLOR, published


@dataclass(frozen=True, kw_only=True)
class CGTaylor(CachePolicy):
    """CG-Taylor ("Forecasting When to Forecast", arXiv 2508.02240): trust a forecast where a cheap twin of it is right.

    The first layer's output is forecast and computed; where its relative error is below the threshold, the last layer's
    output is forecast too and everything between is skipped. The uncond branch follows the cond branch's decision and
    then runs no layer at all.

    Attributes:
        threshold: relative error of the first layer's forecast, from 0. Wan 0.18 (0.36 "fast"), HunyuanVideo 0.08.
        warmup: first steps that are computed.
        gate_order: order of the first layer's forecast.
        order: order of the last layer's forecast.
        form: "newton" (exact on irregular steps) or "taylor" (the authors').
        axis: forecast along the step's index, or along sigma.
        site: what is forecast, the last layer's output or the transformer's, which takes far less memory.
        gate_stride: the gate looks at every n-th token.
    """

    name: ClassVar[str] = "cg-taylor"

    threshold: float | None = None
    warmup: int | None = None
    last: int = 1
    gate_order: int | None = None
    order: int | None = None
    form: Form = "newton"
    axis: Literal["step", "sigma"] = "step"
    site: Site = "layer"
    gate_stride: int = 1

    def parts(self, model: str, trait: str) -> Parts:
        """See `CachePolicy.parts`."""
        found = published(CG_TAYLOR, model, trait)
        known = found or CG_TAYLOR["wan"]
        storage = STORAGE[self.storage]
        gate_order, order = self.value("gate_order", known, 3), self.value("order", known, 1)
        return Parts(
            Below(self.value("threshold", known, None)),
            self.limits(self.value("warmup", known, 6)),
            lambda: ForecastError(gate_order, self.form, storage, self.gate_stride),
            "nothing",
            lambda: Ladder(order, self.form, storage),
            self.axis,
            () if found else (unpublished(self.name, model, "those of Wan 2.1"),),
            site=self.site,
        )
