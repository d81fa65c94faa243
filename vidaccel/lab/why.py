"""Why this plan, this backend and this schedule: what was decided for a run, with what was measured beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean

from ..errors import BackendError
from ..kernels import backends
from ..kernels.attention import choose
from ..order import described
from ..patterns import Plan
from ..schedule import DENSE, Schedule, Step
from .explain import Atlas


def reasons(atlas: Atlas, schedule: Schedule, steps: int, layers: int, density: float | None) -> dict[str, list[str]]:
    """Sentences about each decision.

    Args:
        atlas: what was seen of the run.
        schedule: which steps and layers stay dense.
        steps: of the run.
        layers: of the transformer.
        density: that was asked for.

    Returns:
        Sentences under "plan", "backend" and "schedule".
    """
    judged = [p.name for p in atlas.patterns if p.name not in atlas.left_out]
    return {
        "plan": [text for name in judged for text in _plan(name, atlas.plans(name))],
        "backend": list(dict.fromkeys(text for name in judged for text in _backend(atlas, atlas.plans(name)[0]))),
        "schedule": [*_schedule(schedule, steps, layers, density), *_measured(atlas, judged, schedule, steps, layers)],
    }


def _plan(name: str, plans: Sequence[Plan]) -> list[str]:
    plan = plans[0]
    visited = fmean(each.visited for each in plans)
    asked = (
        "left the density to its own parameters" if plan.requested is None else f"was asked for {plan.requested:.3g}"
    )
    text = f"{name} {asked} and keeps {fmean(p.delivered for p in plans):.3g} of the pairs ({plan.rule})"
    tile = f", in tiles of {described(plan.layout.tile)}" if plan.layout.tile else ""
    text += f"; its blocks of {plan.layout.block} tokens{tile} cover {visited:.3g}, so attention becomes at most "
    return [f"{text}{1 / visited:.2f} times as fast", *dict.fromkeys(note for each in plans for note in each.notes)]


def _backend(atlas: Atlas, plan: Plan) -> list[str]:
    """What runs a plan here, and what keeps the others from it."""
    if atlas.problem is None:
        return []
    mask = plan.mask
    problem = replace(
        atlas.problem,
        block=plan.layout.block,
        mask_heads=atlas.problem.heads if mask is None else mask.heads,
        partial=mask is not None and mask.window is not None,
    )
    verdicts = backends(problem)
    try:
        chosen = choose(problem)
    except BackendError as error:
        return [str(error)]
    others = [f"{name}: {verdict.reason}" for name, verdict in verdicts.items() if not verdict.ok]
    able = [name for name, verdict in verdicts.items() if verdict.ok and name != chosen]
    text = f"{chosen} runs {problem}"
    return [f"{text}; {', '.join(able)} could, if named" if able else text, *others]


def _schedule(schedule: Schedule, steps: int, layers: int, density: float | None) -> list[str]:
    dense = _dense(schedule, steps, layers, density)
    whole = [step for step in range(steps) if all((step, layer) in dense for layer in range(layers))]
    always = [layer for layer in range(layers) if all((step, layer) in dense for step in range(steps))]
    share = 1 - len(dense) / (steps * layers)
    return [
        f"dense: {_ranges('step', whole)} (of {steps}), {_ranges('layer', always)} (of {layers}); {share:.0%} of all "
        "calls of layers are sparse. The first steps fix what goes where: authors of patterns keep a quarter of them"
        if dense
        else f"every layer of every step is sparse: the schedule keeps nothing dense in {steps} steps",
    ]


def _measured(atlas: Atlas, judged: Iterable[str], schedule: Schedule, steps: int, layers: int) -> list[str]:
    """Whether what stays dense is what a pattern would lose most of."""
    dense = _dense(schedule, steps, layers, atlas.density)
    found = []
    for name in judged:
        groups: dict[bool, list[float]] = {True: [], False: []}
        for row in atlas.rows:
            groups[(row["step"], row["layer"]) in dense] += row["kept"][name]
        if groups[True] and groups[False]:
            there, elsewhere = fmean(groups[True]), fmean(groups[False])
            verdict = "so it protects the right ones" if there < elsewhere else "so the loss is elsewhere"
            found.append(
                f"where the schedule stays dense {name} would keep {there:.3f} of the mass, elsewhere it keeps "
                f"{elsewhere:.3f}: {verdict}"
            )
    return found


def _dense(schedule: Schedule, steps: int, layers: int, density: float | None) -> set[tuple[int, int]]:
    """(step, layer) of what runs dense."""
    return {
        (step, layer)
        for step in range(steps)
        for layer in range(layers)
        if schedule.density(Step(step, steps, 0.0, step == 0), layer, layers, None, None, density) == DENSE
    }


def _ranges(what: str, numbers: Sequence[int]) -> str:
    """("step", [0, 1, 2, 5]) -> "steps 0-2, 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    text = ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
    return f"{what}{'s' * (len(numbers) > 1)} {text}" if text else f"no {what}"
