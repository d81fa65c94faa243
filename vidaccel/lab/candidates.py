"""What a search tries: where it begins, and one knob turned a little further."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

from ..caching import POLICIES, CachePolicy
from ..caching.calibration import usual_threshold
from ..errors import UsageError
from ..patterns import PATTERNS, Pattern
from ..recipe import Recipe
from ..schedule import Schedule
from .judge import Candidate

# Patterns that need nothing but a density, and policies that need nothing that the first video must measure.
SINGLE = ("radial", "neighborhood", "sliding-window", "topk", "svg", "ann", "light-forcing", "pyramid")
CACHES = ("cg-taylor", "taylorseer", "first-block", "easycache", "teacache")
TURN = 1.25
"""One turn of a knob: densities and thresholds change by this factor."""
PUBLISHED_STEPS = 50
_SHARE = 0.05
_LEAST_DENSITY, _MOST_DENSITY = 0.03, 0.9


@dataclass(frozen=True)
class Space:
    """Where to search.

    Attributes:
        patterns: names of patterns that need nothing but a density.
        densities: to begin with.
        blocks: tokens of a block.
        caches: names of policies with a threshold or an interval.
        dense_steps: share of the first steps that stay dense, to begin with.
    """

    patterns: tuple[str, ...] = SINGLE
    densities: tuple[float, ...] = (0.15, 0.25, 0.35, 0.5)
    blocks: tuple[int, ...] = (64, 128)
    caches: tuple[str, ...] = CACHES
    dense_steps: float = 0.2

    def __post_init__(self) -> None:
        for names, known, what in ((self.patterns, PATTERNS, "pattern"), (self.caches, POLICIES, "cache")):
            if unknown := [name for name in names if name not in known]:
                raise UsageError(f"{what} {unknown[0]!r} is unknown; there are {', '.join(sorted(known))}")
        for name in self.caches:
            if not any(hasattr(POLICIES[name], knob) for knob in ("threshold", "interval")):
                raise UsageError(f"cache {name!r} has no knob to turn; possible: {', '.join(CACHES)}")

    def attention(self) -> list[Candidate]:
        """Every pattern at every density, in blocks of every size."""
        patterns = [
            cast(Pattern, replace(cast(Any, PATTERNS[n]()), block=b)) for n in self.patterns for b in self.blocks
        ]
        return [Candidate(pattern, density) for density in self.densities for pattern in patterns]

    def sparse(self, candidate: Candidate) -> Recipe:
        """A recipe of a pattern."""
        return Recipe(candidate.pattern, candidate.density, Schedule(dense_steps=self.dense_steps))

    def cached(self, family: str, steps: int) -> list[Recipe]:
        """Every policy where its authors have it, warm-ups as a share of the steps."""
        return [Recipe(cache=_begin(name, family, steps)) for name in self.caches]


def pair(one: Recipe, other: Recipe) -> Recipe:
    """The attention of one and the cache of another."""
    return one.merge(cache=other.cache)


def turns(recipe: Recipe, faster: bool, steps: int, times: int = 1) -> dict[str, Recipe]:
    """The recipe with one knob turned, for each of its knobs by name.

    Args:
        recipe: the recipe.
        faster: towards speed; else towards quality.
        steps: denoising steps: warm-ups are counted in these.
        times: so many turns at once.
    """
    caches = turned(recipe.cache, faster, steps, times)
    found = {name: replace(recipe, cache=cache) for name, cache in caches.items()}
    if recipe.attention is not None and recipe.density is not None:
        density = recipe.density * TURN ** (-times if faster else times)
        if _LEAST_DENSITY <= density <= _MOST_DENSITY:
            found["density"] = replace(recipe, density=round(density, 4))
        share = round(float(recipe.schedule.dense_steps) + _SHARE * (-times if faster else times), 4)
        if 0 <= share <= 0.9:
            found["dense_steps"] = replace(recipe, schedule=replace(recipe.schedule, dense_steps=share))
    return found


def turned(cache: CachePolicy | None, faster: bool, steps: int, times: int = 1) -> dict[str, CachePolicy]:
    """A policy with one knob turned, for each of its knobs by name; arguments as for `turns`."""
    knobs: Any = cache
    found: dict[str, Any] = {}
    if getattr(cache, "threshold", None) is not None:
        threshold = knobs.threshold * TURN ** (times if faster else -times)
        found["threshold"] = replace(knobs, threshold=float(f"{threshold:.4g}"))
    if hasattr(cache, "interval") and knobs.interval + (times if faster else -times) >= 2:
        found["interval"] = replace(knobs, interval=knobs.interval + (times if faster else -times))
    if isinstance(getattr(cache, "warmup", None), int):
        warmup = knobs.warmup + (-times if faster else times)
        if 1 <= warmup < steps:
            found["warmup"] = replace(knobs, warmup=warmup)
    return found


def further(recipe: Recipe, factor: float) -> Recipe:
    """A cached recipe at a threshold so many times as high, or an interval, where the policy has one instead."""
    knobs: Any = recipe.cache
    if getattr(knobs, "threshold", None) is not None:
        return replace(recipe, cache=replace(knobs, threshold=float(f"{knobs.threshold * factor:.4g}")))
    return replace(recipe, cache=replace(knobs, interval=max(2, round(knobs.interval * factor))))


def _begin(name: str, family: str, steps: int) -> CachePolicy:
    """A policy with its knobs written out, so that they can be turned."""
    policy: Any = POLICIES[name]
    if (threshold := usual_threshold(name, family)) is None:
        return cast(CachePolicy, policy(interval=3, steps=steps))
    found = policy(threshold=threshold, steps=steps)
    if hasattr(found, "warmup"):
        warmup = found.parts(family, "480p").caps.warmup
        # Shares stay what they are; counts were published for 50 steps.
        scaled = max(1, round(warmup * steps / PUBLISHED_STEPS)) if isinstance(warmup, int) else warmup
        found = replace(found, warmup=scaled)
    return cast(CachePolicy, found)
