"""Neighborhood attention against its published definition, one pair at a time."""

from __future__ import annotations

import itertools
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidaccel.blocks import BlockMask
from vidaccel.errors import LayoutError, PatternError
from vidaccel.grid import Site, TokenLayout
from vidaccel.patterns import Ann, LightForcing, Neighborhood, Radial, SlidingWindow, SparseVideoGen, TopK
from vidaccel.patterns.axes import cheapest, cheapest_box, simulate
from vidaccel.patterns.neighborhood import neighborhood_axis
from vidaccel.window import tops

SITE = Site("blocks.0.attn1.processor", 0, "self", "wan")


def keeps(x: int, y: int, length: int, window: int, stride: int, dilation: int, causal: bool) -> bool:
    """The definition of generalized neighborhood attention on one axis."""
    group, place = x % dilation, x // dilation
    size = length // dilation + (group < length % dilation)
    if causal:
        leader = min(place // stride * stride + stride - 1, size - 1)
        start, end = max(leader - window + 1, 0), place + 1
    else:
        left, right = window // 2, window // 2 + window % 2 - 1
        leader = min(place // stride * stride + stride // 2, size - 1)
        start = max(leader - left, 0)
        if leader + right >= size:
            start += size - right - leader - 1
        end = start + window
    return y % dilation == group and start <= y // dilation < end


def axis_map(*parameters: int) -> torch.Tensor:
    length = parameters[0]
    return torch.tensor([[keeps(x, y, *parameters) for y in range(length)] for x in range(length)])


def video_mask(mask: BlockMask) -> torch.Tensor:
    start = mask.layout.text if mask.layout.text_first else 0
    video = slice(start, start + mask.layout.grid.tokens)
    return mask.to_dense()[:, video, video]


@st.composite
def rules(draw: st.DrawFn, longest: int = 12) -> tuple[int, int, int, int, bool]:
    """length, window, stride, dilation, causal."""
    length = draw(st.integers(1, longest))
    dilation = draw(st.integers(1, min(length, 3)))
    window = draw(st.integers(1, length // dilation))
    return length, window, draw(st.integers(1, window)), dilation, draw(st.booleans())


@settings(max_examples=200, deadline=None)
@given(rules(24))
def test_one_axis_is_the_definition(rule):
    length, window, _, _, causal = rule
    axis = neighborhood_axis(*rule)
    expected = axis_map(*rule)
    assert torch.equal(axis.kept(), expected)
    assert axis.density == pytest.approx(float(expected.double().mean()))
    assert expected.any(1).all()
    if not causal:
        assert (expected.sum(1) == window).all()
        assert axis.density == pytest.approx(window / length)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(rules(5), rules(7), rules(7)),
    st.sampled_from([0, 5]),
    st.booleans(),
    st.sampled_from([None, (1, 4, 4), (2, 3, 2), (1, 4, 0), (2, 2, 0)]),
)
def test_mask_is_the_definition(axes, text, text_first, tile):
    length, window, stride, dilation, causal = zip(*axes, strict=True)
    layout = TokenLayout.of(length, text, 16, text_first=text_first)
    pattern = Neighborhood(window, stride, dilation, causal, tile, block=16)
    plan = pattern.plan(layout, None, SITE)
    t, y, x = (axis_map(*axis) for axis in axes)
    expected = torch.kron(torch.kron(t.int(), y.int()), x.int()).bool()
    assert torch.equal(video_mask(plan.mask)[0], expected)
    assert plan.delivered == pytest.approx(float(expected.double().mean()))
    dense = plan.mask.to_dense()[0]
    words = slice(0, text) if text_first else slice(layout.grid.tokens, None)
    assert dense[words].all()
    assert dense[:, words].all()
    if not any(causal):
        assert plan.delivered == pytest.approx(math.prod(k / n for k, n in zip(window, length, strict=True)))
        assert (expected.sum(1) == math.prod(window)).all()


@settings(max_examples=40, deadline=None)
@given(st.tuples(rules(6), rules(9), rules(9)), st.integers(0, 2))
def test_simulator_counts_what_the_mask_touches(axes, sink):
    lengths, window, stride, dilation, causal = zip(*axes, strict=True)
    sink = min(sink, lengths[0])
    pattern = Neighborhood(window, stride, dilation, causal, block=16, sink_frames=sink)
    plan = pattern.plan(TokenLayout.of(lengths, block=16), None, SITE)
    built = [neighborhood_axis(*axis) for axis in axes]
    forecast = simulate(built, plan.layout.tile, 16, plan.layout.fold, sink)
    assert plan.visited == pytest.approx(forecast.visited)
    kinds = plan.mask.block_map()
    n = plan.layout.video_blocks
    assert forecast.full == pytest.approx(float((kinds[:, :n, :n] == 2).sum() / (kinds[:, :n, :n] > 0).sum()))
    assert forecast == cheapest(built, 16, sink)


@settings(max_examples=10, deadline=None)
@given(st.tuples(rules(4), rules(6), rules(6)))
def test_no_tile_order_touches_fewer_tiles(axes):
    built = [neighborhood_axis(*axis) for axis in axes]
    lengths = [axis[0] for axis in axes]
    best = cheapest_box(built, 16)
    assert cheapest(built, 16).cost <= best.cost
    for tile in itertools.product(*(range(1, length + 1) for length in lengths)):
        if math.prod(tile) <= 16:
            for fold in itertools.product(*({1, axis[3]} for axis in axes)):
                assert simulate(built, tile, 16, fold).visited >= best.visited - 1e-12


def test_stride_of_the_window_is_blocked_attention():
    plan = Neighborhood((2, 4, 4), (2, 4, 4), tile=(1, 4, 4), block=16).plan(TokenLayout.of((4, 8, 8)), None, SITE)
    cell = torch.tensor([(t // 2, y // 4, x // 4) for t, y, x in itertools.product(range(4), range(8), range(8))])
    assert torch.equal(video_mask(plan.mask)[0], (cell[:, None] == cell).all(-1))
    assert plan.mask.window is None


def test_window_of_the_whole_axis_is_dense_along_it():
    layout = TokenLayout.of((5, 4, 6), block=16)
    one = Neighborhood((0, 3, 3), block=16).plan(layout, None, SITE)
    two = Neighborhood((5, 3, 3), stride=(4, 1, 1), block=16).plan(layout, None, SITE)
    assert torch.equal(video_mask(one.mask), video_mask(two.mask))
    time = video_mask(one.mask)[0].view(5, 24, 5, 24)
    assert torch.equal(time, time[:1, :, :1].expand_as(time))
    assert tops(one.mask.window.guards).bit_count() <= 2
    everything = Neighborhood((0, 0, 0), block=16).plan(layout, None, SITE)
    assert everything.delivered == 1


def test_exact_density_of_the_literature():
    plan = Neighborhood((3, 5, 7), block=32).plan(TokenLayout.of((3, 8, 12), block=32), None, SITE)
    assert plan.delivered == pytest.approx(0.36458, abs=5e-6)


@pytest.mark.parametrize(
    ("tile", "stride", "speedup"),
    [
        ((2, 8, 8), (1, 1, 1), 5.44),
        ((2, 8, 8), (16, 8, 8), 11.11),
        ((2, 8, 8), (6, 8, 8), 11.11),
        ((4, 4, 8), (1, 1, 1), 6.24),
        ((4, 4, 8), (16, 8, 8), 10.67),
        ((4, 4, 8), (6, 8, 8), 10.16),
    ],
)
def test_simulator_agrees_with_the_published_bounds(tile, stride, speedup):
    axes = [neighborhood_axis(n, k, s) for n, k, s in zip((30, 48, 80), (18, 24, 24), stride, strict=True)]
    tiles = math.prod(-(-n // side) for n, side in zip((30, 48, 80), tile, strict=True))
    visited = simulate(axes, tile, 128).visited * (30 * 48 * 80 / 128) ** 2
    assert tiles**2 / visited == pytest.approx(speedup, abs=6e-3)


def test_sink_frames_are_kept_in_whole_tiles():
    layout = TokenLayout.of((6, 4, 8), 3, 16)
    without = Neighborhood((3, 3, 3), tile=(2, 2, 4), block=16).plan(layout, None, SITE)
    plan = Neighborhood((3, 3, 3), tile=(2, 2, 4), block=16, sink_frames=1).plan(layout, None, SITE)
    dense = video_mask(plan.mask)[0]
    assert dense[:, : 2 * 32].all()
    assert torch.equal(dense[:, 2 * 32 :], video_mask(without.mask)[0][:, 2 * 32 :])


@pytest.mark.parametrize("grid", [(21, 45, 80), (21, 30, 52), (33, 45, 80), (9, 16, 16)], ids=str)
@pytest.mark.parametrize("density", [0.15, 0.25, 0.5])
@pytest.mark.parametrize("sink", [0, 1])
def test_window_is_solved_for_a_density(grid, density, sink):
    plan = Neighborhood(sink_frames=sink).plan(TokenLayout.of(grid), density, SITE)
    assert plan.requested == density
    assert plan.delivered == pytest.approx(density, rel=0.05)
    window = [int(n) for n in plan.rule.removeprefix("window ").split("x")]
    extents = [k / n for k, n in zip(window, grid, strict=True)]
    assert max(extents) / min(extents) < 1.6


@pytest.mark.parametrize(
    ("grid", "visited"),
    [((21, 45, 80), 0.36), ((33, 45, 80), 0.36), ((21, 30, 52), 0.42), ((13, 30, 45), 0.44)],
    ids=str,
)
def test_visited_at_real_sizes(grid, visited):
    start = time.process_time()
    plan = Neighborhood().plan(TokenLayout.of(grid), 0.25, SITE)
    assert time.process_time() - start < 10
    assert plan.visited <= visited
    aligned = Neighborhood(stride=(3, 5, 8)).plan(TokenLayout.of((21, 45, 80)), 0.25, SITE)
    assert aligned.visited <= 1.2 * aligned.delivered
    assert aligned.mask.window is None


# 720p of Wan, HunyuanVideo and HunyuanVideo-1.5 (81, 129 and 121 frames), with tiles that divide them.
LARGE = [((21, 45, 80), (3, 5, 8)), ((33, 45, 80), (3, 5, 8)), ((31, 45, 80), (1, 15, 8))]


@pytest.mark.parametrize("density", [0.1, 0.15, 0.25, 0.35, 0.5])
@pytest.mark.parametrize(("grid", "tile"), LARGE, ids=str)
def test_strides_of_one_tile_visit_what_they_keep(grid, tile, density):
    plan = Neighborhood(stride=tile).plan(TokenLayout.of(grid), density, SITE)
    assert plan.visited <= 1.2 * plan.delivered
    assert plan.delivered == pytest.approx(density, rel=0.1)


@pytest.mark.parametrize(("grid", "density"), [(LARGE[0][0], 0.15), (LARGE[1][0], 0.25), (LARGE[2][0], 0.35)], ids=str)
def test_stride_one_visits_what_the_best_of_all_tiles_does(grid, density):
    """The mask that is built, against the counts of every box that divides the frame or nearly fills a block."""
    plan = Neighborhood().plan(TokenLayout.of(grid), density, SITE)
    window = [int(n) for n in plan.rule.removeprefix("window ").split("x")]
    axes = [neighborhood_axis(*each) for each in zip(grid, window, strict=True)]
    tiles = [
        (t, y, 128 // (t * y))
        for t, y in itertools.product(range(1, grid[0] + 1), range(1, grid[1] + 1))
        if 128 // (t * y) and t * y * (128 // (t * y)) >= 112
    ]
    sides = [{n: axis.tiles(n)[0] for n in range(1, min(len(axis.rank), 128) + 1)} for axis in axes]
    best = min(
        math.prod(int(touched[side].sum()) for touched, side in zip(sides, tile, strict=True))
        for tile in tiles
        if tile[2] <= grid[2]
    )
    kinds = plan.mask.block_map() > 0
    touched = int(kinds.sum())
    assert touched <= 1.1 * best
    assert plan.visited == pytest.approx(touched * 128**2 / math.prod(grid) ** 2)


@pytest.mark.parametrize(("grid", "tile"), LARGE, ids=str)
@pytest.mark.parametrize(
    "pattern",
    [SlidingWindow(), Radial(rule="ranked"), TopK(), SparseVideoGen(), LightForcing(), Ann()],
    ids=lambda p: p.name,
)
def test_whole_tiles_visit_what_they_keep(pattern, grid, tile):
    for density in (0.15, 0.5):
        plan = pattern.plan(TokenLayout.of(grid), density, SITE)
        assert plan.visited <= 1.2 * plan.delivered


def test_dilation_folds_the_tiles():
    dilated = Neighborhood((7, 15, 16), dilation=(3, 3, 5)).plan(TokenLayout.of((21, 45, 80)), None, SITE)
    assert dilated.layout.fold != (1, 1, 1)
    assert dilated.visited <= 1.2 * dilated.delivered


def test_folded_layout():
    layout = TokenLayout.of((1, 1, 7), block=16, tile=(1, 1, 7), fold=(1, 1, 3))
    assert layout.order[:7].tolist() == [0, 3, 6, 1, 4, 2, 5]
    assert torch.equal(layout.to_model(layout.to_kernel(torch.arange(7)[None])), torch.arange(7)[None])
    with pytest.raises(LayoutError, match="needs a tile"):
        TokenLayout.of((2, 2, 2), block=16, fold=(1, 2, 1))
    with pytest.raises(LayoutError, match=r"in 1\.\.axis"):
        TokenLayout.of((2, 2, 2), block=16, tile=(1, 1, 1), fold=(3, 1, 1))


@pytest.mark.parametrize(
    ("arguments", "density", "message"),
    [
        ({"window": (9, 3, 3)}, None, "room for 4; use 4, or 0"),
        ({"window": (2, 3, 3), "dilation": (1, 3, 1)}, None, "room for 2 with dilation 3; use 2"),
        ({"window": (2, 3, 3), "stride": (1, 1, 4)}, None, "at most 3, or a window of 4 or more"),
        ({"window": (2, 3, 3), "dilation": (5, 1, 1)}, None, "has 4 tokens there; at most 4"),
        ({"window": (2, 3, 3)}, 0.3, "drop the window"),
        ({}, None, "no density of its own"),
        ({}, 1.5, r"in \(0, 1\]"),
        ({"stride": (5, 1, 1)}, 0.3, "end at 4 on a 4x6x8 grid; use a stride of at most 4"),
        ({"dilation": (2, 2, 2)}, 0.5, "they have 0.00521 to 0.125"),
        ({"sink_frames": 5}, 0.3, "has 4 frames; give 0 to 4"),
    ],
)
def test_wrong_parameters_name_right_ones(arguments, density, message):
    with pytest.raises(PatternError, match=message):
        Neighborhood(**arguments, block=16).plan(TokenLayout.of((4, 6, 8), block=16), density, SITE)


@pytest.mark.parametrize("window", [(1, 2), (-1, 2, 2), (1.5, 2, 2), "abc"])
def test_shapes_of_parameters(window):
    with pytest.raises(PatternError, match="3 whole numbers from 0 on"):
        Neighborhood(window)
