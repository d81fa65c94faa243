"""Schedules: who runs dense, and the messages for those that cannot be."""

from __future__ import annotations

import pytest

from vidaccel.errors import RecipeError
from vidaccel.schedule import DENSE, Schedule, Step


def densities(schedule: Schedule, steps: int, layers: int = 4, **kwargs: object) -> list[list[float | None]]:
    arguments = {"branch": None, "expert": None, "density": 0.25} | kwargs
    return [
        [schedule.density(Step(s, steps, 0.5, s == 0), layer, layers, **arguments) for layer in range(layers)]
        for s in range(steps)
    ]


def dense_steps(schedule: Schedule, steps: int) -> list[int]:
    return [s for s, row in enumerate(densities(schedule, steps)) if all(d == DENSE for d in row)]


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        (Schedule(), 4, []),
        (Schedule(dense_steps=2), 8, [0, 1]),
        (Schedule(dense_steps=0.25), 50, list(range(12))),
        (Schedule(dense_steps=0.25), 4, [0]),
        (Schedule(dense_last_steps=1), 4, [3]),
        (Schedule(dense_last_steps=0.1), 20, [18, 19]),
        (Schedule(dense_steps=1, dense_last_steps=1), 4, [0, 3]),
        (Schedule(dense_steps=9), 4, [0, 1, 2, 3]),
        (Schedule(dense_last_steps=9), 4, [0, 1, 2, 3]),
        (Schedule(dense_steps=1.0), 3, [0, 1, 2]),
        (Schedule(dense_last_steps=0.01), 4, []),
    ],
)
def test_dense_steps(schedule: Schedule, steps: int, expected: list[int]) -> None:
    assert dense_steps(schedule, steps) == expected


def test_layers_and_tables() -> None:
    assert densities(Schedule(dense_layers=1), 1) == [[1.0, 0.25, 0.25, 0.25]]
    assert densities(Schedule(dense_layers=(0, -1)), 1) == [[1.0, 0.25, 0.25, 1.0]]
    table = Schedule(branch={"uncond": 0.1}, expert={"high": 0.5})
    assert densities(table, 1, branch="uncond")[0][0] == 0.1
    assert densities(table, 1, branch="cond", expert="high")[0][0] == 0.5
    assert densities(table, 1, branch="uncond", expert="high")[0][0] == 0.5
    assert densities(table, 1, branch="cond", expert="low", density=None)[0][0] is None


@pytest.mark.parametrize("schedule", [Schedule(dense_last_steps=1), Schedule(dense_steps=0.5)])
def test_unknown_number_of_steps(schedule: Schedule) -> None:
    with pytest.raises(RecipeError, match="num_inference_steps="):
        schedule.density(Step(0, None, 1.0, True), 0, 4, None, None, 0.25)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dense_steps": -1}, "count of steps, or a fraction"),
        ({"dense_last_steps": 1.5}, "count of steps, or a fraction"),
        ({"branch": {"cond": 0}}, r"density lies in \(0, 1\]"),
        ({"expert": {"middle": 0.5}}, "'high' and 'low'"),
        ({"dense_layers": -1}, "dense_layers"),
        ({"branch": {"uncondd": 0.2}}, "'uncondd' is unknown; guidance has 'cond' and 'uncond'"),
    ],
)
def test_wrong_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Schedule(**settings)


def test_branches_of_guiders_are_known() -> None:
    assert Schedule(branch={"cond_skip": 1.0, "cond_uncond": 0.5, "uncond": 0.2})


@pytest.mark.parametrize(
    ("schedule", "steps", "words"),
    [
        (Schedule(dense_layers=99), None, "dense_layers=99 is all of the 6 layers"),
        (Schedule(dense_layers=(0, 1, 2, -3, -2, -1)), 20, "is all of the 6 layers"),
        (Schedule(dense_steps=20), 20, "dense_steps=20 and dense_last_steps=0 are all 20 steps"),
        (Schedule(dense_steps=0.5, dense_last_steps=0.5), 20, "are all 20 steps"),
        (Schedule(dense_last_steps=1.0), None, None),
        (Schedule(dense_steps=19), 20, None),
        (Schedule(dense_layers=5, dense_steps=0.5), 20, None),
        (Schedule(), 1, None),
    ],
)
def test_what_leaves_nothing_to_run_sparse(schedule: Schedule, steps: int | None, words: str | None) -> None:
    told = schedule.covers(steps, 6)
    assert told is None if words is None else words in str(told)
    if steps is not None:
        calls = [(Step(n, steps, 1.0, n == 0), layer) for n in range(steps) for layer in range(6)]
        run = [schedule.density(step, layer, 6, None, None, 0.2) for step, layer in calls]
        assert (told is not None) == all(density == DENSE for density in run)


def test_densities_of_branches_that_never_come_alone() -> None:
    schedule = Schedule(branch={"uncond": 0.2})
    assert schedule.misses("cond") is schedule.misses("uncond") is Schedule().misses("cond_uncond") is None
    assert "branch uncond a density, which has no effect" in str(schedule.misses("cond_uncond"))
    assert "cannot be told apart" in str(schedule.misses(None))
    assert Schedule(branch={"cond_uncond": 0.2}).misses("cond_uncond") is None


def test_what_a_pattern_may_be_asked_for() -> None:
    assert Schedule().asked(None, 0.3) == {0.3}
    assert Schedule(branch={"uncond": 0.2}).asked(None, None) == {None, 0.2}
    assert Schedule(branch={"uncond": 0.2, "cond": 1.0}).asked(None, None) == {0.2}
    assert Schedule(expert={"high": 1.0, "low": 0.4}).asked("high", 0.3) == set()
