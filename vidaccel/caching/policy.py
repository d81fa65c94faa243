"""What a caching policy is: a frozen set of parameters that becomes an indicator, a gate and a predictor.

A parameter that is None takes the published value of the model at hand; `published.py` names the sources. Where nobody
published one for a model, a default of the same method is taken and the report says so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from ..errors import RecipeError
from ..schedule import Step
from .forecast import Ladder
from .gate import Caps, Rule
from .indicator import Indicator, Sizes

Base = Literal["nothing", "input", "first", "latent"]
"""What a forecast is added to. "nothing": the output of the last layer itself is forecast; "input", "first": what the
layers add to the input of the first layer, or to its output; "latent": what the transformer adds to its own input."""

Site = Literal["layer", "output"]
"""What is forecast: the output of the last layer, or what the transformer makes of it. The latter is of the latent's
size, 1 / 80 of the former for Wan 14B, and the model's last norm and modulation are forecast with it."""

Storage = Literal["auto", "bfloat16", "float32"]
STORAGE = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Parts:
    """What a policy is made of, for one model.

    Attributes:
        rule: when to skip.
        caps: limits of the rule.
        indicator: builds what the rule looks at; None for rules that follow a schedule.
        base: what a forecast is added to.
        ladder: builds the predictor of one branch.
        axis: its coordinate.
        notes: what to tell the user.
        learn: takes in, at a step computed right after another, the ratio of their magnitudes (mean over tokens of
            |y_k| / |y_k-1|, y what is forecast).
        site: what is forecast; the output wherever it is added to the latent.
    """

    rule: Rule
    caps: Caps
    indicator: Callable[[], Indicator] | None
    base: Base
    ladder: Callable[[], Ladder]
    axis: Literal["step", "sigma"]
    notes: tuple[str, ...] = ()
    learn: Callable[[Step, float], None] | None = None
    site: Site = "layer"

    def estimate(self, sizes: Sizes, branches: int) -> int:
        """Bytes that will be held: a ladder for each guidance branch, an indicator for the one that decides."""
        elements = sizes.latent if self.site == "output" else sizes.tokens * sizes.width
        held = branches * self.ladder().estimate(sizes.batch * elements, sizes.itemsize)
        return held + (self.indicator().estimate(sizes) if self.indicator else 0)


@dataclass(frozen=True, kw_only=True)
class CachePolicy(ABC):
    """What all policies share.

    Attributes:
        last: last steps that are computed.
        max_skips: longest run of forecast steps; None: any, or the published one.
        max_error: largest sum of the gate's numbers over a run of forecast steps.
        per_sample: the worst sample of a batch decides, rather than the batch as a whole.
        storage: type of what is kept; "auto" is the features' own, arithmetic is fp32 at least.
        max_gib: refuse to run where more memory would be held.
        shadow: every how many forecast steps one is also computed, to report the true error (and gain nothing); 0
            never.
        steps: denoising steps of the runs that its parameters were found on; a run of another number says so. None:
            nobody measured them.
    """

    name: ClassVar[str]

    last: int = 0
    max_skips: int | None = None
    max_error: float | None = None
    per_sample: bool = False
    storage: Storage = "auto"
    max_gib: float | None = None
    shadow: int = 0
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.storage not in STORAGE:
            raise RecipeError(f"cache storage {self.storage!r} is unknown; possible: {', '.join(STORAGE)}")
        for field in ("threshold", "max_error", "max_gib", "last", "max_skips", "shadow", "warmup", "reach"):
            value = getattr(self, field, None)
            if value is not None and not value >= 0:
                raise RecipeError(f"cache {self.name}: {field} is {value}; it is a number from 0")
        for field, least, most in (
            ("order", 0, 4),
            ("gate_order", 0, 4),
            ("interval", 1, 10_000),
            ("gate_stride", 1, 10_000),
        ):
            value = getattr(self, field, None)
            if value is not None and not least <= value <= most:
                raise RecipeError(f"cache {self.name}: {field} is {value}; it is a whole number from {least} to {most}")
        for field in ("coefficients", "ratios"):
            value = getattr(self, field, None)
            if value is not None and not (value and all(isinstance(number, (int, float)) for number in value)):
                raise RecipeError(f"cache {self.name}: {field} is {value}; it lists numbers")
        for field, possible in (
            ("form", ("newton", "taylor")),
            ("axis", ("step", "sigma")),
            ("site", ("layer", "output")),
        ):
            if getattr(self, field, possible[0]) not in possible:
                raise RecipeError(
                    f"cache {self.name}: {field} {getattr(self, field)!r} is unknown; possible: {', '.join(possible)}"
                )

    @abstractmethod
    def parts(self, model: str, trait: str) -> Parts:
        """Build for a model.

        Args:
            model: a name that its family gives it, such as "wan-t2v-14b".
            trait: "experts:high", "experts:low", or the resolution: "480p", "720p".
        """

    def limits(self, warmup: int | float, last: int | None = None, max_skips: int | None = None) -> Caps:
        """The caps of this policy, with the published ones where it has none of its own."""
        longest = max_skips if self.max_skips is None else self.max_skips
        return Caps(warmup, self.last if last is None else last, longest, self.max_error)

    def reuse(self) -> Ladder:
        """The predictor that repeats the last value."""
        return Ladder(0, storage=STORAGE[self.storage])

    def value(self, field: str, found: Mapping[str, Any], default: Any) -> Any:
        """A parameter: its own, the published one, or a default."""
        own = getattr(self, field)
        return found.get(field, default) if own is None else own

    def borrowed(self, model: str, instead: str, *fields: str) -> tuple[str, ...]:
        """What to say where nobody published parameters for a model: nothing, if all of these were given by hand."""
        return (unpublished(self.name, model, instead),) if None in map(self.__getattribute__, fields) else ()


def unpublished(name: str, model: str, instead: str) -> str:
    """What to say where a model's parameters are borrowed."""
    return f"nobody has published parameters of {name} for {model}: this run takes {instead}"
