"""Intervals against tables of Student's t, and Wilson's against a worked example and its own definition."""

from __future__ import annotations

from math import sqrt

import pytest

from vidaccel.report.intervals import _student, mean_interval, share_interval


@pytest.mark.parametrize(("freedom", "point"), [(1, 12.7062), (10, 2.2281), (11, 2.2010), (30, 2.0423), (1000, 1.9623)])
def test_student(freedom: int, point: float) -> None:
    assert _student(freedom) == pytest.approx(point, abs=2e-4)


def test_mean() -> None:
    assert mean_interval([3.0]) is None
    assert mean_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)
    low, high = mean_interval([1.0, 3.0]) or (0, 0)
    assert (low + high) / 2 == 2
    assert high - 2 == pytest.approx(12.7062 * sqrt(2) / sqrt(2))


@pytest.mark.parametrize(("right", "count"), [(0, 5), (5, 5), (54, 64), (1, 2)])
def test_share(right: int, count: int) -> None:
    low, high = share_interval(right, count) or (0, 0)
    assert 0 <= low <= right / count <= high <= 1
    # Both ends are shares under which what was seen lies 1.96 standard deviations off.
    for end in (low, high):
        if 0 < end < 1:
            assert abs(right / count - end) == pytest.approx(1.959964 * sqrt(end * (1 - end) / count))


def test_no_share_of_nothing() -> None:
    assert share_interval(0, 0) is None
