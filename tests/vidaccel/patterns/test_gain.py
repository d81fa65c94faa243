"""A pattern that cannot help says so, and what would."""

from __future__ import annotations

import re

import pytest

from vidaccel.grid import Site, TokenLayout
from vidaccel.patterns import Neighborhood, Radial, SlidingWindow, TopK, Union, advice
from vidaccel.patterns.gain import CUT_TIMES, PARTIAL_RATE, WHOLE_RATE, expected_gain, rate, sparse_rate

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
        (Neighborhood(stride=(3, 5, 8)), (21, 45, 80), 0.25),
        (Neighborhood(stride=(1, 8, 16)), (9, 16, 16), 0.3),
        (Radial(), (21, 30, 52), 0.3),
        (TopK(), (9, 16, 16), 0.3),
        (SlidingWindow(), (13, 30, 45), 0.5),
        (Neighborhood(), (21, 30, 52), 0.25),
        (Neighborhood(), (13, 30, 45), 0.25),
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
    assert sparse_rate(plans[0]) == pytest.approx(WHOLE_RATE / CUT_TIMES), "every tile is cut"
    assert sparse_rate(plans[1]) == pytest.approx(WHOLE_RATE)


def test_holes_cost_nothing_beyond_themselves():
    """Measured on cogvideox-5b: sliding-window takes 5.44 ms for 0.311 of the pairs, radial 4.37 for 0.252."""
    whole, holed = (Radial().plan(TokenLayout.of((9, *sides)), 0.3, SITE) for sides in ((16, 16), (16, 15)))
    tiled = SlidingWindow().plan(TokenLayout.of((13, 30, 45)), 0.25, SITE)
    assert int((tiled.layout.q_len[: tiled.layout.video_blocks] < 128).sum()) == tiled.layout.video_blocks
    assert sparse_rate(whole) == pytest.approx(WHOLE_RATE)
    assert sparse_rate(holed) == sparse_rate(tiled) == pytest.approx(WHOLE_RATE)


@pytest.mark.parametrize(
    ("grid", "best", "measured"),
    [((21, 30, 52), 0.88, 30.81 / 17.34), ((13, 30, 45), 0.8, 14.13 / 10.21)],
    ids=["wan2.1-14b at 480p", "cogvideox-5b"],
)
def test_windows_that_cut_most_tiles_take_as_long_as_measured(grid, best, measured):
    """Attention of a layer on an H200, in ms: dense over neighborhood (pipelines/bench/results)."""
    plan = Neighborhood().plan(TokenLayout.of(grid), 0.25, SITE)
    assert sparse_rate(plan, best) / plan.visited == pytest.approx(measured, rel=0.15)
