"""Gates: exact step counts, caps over rules, and numbers that are none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from vidaccel.caching.gate import Accumulated, Below, Caps, Gate, Interval, Magnitude, Recorded, relative
from vidaccel.errors import RecipeError
from vidaccel.schedule import Step

INFINITE, NAN = math.inf, math.nan


def computed(gate: Gate, errors: Sequence[float | None], total: int | None = None) -> list[int]:
    """Which steps are computed."""
    total = len(errors) if total is None else total
    steps = (Step(n, total, 1 - n / len(errors), n == 0) for n in range(len(errors)))
    return [s.index for s, error in zip(steps, errors, strict=True) if not gate.decide(s, error, s.index > 0).skip]


@pytest.mark.parametrize("rule", [Below(0.0), Accumulated(0.0), Magnitude(0.0, lambda step: 1.0), Interval(1)])
def test_zero_thresholds_compute_everything(rule: Any) -> None:
    assert computed(Gate(rule, Caps()), [0.0] * 9) == list(range(9))


@pytest.mark.parametrize(
    "rule", [Below(INFINITE), Accumulated(INFINITE), Magnitude(INFINITE, lambda step: 0.5), Interval(1000)]
)
@pytest.mark.parametrize(("warmup", "last"), [(1, 0), (3, 1), (4, 2), (0.5, 1)])
def test_infinite_thresholds_compute_the_caps_alone(rule: Any, warmup: int | float, last: int) -> None:
    first = int(warmup * 10) if isinstance(warmup, float) else warmup
    assert computed(Gate(rule, Caps(warmup, last)), [9.0] * 10) == [*range(first), *range(10 - last, 10)]


@pytest.mark.parametrize("bad", [NAN, INFINITE])
@pytest.mark.parametrize("rule", [Below(INFINITE), Accumulated(INFINITE)])
def test_what_is_no_number_computes(rule: Any, bad: float) -> None:
    errors = [0.0, 0.0, bad, 0.0, 0.0]
    gate = Gate(rule, Caps())
    assert computed(gate, errors) == [0, 2]
    assert computed(Gate(Below(0.5), Caps()), [None, NAN, 0.0]) == [0, 1]


def test_interval_counts_from_the_warm_up() -> None:
    assert computed(Gate(Interval(5), Caps(1)), [None] * 12) == [0, 5, 10]
    assert computed(Gate(Interval(3), Caps(4)), [None] * 12) == [0, 1, 2, 3, 6, 9]


def test_accumulated_maps_adds_up_and_starts_again() -> None:
    assert computed(Gate(Accumulated(0.25), Caps()), [0.1] * 8) == [0, 3, 6]
    # 2 e^2 + 1 of 0.5 is 1.5
    gate = Gate(Accumulated(2.9, (2.0, 0.0, 1.0)), Caps())
    assert computed(gate, [0.5] * 5) == [0, 2, 4]


def test_magnitude_by_hand() -> None:
    """Ratios of 0.9: |1 - a| is 0.1, 0.19, 0.271, ...; their sums are 0.1, 0.29, 0.561."""
    rule = Magnitude(0.5, lambda step: 0.9)
    assert computed(Gate(rule, Caps()), [None] * 8) == [0, 3, 6]
    assert computed(Gate(Magnitude(0.5, lambda step: 0.9), Caps(max_skips=1)), [None] * 6) == [0, 2, 4]
    assert computed(Gate(Magnitude(9.0, lambda step: None), Caps()), [None] * 4) == [0, 1, 2, 3]


def test_recorded_steps_replay() -> None:
    assert computed(Gate(Recorded((0, 1, 4, 7)), Caps(0)), [None] * 9) == [0, 1, 4, 7]

    with pytest.raises(RecipeError, match="9 steps was recorded, but this run has 8"):
        computed(Gate(Recorded((0, 1), total=9), Caps(0)), [None] * 8)


def test_longest_run_and_accumulated_error() -> None:
    assert computed(Gate(Below(INFINITE), Caps(max_skips=2)), [0.1] * 8) == [0, 3, 6]
    assert computed(Gate(Below(INFINITE), Caps(max_error=0.35)), [0.1] * 9) == [0, 4, 8]


def test_reset_starts_a_new_trajectory() -> None:
    gate = Gate(Accumulated(0.25), Caps(2, 1))
    first = computed(gate, [0.1] * 9)
    gate.reset()
    assert computed(gate, [0.1] * 9) == first


def test_unknown_totals_are_an_error_only_where_needed() -> None:
    assert computed(Gate(Interval(2), Caps(1)), [None] * 4, total=0) == [0, 2]
    for caps in (Caps(1, 1), Caps(0.2)):
        with pytest.raises(RecipeError, match="number of steps is unknown"):
            Gate(Interval(2), caps).decide(Step(0, None, 1.0, True), None, False)


def test_why_is_told() -> None:
    gate = Gate(Below(0.5), Caps(1, 1, max_skips=1))
    errors = [None, 0.1, 0.1, 0.9, NAN, 0.1]
    told = [gate.decide(Step(n, 6, 0.5, n == 0), e, n > 0) for n, e in enumerate(errors)]
    assert [d.why for d in told] == ["warm-up", "rule", "longest run of skips", "rule", "not a number", "last step"]
    assert [d.skip for d in told] == [False, True, False, False, False, False]
    assert told[3].error == 0.9


def test_a_batch_and_its_worst_sample() -> None:
    sums = torch.tensor([[1.0, 0.0, 0.2], [1.0, 1.0, 1.0]], dtype=torch.float64)
    assert relative(sums) == pytest.approx(0.4)
    assert relative(sums, per_sample=True) == pytest.approx(1.0)
    assert math.isnan(relative(torch.zeros(2, 1)))
    assert math.isnan(relative(torch.tensor([[0.1, NAN], [1.0, 1.0]]), per_sample=True))
