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

    Taylor's form is the default, although Newton's is exact on more curves: published thresholds belong to it, and it
    was ahead where 50 steps were measured, on 128 prompts of wan-tiny, by PSNR to the video without a cache against the
    share of computed steps (`samples/models/*/reports/caches-h200.json`). At order 1, where only the gate differs:
    Taylor 42.6 dB at 32 %, Newton 40.4 dB at 30 % and 42.8 dB at 34 %. At order 2: Taylor 40.9 dB at 36 %,
    Newton 36.7 dB at 37 %. It is no law: on hunyuan-tiny, 30 steps, Taylor's is 2.5 dB ahead at 33 % and 2.6 dB behind
    at 40 %, on cogvideox-tiny, 20 steps, 1.1 and 1.6 dB behind at 50 and 55 %.

    Where no more than a quarter of the steps may be computed, `placed` was better than any gate.

    Attributes:
        threshold: relative error of the first layer's forecast, from 0. Wan 0.18 (0.36 "fast"), HunyuanVideo 0.08.
        warmup: first steps that are computed.
        gate_order: order of the first layer's forecast.
        order: order of the last layer's forecast.
        form: "taylor" (the authors') or "newton" (exact for polynomials on irregular steps).
        axis: forecast along the step's index, or along sigma.
        site: what is forecast, the last layer's output or the transformer's, which takes far less memory.
        gate_stride: the gate looks at every n-th token.
        reach: how far both forecasts go on, in gaps between the last two computed steps, before they stay what they
            are; None, the authors', is without end. See `forecast.py` for why 0.5 is a good one.
    """

    name: ClassVar[str] = "cg-taylor"

    threshold: float | None = None
    warmup: int | None = None
    last: int = 1
    gate_order: int | None = None
    order: int | None = None
    form: Form = "taylor"
    axis: Literal["step", "sigma"] = "step"
    site: Site = "layer"
    gate_stride: int = 1
    reach: float | None = None

    def parts(self, model: str, trait: str) -> Parts:
        """See `CachePolicy.parts`."""
        found = published(CG_TAYLOR, model, trait)
        known = found or CG_TAYLOR["wan"]
        storage = STORAGE[self.storage]
        gate_order, order = self.value("gate_order", known, 3), self.value("order", known, 1)
        return Parts(
            Below(self.value("threshold", known, None)),
            self.limits(self.value("warmup", known, 6)),
            lambda: ForecastError(gate_order, self.form, storage, self.gate_stride, self.reach),
            "nothing",
            lambda: Ladder(order, self.form, storage, self.reach),
            self.axis,
            () if found else (unpublished(self.name, model, "those of Wan 2.1"),),
            site=self.site,
        )
