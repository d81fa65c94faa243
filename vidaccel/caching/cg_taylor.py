"""CG-Taylor: a forecast, gated by the error of a cheap twin of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from .forecast import Form, Ladder
from .gate import Below
from .indicator import ForecastError
from .policy import STORAGE, CachePolicy, Parts, Site
from .published import CG_TAYLOR, published


@dataclass(frozen=True, kw_only=True)
class CGTaylor(CachePolicy):
    """CG-Taylor ("Forecasting When to Forecast", arXiv 2508.02240): trust a forecast where a cheap twin of it is right.

    The first layer's output is forecast and computed; where its relative error is below the threshold, the last layer's
    output is forecast too and everything between is skipped. The uncond branch follows the cond branch's decision and
    then runs no layer at all.

    Taylor's form is the default, although Newton's is exact on more curves: published thresholds belong to it, and by
    PSNR to the video without a cache neither is clearly ahead at as many computed steps, on 128 prompts of three small
    models in 50 steps (`samples/models/*/reports/caches-h200.json`). wan-tiny: Taylor 42.6 dB at 32 % computed, Newton
    42.2. cogvideox-tiny: Taylor 39.0 dB at 28 %, Newton 37.0 at 26 % and 41.4 at 30 %. hunyuan-tiny: 34.0 and 35.3 dB
    at 24 %, then Taylor 37.4 at 26 % and Newton 39.2 at 28 %. At order 2 wan-tiny has 40.9 dB at 36 % with Taylor's,
    36.7 at 37 % with Newton's. At a threshold of 0.18 Taylor's computes 24 to 28 %, and of 128 clips two (wan-tiny),
    one (cogvideox-tiny) and five (hunyuan-tiny) fewer show what was asked for.

    It is not always the best: at 24 % `placed` has 3 to 6 dB more on all three, and on two of them three or four clips
    fewer that show what was asked for. Their cards say where what wins.

    Attributes:
        threshold: relative error of the first layer's forecast, from 0. Wan 0.18 (0.36 "fast"), HunyuanVideo 0.08. For
            CogVideoX nobody published one; Wan's did well on cogvideox-tiny.
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
            () if found else self.borrowed(model, "those of Wan 2.1", "threshold", "warmup", "gate_order", "order"),
            site=self.site,
        )
