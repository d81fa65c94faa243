"""What a sweep renders: a cell is one way to run the pipeline, with a name.

Attention: every pattern that needs nothing but a density, and two controls. Caches: every policy over its thresholds,
and two controls at equal computed steps: random steps, and the first steps alone with everything after them repeated.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import vidaccel
from samples.train import rivals
from samples.train.controls import CONTROLS
from vidaccel.caching import CGTaylor, EasyCache, FirstBlock, MagCache, Placed, Replay, TaylorSeer, TeaCache, placed
from vidaccel.caching.policy import CachePolicy
from vidaccel.patterns import PATTERNS, FlashBlock, Pattern
from vidaccel.schedule import Schedule

DENSITIES = (0.35, 0.15, 0.25, 0.5)
"""In the order in which a budget that runs out matters least."""
SINGLE = ("ann", "freeswim", "light-forcing", "neighborhood", "pyramid", "radial", "sliding-window", "svg")
SINGLE += ("tempcache", "topk")
BLOCK = 64
"""Tokens a block: the smallest of the GPU kernels, for a small grid."""
NEWTON = CGTaylor(form="newton")
SUMMED = CGTaylor(threshold=1.0, gate_order=1, last=0)
CURVES: dict[str, tuple[CachePolicy, str, tuple[float, ...]]] = {
    "cg-taylor": (CGTaylor(), "threshold", (0.36, 0.1, 0.18, 0.24, 0.05, 0.3)),
    "cg-taylor, Newton's form": (NEWTON, "threshold", (0.36, 0.1, 0.18, 0.24, 0.05, 0.8, 0.02)),
    "easycache": (EasyCache(), "threshold", (0.05, 0.25, 0.1, 0.025, 0.2, 0.01)),
    "magcache": (MagCache(), "threshold", (0.12, 0.24, 0.06, 0.5, 0.03)),
    "placed": (Placed(), "share", (0.25, 0.12, 0.5, 0.35)),
    "taylorseer": (TaylorSeer(), "interval", (5, 3, 8, 2, 6)),
    "first-block": (FirstBlock(), "threshold", (0.1, 0.2, 0.05, 0.4, 0.13, 0.02)),
    "teacache": (TeaCache(), "threshold", (0.1, 0.2, 0.05, 0.4, 0.09, 0.02)),
}
"""Policies, what is varied of each, and its values, in the order in which a budget that runs out matters least."""
FORMS: dict[str, tuple[CachePolicy, str, tuple[float, ...]]] = {
    # What the forecast is made of. At order 1 Taylor's and Newton's are the same line, and only the gate's differ.
    "cg-taylor, order 2": (CGTaylor(order=2), "threshold", (0.36, 0.1)),
    "cg-taylor, Newton's form, order 2": (replace(NEWTON, order=2), "threshold", (0.36, 0.1)),
    "cg-taylor, in sigma": (CGTaylor(axis="sigma"), "threshold", (0.36, 0.3, 0.24)),
    "cg-taylor, Newton's form, in sigma": (replace(NEWTON, axis="sigma"), "threshold", (0.36, 0.1, 0.8, 0.6)),
    "cg-taylor, 4 steps of warm-up": (CGTaylor(warmup=4), "threshold", (0.3, 0.24, 0.18)),
    "cg-taylor, 3 steps of warm-up": (CGTaylor(warmup=3), "threshold", (0.36, 0.24, 0.18)),
    "cg-taylor, Newton's form, 3 steps of warm-up": (replace(NEWTON, warmup=3), "threshold", (0.36, 0.1)),
    "cg-taylor, Newton's form, in sigma, 3 steps of warm-up": (
        replace(NEWTON, axis="sigma", warmup=3),
        "threshold",
        (0.36, 0.8, 0.6),
    ),
    "cg-taylor, of the output": (CGTaylor(site="output"), "threshold", (0.36, 0.1)),
    # The gate's forecast is of the order of the one it vouches for, and its errors add up until a step is computed.
    "cg-taylor, sum of errors": (SUMMED, "max_error", (0.12, 0.15, 0.095, 0.19)),
    "cg-taylor, sum of errors, 5 steps of warm-up": (replace(SUMMED, warmup=5), "max_error", (0.095, 0.12, 0.08)),
    "cg-taylor, sum of errors, 7 steps of warm-up": (replace(SUMMED, warmup=7), "max_error", (0.18, 0.24, 0.13)),
    "cg-taylor, sum of errors, 8 steps of warm-up": (replace(SUMMED, warmup=8), "max_error", (0.26, 0.35)),
    "cg-taylor, sum of errors, order 0": (replace(SUMMED, order=0, gate_order=0), "max_error", (0.25, 0.3)),
    "cg-taylor, sum of errors, in sigma": (replace(SUMMED, axis="sigma"), "max_error", (0.13, 0.16)),
    "cg-taylor, sum of errors of the worst sample": (replace(SUMMED, per_sample=True), "max_error", (0.25, 0.4)),
    "cg-taylor, sum of errors, the last step too": (replace(SUMMED, last=1), "max_error", (0.15, 0.19)),
    # Forecasts that stay what they are after half a gap.
    "cg-taylor, reach 0.5": (CGTaylor(reach=0.5), "threshold", (0.36, 0.1, 0.24)),
    "cg-taylor, reach 0.5, sum of errors": (replace(SUMMED, reach=0.5), "max_error", (0.5, 0.4, 0.65)),
    "cg-taylor, reach 0.5, sum of errors, 7 steps of warm-up": (
        replace(SUMMED, reach=0.5, warmup=7),
        "max_error",
        (0.5, 0.4, 0.65, 0.2),
    ),
    "cg-taylor, sum of errors, order 0, 7 steps of warm-up": (
        replace(SUMMED, order=0, gate_order=0, warmup=7),
        "max_error",
        (0.6, 0.8),
    ),
    # Between the thresholds of the curve; and the step that the last one costs spent where the latent still moves.
    "easycache, between": (EasyCache(), "threshold", (0.22, 0.21, 0.23)),
    "cg-taylor, the last step forecast": (CGTaylor(last=0), "threshold", (0.1,)),
    "easycache, the last step forecast": (EasyCache(last=0), "threshold", (0.2, 0.18, 0.21)),
}
"""Other forms of cg-taylor and EasyCache, which come after all curves."""
PLACED: dict[str, tuple[dict[str, Any], float, tuple[int, ...]]] = {
    "placed steps": ({}, 0.88, (6, 7, 5, 8, 4, 9)),
    "placed steps, order 0": ({"order": 0}, 0.9, (6, 5, 8, 4)),
    "placed steps, the last one too": ({}, 1.0, (6, 7, 5)),
    "placed steps, in sigma": ({"axis": "sigma"}, 0.88, (6, 7)),
    "placed steps, of the output": ({"site": "output"}, 0.88, (6, 7)),
    "placed steps, of the output, order 0": ({"site": "output", "order": 0}, 0.9, (6, 7)),
    "placed steps, reach 0.5": ({"reach": 0.5}, 0.9, (7, 6, 8)),
    "placed steps, reach 0.25": ({"reach": 0.25}, 0.9, (7,)),
    "placed steps, reach 1": ({"reach": 1.0}, 0.9, (7,)),
    "placed steps, as easycache reuses": ({"order": 0, "base": "latent"}, 0.9, (7, 6)),
    "placed steps, reach 0.5, of the output": ({"reach": 0.5, "site": "output"}, 0.9, (7,)),
}
"""Other ways to place a quarter of the steps: settings of the forecast, where the last computed step stands (a share of
all), and how many first steps are computed."""
KEPT = (0.25, 0.12, 0.5, 0.35)
"""Shares of the steps that the controls compute."""


@dataclass(frozen=True)
class Cell:
    """One way to render.

    Attributes:
        name: Unique in its record.
        about: The same as plain data.
        installed: Enters the state in which the pipeline renders this way; gives the acceleration where it is ours.
        rehearse: Render one clip first, from which the method learns, or in which kernels are built.
        share: Of the scheduler's steps that this way takes at all.
    """

    name: str
    about: dict[str, Any]
    installed: Callable[[Any], contextlib.AbstractContextManager[Any]]
    rehearse: bool = field(default=False)
    share: float = 1.0


@contextlib.contextmanager
def as_it_is(pipe: Any) -> Iterator[None]:
    """Change nothing."""
    yield


DENSE = Cell("dense", {}, as_it_is, rehearse=True)
FEWER = Cell("fewer steps share 0.25", {"cache": "fewer steps", "share": 0.25}, as_it_is, share=0.25)
"""The control that needs no cache: a scheduler that takes fewer and longer steps."""


def attention_cells(dense_steps: float) -> list[Cell]:
    """Patterns and controls at every density; the first steps stay dense.

    Args:
        dense_steps: Share of the steps.
    """
    schedule = Schedule(dense_steps=dense_steps, even_if_slower=True)
    patterns: dict[str, Pattern] = {name: replace(PATTERNS[name](), block=BLOCK) for name in SINGLE}
    patterns |= {name: replace(control, block=BLOCK) for name, control in CONTROLS.items()}
    # Half of what it may spend goes into calls that see everything; 0.15 leaves less than top-k must keep.
    late = {
        density: {"flashblock": FlashBlock({"name": "topk", "block": BLOCK}, round(2 / density))}
        for density in DENSITIES
        if density > 0.2
    }
    return [
        Cell(f"{name} {density}", {"attention": name, "density": density}, _sparse(pattern, density, schedule))
        for density in DENSITIES
        for name, pattern in (patterns | late.get(density, {})).items()
    ]


def _sparse(
    pattern: Pattern, density: float, schedule: Schedule
) -> Callable[[Any], contextlib.AbstractContextManager[Any]]:
    return lambda pipe: vidaccel.accelerate(pipe, pattern, density=density, schedule=schedule)


def recipe_cell(recipe: str) -> Cell:
    """What a preset does."""
    return Cell(f"recipe {recipe}", {"recipe": recipe}, lambda pipe: vidaccel.accelerate(pipe, recipe=recipe))


def cache_cells(steps: int) -> list[Cell]:
    """Policies over their thresholds, controls at equal computed steps, and what else there is to compare with.

    Args:
        steps: Denoising steps of a clip.
    """
    curves = (_curves_at(steps, place) for place in itertools.count())
    forms = ([*_policies(FORMS, place), *_placed(place, steps)] for place in itertools.count())
    rounds = (*itertools.takewhile(bool, curves), *itertools.takewhile(bool, forms))
    return [FEWER, *itertools.chain.from_iterable(rounds)]


def _curves_at(steps: int, place: int) -> list[Cell]:
    """One cell of each policy, control and rival."""
    cells = _policies(CURVES, place)
    if place < len(KEPT):
        computed = max(1, round(KEPT[place] * steps))
        drawn = random.Random(0).sample(range(1, steps), computed - 1)
        for name, order, chosen in (("random steps", 1, (0, *sorted(drawn))), ("reuse", 0, tuple(range(computed)))):
            cells.append(_cached(name, Replay(computed=chosen, order=order), {"computed": computed}))
    return cells + [Cell(name, about, install, place == 0) for name, about, install in rivals.cells(place, steps)]


def _policies(curves: dict[str, tuple[CachePolicy, str, tuple[float, ...]]], place: int) -> list[Cell]:
    return [
        _cached(name, replace(policy, **{parameter: values[place]}), {parameter: values[place]}, first=place == 0)
        for name, (policy, parameter, values) in curves.items()
        if place < len(values)
    ]


def _placed(place: int, steps: int) -> list[Cell]:
    return [
        _cached(
            name,
            Replay(computed=placed(steps, first=firsts[place], end=end), **settings),
            {"first": firsts[place]},
            first=place == 0,
        )
        for name, (settings, end, firsts) in PLACED.items()
        if place < len(firsts)
    ]


def _cached(name: str, policy: CachePolicy, about: dict[str, Any], first: bool = False) -> Cell:
    ((parameter, value),) = about.items()
    return Cell(
        f"{name} {parameter} {value}",
        {"cache": name} | about,
        lambda pipe: vidaccel.accelerate(pipe, cache=policy),
        rehearse=first or isinstance(policy, MagCache),
    )
