"""Sliding tile attention and the inward window against their published rules."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidaccel.blocks import BlockMask
from vidaccel.errors import PatternError
from vidaccel.grid import Site, TokenLayout
from vidaccel.patterns import FreeSwim, Neighborhood, Radial, SlidingWindow
from vidaccel.patterns.sliding_window import sliding_axis
from vidaccel.recipe import Recipe

SITE = Site("blocks.0.attn1.processor", 0, "self", "wan")


def keeps_tile(q: int, k: int, tiles: int, window: int) -> bool:
    """The rule of the released code, the upper bound counting last."""
    centre = min(max(q, window // 2), tiles - 1 - window // 2)
    return abs(centre - k) <= window // 2


def axis_map(length: int, window: int, side: int) -> torch.Tensor:
    tiles = -(-length // side)
    return torch.tensor(
        [[keeps_tile(x // side, y // side, tiles, window) for y in range(length)] for x in range(length)]
    )


def video_mask(mask: BlockMask) -> torch.Tensor:
    start = mask.layout.text if mask.layout.text_first else 0
    video = slice(start, start + mask.layout.grid.tokens)
    return mask.to_dense()[:, video, video]


@st.composite
def rules(draw: st.DrawFn, longest: int) -> tuple[int, int, int]:
    """length, window in tiles, tokens of a tile."""
    length = draw(st.integers(1, longest))
    side = draw(st.integers(1, min(length, 4)))
    return length, draw(st.integers(1, -(-length // side))), side


@settings(max_examples=150, deadline=None)
@given(rules(24))
def test_one_axis_is_the_published_rule(rule):
    axis = sliding_axis(*rule)
    assert torch.equal(axis.kept(), axis_map(*rule))
    assert axis.kept().any(1).all()


@pytest.mark.parametrize("tiles", range(1, 9))
def test_even_windows_keep_one_tile_more(tiles):
    for window in range(1, tiles + 1):
        kept = sliding_axis(4 * tiles, window, 4).kept().sum(1) // 4
        assert set(kept.tolist()) == {tiles if window == tiles else window + 1 - window % 2}


@pytest.mark.parametrize("tiles", [5, 6, 10])
@pytest.mark.parametrize("side", [4, 6, 8])
def test_odd_windows_are_neighborhoods_with_a_stride_of_one_tile(tiles, side):
    from vidaccel.patterns.neighborhood import neighborhood_axis

    for window in {*range(1, tiles + 1, 2), tiles}:
        same = neighborhood_axis(tiles * side, window * side, side).kept()
        assert torch.equal(sliding_axis(tiles * side, window, side).kept(), same)


@settings(max_examples=40, deadline=None)
@given(st.tuples(rules(5), rules(7), rules(7)), st.sampled_from([0, 5]), st.booleans())
def test_mask_is_the_published_rule_on_any_canvas(axes, text, text_first):
    length, window, tile = zip(*axes, strict=True)
    layout = TokenLayout.of(length, text, 64, text_first=text_first)
    plan = SlidingWindow(window, tile=tile, block=64).plan(layout, None, SITE)
    t, y, x = (axis_map(*axis) for axis in axes)
    expected = torch.kron(torch.kron(t.int(), y.int()), x.int()).bool()
    assert torch.equal(video_mask(plan.mask)[0], expected)
    assert plan.delivered == pytest.approx(float(expected.double().mean()))
    assert plan.mask.window is None


def test_windows_of_single_heads():
    layout = TokenLayout.of((3, 10, 9), 4, 16)
    windows = ((3, 1, 1), (1, 3, 3), (0, 0, 0), (2, 2, 1))
    plan = SlidingWindow(heads=windows, tile=(1, 4, 4), block=16).plan(layout, None, SITE)
    assert plan.mask.heads == 4
    alone = [SlidingWindow(window, tile=(1, 4, 4), block=16).plan(layout, None, SITE) for window in windows]
    assert torch.equal(plan.mask.to_dense(), torch.cat([one.mask.to_dense() for one in alone]))
    assert plan.delivered == pytest.approx(sum(one.delivered for one in alone) / 4)
    text = Recipe.from_text("attention: {name: sliding-window, heads: [[3, 1, 1], [1, 3, 3], [0, 0, 0], [2, 2, 1]]}")
    assert text.attention.heads == windows
    assert Recipe.from_text(text.to_yaml()) == text


def test_one_dimension():
    layout = TokenLayout.of((3, 4, 9), 4, 16)
    plan = SlidingWindow(3, block=16).plan(layout, None, SITE)
    assert plan.layout.tile is None
    tokens = 3 * 4 * 9
    assert torch.equal(video_mask(plan.mask)[0], axis_map(tokens, 3, 16))
    assert plan.mask.to_dense()[:, tokens:].all()
    assert plan.mask.to_dense()[..., tokens:].all()
    even = SlidingWindow(2, block=16).plan(layout, None, SITE)
    assert torch.equal(even.mask.idx, plan.mask.idx)
    assert SlidingWindow(0, block=16).plan(layout, None, SITE).delivered == 1
    with pytest.raises(PatternError, match="there are 7 blocks"):
        SlidingWindow(9, block=16).plan(layout, None, SITE)


@pytest.mark.parametrize("grid", [(21, 45, 80), (21, 30, 52), (33, 45, 80), (18, 48, 80), (13, 30, 45)], ids=str)
@pytest.mark.parametrize("density", [0.15, 0.25, 0.5])
@pytest.mark.parametrize("sink", [0, 1])
def test_window_is_solved_for_a_density(grid, density, sink):
    plan = SlidingWindow(sink_frames=sink).plan(TokenLayout.of(grid), density, SITE)
    assert plan.delivered == pytest.approx(density, rel=0.08)
    assert plan.visited <= 1.3 * plan.delivered
    if grid == (21, 45, 80) and not sink:
        assert plan.visited <= 1.2 * plan.delivered or plan.layout.tile != (3, 5, 8)


def test_a_solved_window_that_looks_past_no_tile_says_so():
    plan = SlidingWindow().plan(TokenLayout.of((9, 16, 16)), 0.25, SITE)
    (note,) = (note for note in plan.notes if "never looks past" in note)
    assert "smaller blocks, more density or neighborhood do" in note
    assert SlidingWindow().plan(TokenLayout.of((21, 45, 80)), 0.25, SITE).notes == ()


@pytest.mark.parametrize(
    ("arguments", "density", "message"),
    [
        ({"window": (5, 1, 1), "tile": (2, 2, 2)}, None, "there are 2 tiles of 2x2x2; use 2, or 0"),
        ({"window": (1, 1, 1)}, 0.3, "drop the window"),
        ({"heads": ((1, 1, 1),)}, 0.3, "drop the window"),
        ({}, None, "no density of its own"),
        ({"window": (1, 1, 1), "heads": ((1, 1, 1),)}, None, "one window for all heads"),
        ({"window": (1, 1, 1), "sink_frames": 9}, None, "has 4 frames"),
    ],
)
def test_wrong_parameters_name_right_ones(arguments, density, message):
    with pytest.raises(PatternError, match=message):
        SlidingWindow(**arguments, block=16).plan(TokenLayout.of((4, 6, 8), block=16), density, SITE)


def inward(x: int, y: int, length: int, half: int) -> bool:
    """FreeSwim's window, from its formula."""
    return x - half - max(0, half + x - length + 1) <= y <= x + half + max(0, half - x)


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(2, 10), st.integers(1, 10)),
    st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from([0, 5, 20]),
    st.booleans(),
    st.sampled_from([16, 32, 64]),
)
def test_inward_window_is_the_formula(native, grid, text, text_first, block):
    frames, height, width = grid
    plan = FreeSwim(native, block=block).plan(TokenLayout.of(grid, text, block, text_first=text_first), None, SITE)
    y, x = (
        torch.tensor([[inward(q, k, n, side // 2) for k in range(n)] for q in range(n)])
        for n, side in ((height, native[0]), (width, native[1]))
    )
    expected = torch.kron(torch.kron(torch.ones(frames, frames).int(), y.int()), x.int()).bool()
    assert torch.equal(video_mask(plan.mask)[0], expected)
    assert plan.delivered == pytest.approx(float(expected.double().mean()))
    dense = plan.mask.to_dense()[0]
    words = slice(0, text) if text_first else slice(plan.layout.grid.tokens, None)
    assert dense[words].all()
    assert dense[:, words].all()


def test_inward_window_is_a_neighborhood():
    layout = TokenLayout.of((3, 12, 10), block=16)
    for y, x in itertools.product(range(1, 6), range(1, 5)):
        one = FreeSwim((2 * y, 2 * x), block=16).plan(layout, None, SITE)
        two = Neighborhood((3, min(2 * y + 1, 12), min(2 * x + 1, 10)), block=16).plan(layout, None, SITE)
        assert torch.equal(one.mask.to_dense(), two.mask.to_dense())


@pytest.mark.parametrize("sink", [0, 1])
@pytest.mark.parametrize("pattern", [Radial, SlidingWindow, FreeSwim, Neighborhood])
def test_a_density_that_is_far_too_small_names_the_nearest(pattern, sink):
    layout = TokenLayout.of((7, 9, 14), block=16)
    own = pattern(block=16, **({} if pattern is Radial else {"sink_frames": sink}))
    with pytest.raises(PatternError, match=r"density 0\.0001 was asked") as told:
        own.plan(layout, 1e-4, SITE)
    if pattern is not Neighborhood:  # it tells all that it has
        nearest = float(re.search("ask for density ([0-9.]+)", str(told.value))[1])
        assert own.plan(layout, nearest, SITE).delivered == pytest.approx(nearest, rel=0.05)
        own.plan(layout, 0.7 * nearest, SITE)  # a note will do


def test_first_frames_leave_a_density_that_thin_tiles_reach():
    """A tile of one frame keeps less of the first frame than one of three: no reason to refuse."""
    pattern = SlidingWindow(block=64, sink_frames=1)
    plan = pattern.plan(TokenLayout.of((9, 16, 22), block=64), 0.1, SITE)
    assert plan.delivered == pytest.approx(0.1, rel=0.3)
    assert plan.layout.tile[0] == 1


def test_first_frames_leave_inward_windows_a_density_that_thin_tiles_reach():
    """The cheapest tile is two frames thick and keeps 0.335 in any case; one that the sink fills keeps half of that."""
    layout = TokenLayout.of((6, 16, 24))
    thin = FreeSwim(sink_frames=1).plan(layout, 0.15, SITE)
    assert thin.delivered == pytest.approx(1 / 6, rel=0.02)
    assert thin.layout.tile[0] == 1
    assert thin.mask.block_map()[:, :, :3].bool().all()
    assert any("comes no nearer to 0.15" in note for note in thin.notes)
    # Where the cheap one will do it stays: it touches fewer blocks, and keeps more.
    assert FreeSwim(sink_frames=1).plan(layout, 0.2, SITE).layout.tile[0] == 2
    with pytest.raises(PatternError, match=r"keeps 0\.335"):
        FreeSwim(sink_frames=1, tile=(2, 8, 8)).plan(layout, 0.15, SITE)
    with pytest.raises(PatternError, match="ask for fewer sink_frames"):
        FreeSwim(sink_frames=2).plan(layout, 0.15, SITE)


def test_inward_window_at_published_sizes():
    wan = replace(SITE, native=(30, 52))
    plan = FreeSwim().plan(TokenLayout.of((21, 68, 120)), None, wan)
    assert plan.delivered == pytest.approx(0.2013, abs=5e-5)
    assert plan.visited < 0.23
    native = FreeSwim().plan(TokenLayout.of((21, 30, 52)), None, wan)
    assert native.delivered == 1
    with pytest.raises(PatternError, match=r"at which size this wan model was trained is not known.*give native="):
        FreeSwim().plan(TokenLayout.of((21, 68, 120)), None, SITE)
    solved = FreeSwim().plan(TokenLayout.of((5, 45, 80)), 0.3, SITE)
    assert solved.delivered == pytest.approx(0.3, rel=0.05)
    with pytest.raises(PatternError, match="both given"):
        FreeSwim((30, 52)).plan(TokenLayout.of((5, 45, 80)), 0.3, SITE)
    with pytest.raises(PatternError, match="2 whole numbers from 1 on, along height, width"):
        FreeSwim((30, 52, 3))
