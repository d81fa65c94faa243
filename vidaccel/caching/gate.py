"""When a step may be forecast rather than computed.

A gate is a rule and caps. The rule looks at one number, which an indicator has measured for this step; the caps hold
whatever the rule says. What is not a number (NaN, no history yet) always computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..errors import RecipeError
from ..schedule import Step


@dataclass(frozen=True)
class Decision:
    """What happens to a step.

    Attributes:
        skip: forecast it.
        error: the number that the rule compared with its threshold, None where there was none.
        why: the rule or cap that decided.
    """

    skip: bool
    error: float | None
    why: str


@dataclass(frozen=True)
class Caps:
    """Limits that hold whatever a rule says.

    Attributes:
        warmup: first steps that are computed; a fraction below 1 is a share of all steps, rounded down.
        last: last steps that are computed.
        max_skips: longest run of forecast steps.
        max_error: largest sum of the rule's numbers over one run of forecast steps.
    """

    warmup: int | float = 1
    last: int = 0
    max_skips: int | None = None
    max_error: float | None = None


class Rule(Protocol):
    """Wants to skip a step, or not."""

    def verdict(self, step: Step, error: float | None, run: int) -> tuple[bool, float | None]:
        """Look at one step.

        Args:
            step: the step.
            error: what the indicator measured, None where there is no indicator or no history.
            run: forecast steps since the last computed one.

        Returns:
            Whether to skip, and the number that decided.
        """
        ...

    def computed(self) -> None:
        """The step is computed, whoever decided it."""
        ...


class Below:
    """Skip where the error is below a threshold (CG-Taylor, first block cache)."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def verdict(self, step: Step, error: float | None, run: int) -> tuple[bool, float | None]:
        """See `Rule`."""
        return error is not None and error < self.threshold, error

    def computed(self) -> None:
        """Nothing is remembered."""


class Accumulated:
    """Skip until the changes, mapped by a polynomial, add up to a threshold (TeaCache, EasyCache)."""

    def __init__(self, threshold: float, coefficients: Sequence[float] = (1.0, 0.0)) -> None:
        """Args: threshold, and the polynomial's coefficients, highest power first."""
        self.threshold = threshold
        self.coefficients = coefficients
        self._total = 0.0

    def verdict(self, step: Step, error: float | None, run: int) -> tuple[bool, float | None]:
        """See `Rule`."""
        if error is None:
            return False, None
        mapped = 0.0
        for coefficient in self.coefficients:
            mapped = mapped * error + coefficient
        self._total += mapped
        return self._total < self.threshold, self._total

    def computed(self) -> None:
        """Start again from nothing."""
        self._total = 0.0


class Magnitude:
    """Skip while the product of known ratios |R_k| / |R_k-1| of residuals stays near 1 (MagCache).

    Math: a *= ratio_k, E += |1 - a|, skip where E < threshold.
    """

    def __init__(self, threshold: float, ratio: Callable[[Step], float | None]) -> None:
        """Args: threshold, and the function that knows the ratio of a step (None: compute)."""
        self.threshold = threshold
        self.ratio = ratio
        self._product, self._total = 1.0, 0.0

    def verdict(self, step: Step, error: float | None, run: int) -> tuple[bool, float | None]:
        """See `Rule`."""
        ratio = self.ratio(step)
        if ratio is None:
            return False, None
        self._product *= ratio
        self._total += abs(1 - self._product)
        return self._total < self.threshold, self._total

    def computed(self) -> None:
        """Start again from nothing."""
        self._product, self._total = 1.0, 0.0


class Interval:
    """Compute every n-th step (TaylorSeer)."""

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def verdict(self, step: Step, error: float | None, run: int) -> tuple[bool, float | None]:
        """See `Rule`."""
        return run < self.interval - 1, None

    def computed(self) -> None:
        """Nothing is remembered."""


class Recorded:
    """Compute the steps of a list."""

    def __init__(self, steps: Sequence[int], total: int | None = None) -> None:
        """Args: the steps, and of how many, where that matters."""
        self.steps = frozenset(steps)
        self.total = total

    def verdict(self, step: Step, error: float | None, run: int) -> tuple[bool, float | None]:
        """See `Rule`."""
        if self.total is not None and step.total not in (None, self.total):
            raise RecipeError(
                f"a schedule of {self.total} steps was recorded, but this run has {step.total}; record one for it, "
                "or run as many steps"
            )
        return step.index not in self.steps, None

    def computed(self) -> None:
        """Nothing is remembered."""


class Gate:
    """A rule under caps, through one trajectory."""

    def __init__(self, rule: Rule, caps: Caps) -> None:
        self.rule = rule
        self.caps = caps
        self.reset()

    def reset(self) -> None:
        """A new trajectory begins."""
        self._seen = self._run = 0
        self._spent = 0.0
        self.rule.computed()

    def decide(self, step: Step, error: float | None, ready: bool) -> Decision:
        """Decide one step; every step of a trajectory comes here once, in order.

        Args:
            step: the step.
            error: what the indicator measured.
            ready: there is a history to forecast from.

        Raises:
            RecipeError: a cap needs the number of steps, and nobody knows it.
        """
        decision = self._decide(step, error, ready)
        self._seen += 1
        if decision.skip:
            self._run += 1
            self._spent += decision.error or 0.0
        else:
            self._run, self._spent = 0, 0.0
            self.rule.computed()
        return decision

    def _decide(self, step: Step, error: float | None, ready: bool) -> Decision:
        caps = self.caps
        if step.total is None and (caps.last or isinstance(caps.warmup, float)):
            raise RecipeError(
                "the cache keeps the last steps or a share of the first ones, but the number of steps is unknown here; "
                "call the pipeline rather than its transformer, or set last=0 and warmup to a count"
            )
        total = step.total or 0
        if self._seen < (int(caps.warmup * total) if isinstance(caps.warmup, float) else caps.warmup):
            return Decision(False, error, "warm-up")
        if caps.last and step.index >= total - caps.last:
            return Decision(False, error, "last step")
        if not ready:
            return Decision(False, error, "no history")
        skip, value = self.rule.verdict(step, error, self._run)
        if not skip:
            return Decision(False, value, "rule" if value is None or math.isfinite(value) else "not a number")
        if caps.max_skips is not None and self._run >= caps.max_skips:
            return Decision(False, value, "longest run of skips")
        if caps.max_error is not None and self._spent + (value or 0.0) > caps.max_error:
            return Decision(False, value, "accumulated error")
        return Decision(True, value, "rule")


def relative(sums: torch.Tensor, per_sample: bool = False) -> float:
    """A relative error from its sums. Waits for the device.

    Args:
        sums: (2, b), numerators and denominators of each sample.
        per_sample: the worst sample counts; else the batch as a whole, in which many good samples hide a bad one.
    """
    over, under = sums if per_sample else sums.sum(1, keepdim=True)
    return float((over / under).max())
