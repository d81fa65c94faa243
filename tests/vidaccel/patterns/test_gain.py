"""A pattern that cannot help says so, and what would."""

from __future__ import annotations

import re

import pytest

from vidaccel.grid import Site, TokenLayout
from vidaccel.patterns import Neighborhood, Radial, SlidingWindow, TopK, Union, advice
from vidaccel.patterns.gain import PARTIAL_RATE, WHOLE_RATE, expected_gain, rate

SITE = Site("blocks.0.attn1.processor", 0, "self", "wan")


def told(pattern, grid, density):
    layout = TokenLayout.of(grid, block=pattern.block)
    return advice(pattern, pattern.plan(layout, density, SITE), layout, density, SITE)


def test_stride_one_on_a_small_grid_names_what_does_better():
    text = told(Neighborhood(), (9, 16, 16), 0.3)
    assert "for a density of 0.30 it visits 0.78 of all pairs" in text
    assert "at most 1.29 times as fast" in text
    found = re.findall(r"(stride|block)=(\(.*?\)|\d+) visits (0\.\d+)", text)
    assert {name for name, *_ in found} == {"stride", "block"}
    assert [float(visited) for *_, visited in found] == sorted(float(visited) for *_, visited in found)
    for name, value, visited in found:
        number = tuple(map(int, value.strip("()").split(",")))
        better = Neighborhood(stride=number) if name == "stride" else Neighborhood(block=number[0])
        plan = better.plan(TokenLayout.of((9, 16, 16), block=better.block), 0.3, SITE)
        assert plan.visited == pytest.approx(float(visited), abs=0.006)
        assert expected_gain(plan) > 1


@pytest.mark.parametrize(
    ("pattern", "grid", "density"),
    [
        (Neighborhood(), (21, 45, 80), 0.25),
        (Neighborhood(stride=(1, 8, 16)), (9, 16, 16), 0.3),
        (Radial(), (21, 30, 52), 0.3),
        (TopK(), (9, 16, 16), 0.3),
        (SlidingWindow(), (13, 30, 45), 0.5),
    ],
    ids=str,
)
def test_what_helps_says_nothing(pattern, grid, density):
    assert told(pattern, grid, density) is None


def test_a_pattern_that_keeps_everything_gains_nothing():
    assert "keeps every pair at this size" in told(SlidingWindow(), (3, 4, 4), 0.9)


def test_nothing_better_there_is_said_too():
    assert "ask for a lower density, or run it dense" in told(TopK(block=16), (4, 8, 8), 0.95)
    assert "ask for a lower density" in told(Union((TopK(),)), (9, 16, 16), 0.95)


def test_rate_goes_by_the_share_of_whole_tiles():
    layout = TokenLayout.of((9, 16, 16))
    plans = [Neighborhood(stride=stride).plan(layout, 0.3, SITE) for stride in ((1, 1, 1), (1, 8, 16))]
    assert PARTIAL_RATE <= rate(plans[0]) < rate(plans[1]) == WHOLE_RATE
