"""When a layer runs sparse: (step, layer, branch, expert) -> density, or dense."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import RecipeError

DENSE = 1.0
# Guiders of diffusers know variants such as cond_skip, and pipelines that guide in one call name it cond_uncond.
_BRANCH = re.compile(r"(un)?cond(_\w+)?")


@dataclass(frozen=True)
class Step:
    """Where a call stands in its trajectory.

    Attributes:
        index: denoising step, from 0.
        total: steps of the trajectory, None where unknown (processors installed by hand).
        sigma: noise level in [0, 1].
        new_trajectory: this call starts one.
    """

    index: int
    total: int | None
    sigma: float
    new_trajectory: bool


@dataclass(frozen=True)
class Schedule:
    """Dense where quality is decided, sparse elsewhere.

    Whole numbers count steps; fractions below 1 are shares of all steps, rounded to the nearest step. The first steps
    fix a video's layout: authors of sparse patterns keep about a quarter of them dense (Radial Attention's scripts: 12
    of 50). Dense last steps remove glitches at the borders of a frame.

    Attributes:
        dense_steps: first steps that run dense.
        dense_last_steps: last steps that run dense.
        dense_layers: the first n layers, or a tuple of layer numbers (negative ones count from the end).
        branch: density of single guidance branches, such as {"uncond": 0.15}; 1 is dense.
        expert: density of single experts of Wan 2.2, {"high": 1} or {"low": 0.3}.
        even_if_slower: run sparse even where a pattern would lose to dense attention, by estimate; otherwise such
            layers run dense, and the run says so.
    """

    dense_steps: int | float = 0
    dense_last_steps: int | float = 0
    dense_layers: int | tuple[int, ...] = 0
    branch: Mapping[str, float] = field(default_factory=dict)
    expert: Mapping[str, float] = field(default_factory=dict)
    even_if_slower: bool = False

    def __post_init__(self) -> None:
        for name in ("dense_steps", "dense_last_steps"):
            value = getattr(self, name)
            if not value >= 0 or (isinstance(value, float) and value > 1):
                raise RecipeError(f"{name}={value} was asked for; give a count of steps, or a fraction in [0, 1]")
        if not isinstance(self.dense_layers, int):
            if not all(type(n) is int for n in self.dense_layers):
                raise RecipeError(f"dense_layers={self.dense_layers} was asked for; it takes whole numbers of layers")
            object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        elif self.dense_layers < 0:
            raise RecipeError(
                f"dense_layers={self.dense_layers} was asked for; give a count, or a tuple such as (0, -1)"
            )
        for name in ("branch", "expert"):
            for key, value in getattr(self, name).items():
                if not (isinstance(value, (int, float)) and 0 < value <= 1):
                    raise RecipeError(f"{name} {key!r} has density {value!r}; a density lies in (0, 1], 1 is dense")
        if strange := [key for key in self.branch if not _BRANCH.fullmatch(str(key))]:
            raise RecipeError(f"branch {strange[0]!r} is unknown; guidance has 'cond' and 'uncond'")
        if unknown := set(self.expert) - {"high", "low"}:
            raise RecipeError(f"expert {sorted(unknown)[0]!r} is unknown; Wan 2.2 has 'high' and 'low' (noise)")

    @property
    def needs_total(self) -> bool:
        """The number of steps must be known."""
        return self.dense_last_steps > 0 or isinstance(self.dense_steps, float)

    def density(
        self, step: Step, layer: int, layers: int, branch: str | None, expert: str | None, density: float | None
    ) -> float | None:
        """Density of one layer in one call.

        Args:
            step: where the trajectory stands.
            layer: number of the layer among `layers`.
            layers: how many layers the transformer has.
            branch: guidance branch, None where unknown.
            expert: "high", "low" or None.
            density: the run's density; None means that the pattern's own parameters decide.

        Returns:
            `DENSE` (1.0), a density, or None (the pattern's own). Where branch and expert both name one, the larger
            counts.

        Raises:
            RecipeError: the schedule needs the number of steps and nobody knows it.
        """
        if self.needs_total and step.total is None:
            raise RecipeError(
                "the schedule has fractions or dense last steps, but the number of steps is unknown here; "
                "pass num_inference_steps=, or use vidaccel.accelerate(pipe, ...)"
            )
        total = step.total or 0
        last = _count(self.dense_last_steps, total)
        if step.index < _count(self.dense_steps, total) or (last > 0 and step.index >= total - last):
            return DENSE
        if layer in self._layers(layers):
            return DENSE
        return self._named(branch, expert, density)

    def asked(self, expert: str | None, density: float | None) -> set[float | None]:
        """Every density that a sparse call may be asked for, from those of branch, expert and run; arguments as above.

        None stands for the pattern's own.
        """
        return {self._named(branch, expert, density) for branch in {"cond", "uncond", *self.branch}} - {DENSE}

    def covers(self, steps: int | None, layers: int) -> str | None:
        """What keeps every layer of every step dense, and what to do, in words; None where something may run sparse.

        Args:
            steps: of the trajectory, None where unknown.
            layers: of the transformer.
        """
        count = len(self._layers(layers))
        if count >= layers:
            what = f"dense_layers={self.dense_layers} is all of the {layers} layers of this transformer"
        elif steps is not None and _count(self.dense_steps, steps) + _count(self.dense_last_steps, steps) >= steps:
            what = f"dense_steps={self.dense_steps} and dense_last_steps={self.dense_last_steps} are all {steps} steps"
        else:
            return None
        return f"the schedule keeps everything dense, so that attention gains nothing: {what}; ask for fewer"

    def misses(self, branch: str | None) -> str | None:
        """That densities of branches have no effect where all are one call, or cannot be told apart; None elsewhere.

        Args:
            branch: guidance branch of a call, None where unknown.
        """
        if not self.branch or branch not in (None, "cond_uncond") or branch in self.branch:
            return None
        why = "cannot be told apart here" if branch is None else "come as one batch here, the branch 'cond_uncond'"
        return (
            f"the schedule gives branch {', '.join(self.branch)} a density, which has no effect: guidance branches "
            f"{why}; ask for one density= instead"
        )

    def _named(self, branch: str | None, expert: str | None, density: float | None) -> float | None:
        named = [table.get(key or "") for table, key in ((self.branch, branch), (self.expert, expert))]
        return max((value for value in named if value is not None), default=density)

    def _layers(self, layers: int) -> frozenset[int]:
        if isinstance(self.dense_layers, int):
            return frozenset(range(self.dense_layers))
        if outside := [n for n in self.dense_layers if not -layers <= n < layers]:
            raise RecipeError(f"dense layer {outside[0]} was asked for; this transformer has layers 0 to {layers - 1}")
        return frozenset(n % layers for n in self.dense_layers)


def check_schedule(value: Any) -> None:
    """Raise RecipeError unless it is a schedule."""
    if not isinstance(value, Schedule):
        raise RecipeError(
            f"schedule {value!r:.80} was given; it takes a vidaccel.Schedule, such as Schedule(dense_steps=0.25)"
        )


def _count(value: int | float, total: int) -> int:
    return round(value * total) if isinstance(value, float) else value
