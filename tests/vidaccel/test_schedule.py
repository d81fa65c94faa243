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
    ],
)
def test_wrong_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Schedule(**settings)
