"""Token orders: nothing is lost, holes are known, text keeps to its own blocks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidaccel.errors import LayoutError
from vidaccel.grid import BLOCK_SIZES, TokenLayout, VideoGrid, choose_tile
from vidaccel.order import fullest


@st.composite
def layouts(draw: st.DrawFn) -> TokenLayout:
    block = draw(st.sampled_from([16, 32, 64]))
    grid = draw(st.tuples(st.integers(1, 6), st.integers(1, 8), st.integers(1, 8)))
    text = draw(st.one_of(st.just(0), st.integers(1, 80)))
    tile = draw(st.sampled_from([None, (1, 4, 4), (2, 2, 4), (3, 5, 1), (2, 3, 2), (1, 3, 0), (2, 2, 0)]))
    return TokenLayout.of(grid, text, block, tile, text_first=draw(st.booleans()))


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_round_trip(layout):
    x = torch.randn(2, layout.tokens, 3)
    moved = layout.to_kernel(x)
    assert moved.shape == (2, layout.slots, 3)
    assert torch.equal(layout.to_model(moved), x)
    assert torch.equal(layout.order[layout.slot_of], torch.arange(layout.tokens))
    assert layout.is_identity == (layout.slots == layout.tokens and bool(torch.equal(moved, x)))


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_holes_are_exactly_the_slots_without_a_token(layout):
    assert layout.filled.sum() == layout.tokens == layout.q_len.sum()
    assert torch.equal(layout.filled.nonzero()[:, 0], layout.slot_of.sort().values)
    x = torch.randn(1, layout.tokens, 1)
    kernel = layout.to_kernel(x)
    kernel[:, ~layout.filled] = math.nan
    assert torch.equal(layout.to_model(kernel), x)
    assert bool(((layout.q_len > 0) & (layout.q_len <= layout.block)).all())


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_text_stands_on_its_own_blocks_in_its_own_order(layout):
    tokens = torch.arange(layout.tokens)
    text = tokens[: layout.text] if layout.text_first else tokens[layout.grid.tokens :]
    first = layout.video_blocks * layout.block
    assert torch.equal(layout.slot_of[text], first + torch.arange(layout.text))
    assert layout.q_len[: layout.video_blocks].sum() == layout.grid.tokens
    assert layout.blocks - layout.video_blocks == -(-layout.text // layout.block)


@settings(max_examples=40, deadline=None)
@given(layouts())
def test_positions(layout):
    expected = torch.full((layout.slots, 3), -1, dtype=torch.int32)
    start = layout.text if layout.text_first else 0
    for n, position in enumerate(itertools.product(*map(range, layout.grid))):
        expected[layout.slot_of[start + n]] = torch.tensor(position, dtype=torch.int32)
    assert torch.equal(layout.positions, expected)


@settings(max_examples=40, deadline=None)
@given(layouts())
def test_a_tile_is_a_box(layout):
    if not layout.is_boxes:
        return
    for n in range(layout.video_blocks):
        position = layout.positions[n * layout.block :][: int(layout.q_len[n])]
        low, high = position.amin(0), position.amax(0)
        assert len(position) == (high - low + 1).prod()
        assert bool((low % torch.tensor(layout.tile) == 0).all())
        assert bool((high - low < torch.tensor(layout.tile)).all())


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 12), st.integers(1, 12)),
    st.sampled_from([(1, 1, 0), (1, 4, 0), (2, 3, 0), (4, 4, 0)]),
)
def test_rods_leave_no_holes_and_keep_neighbours_together(grid, tile):
    layout = TokenLayout.of(grid, block=16, tile=tile)
    assert layout.q_len[:-1].eq(16).all()
    step = layout.positions[layout.filled].diff(dim=0).abs()
    if tile[0] == 1:
        # Within a rod each token is beside the one before.
        assert int((step.sum(1) > 1).sum()) < grid[0] * -(-grid[1] // tile[1])
    assert bool((step[:, 2] <= 1).all())
    assert bool((step[:, :2] <= 2 * torch.tensor(tile[:2])).all())


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    "grid", [(13, 30, 45), (11, 48, 85), (21, 30, 52), (21, 45, 80), (33, 45, 80), (31, 45, 80), (9, 16, 16)], ids=str
)
def test_real_grids_fill_their_blocks(grid, flat, block):
    """13x30x45 fills 0.99 of the pairs, where boxes of one frame fill 0.77, and 45 rows 1.00 instead of 0.88."""
    tile = fullest(grid, block, flat)
    layout = TokenLayout.of(grid, block=block, tile=tile)
    assert (math.prod(grid) / layout.slots) ** 2 > 0.96
    assert not flat or tile[0] == 1
    position = layout.positions.view(-1, block, 3)
    # Blocks are compact: on average hardly longer than a cube or square of as many tokens.
    held = layout.filled.view(-1, block, 1)
    far = torch.where(held, position, position[:, :1]).amax(1) - torch.where(held, position, position[:, :1]).amin(1)
    assert float(far.double().mean(0)[1:].max()) < 2.5 * block**0.5


def test_clipped_tiles_are_packed_from_the_front():
    layout = TokenLayout.of((3, 4, 4), block=16, tile=(2, 2, 4))
    assert layout.q_len.tolist() == [16, 16, 8, 8]
    assert layout.order[:16].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23]
    assert layout.filled.view(4, 16).sum(1).tolist() == [16, 16, 8, 8]
    assert layout.positions[32:40].tolist() == [[2, y, x] for y in range(2) for x in range(4)]


def test_raster_without_holes_moves_nothing():
    x = torch.randn(1, 7 * 5 * 3 + 20, 2)
    layout = TokenLayout.of((7, 5, 3), block=16)
    assert layout.is_identity
    assert layout.to_kernel(x) is x
    assert layout.to_model(x) is x
    assert TokenLayout.of((4, 4, 4), text=20, block=16).is_identity
    assert not TokenLayout.of((7, 5, 3), text=20, block=16).is_identity
    assert not TokenLayout.of((4, 4, 4), text=20, block=16, text_first=True).is_identity


@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_only_the_last_raster_block_is_ragged(block):
    layout = TokenLayout.of((3, 7, 11), block=block)
    *full, last = layout.q_len.tolist()
    assert set(full) <= {block}
    assert last == (231 % block or block)
    assert layout.slots == 231


def test_text_first_is_the_same_kernel_order():
    video, text = torch.randn(1, 30, 4), torch.randn(1, 9, 4)
    last = TokenLayout.of((2, 3, 5), 9, 16, (1, 3, 5))
    first = TokenLayout.of((2, 3, 5), 9, 16, (1, 3, 5), text_first=True)
    one = last.to_kernel(torch.cat([video, text], 1))
    two = first.to_kernel(torch.cat([text, video], 1))
    assert torch.equal(one[:, last.filled], two[:, first.filled])
    assert torch.equal(last.filled, first.filled)
    assert torch.equal(last.positions, first.positions)


def test_valid_text():
    layout = TokenLayout.of((3, 3, 3), text=40, block=16)
    valid = layout.with_valid_text(torch.tensor([0, 5, 16, 17, 40]))
    assert valid.k_len.tolist() == [
        [16, 11, 0, 0, 0],
        [16, 11, 5, 0, 0],
        [16, 11, 16, 0, 0],
        [16, 11, 16, 1, 0],
        [16, 11, 16, 16, 8],
    ]
    assert torch.equal(valid.q_len, layout.q_len)
    assert torch.equal(layout.k_len, layout.q_len)


def test_another_tile_keeps_text_and_its_valid_part():
    layout = TokenLayout.of((3, 4, 4), text=40, block=16, text_first=True).with_valid_text(torch.tensor([7, 33]))
    tiled = layout.tiled((2, 2, 4))
    assert (tiled.text, tiled.text_first, tiled.tile) == (40, True, (2, 2, 4))
    assert tiled.k_len.tolist() == [[16, 16, 8, 8, 7, 0, 0], [16, 16, 8, 8, 16, 16, 1]]
    assert layout.tiled(None, 32).k_len.tolist() == [[32, 16, 7, 0], [32, 16, 32, 1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (0, 4, 4)}, "every axis needs 1 token or more"),
        ({"grid": (1, 4, 4), "text": -1}, "-1 text tokens"),
        ({"grid": (1, 4, 4), "block": 48}, "possible: 16, 32, 64, 128"),
        ({"grid": (1, 4, 4), "block": 16, "tile": (1, 4, 5)}, r"product must lie in 1\.\.16"),
        ({"grid": (1, 4, 4), "block": 16, "tile": (0, 4, 4)}, r"product must lie in 1\.\.16"),
        ({"grid": (1, 4, 4), "block": 16, "tile": (3, 6, 0)}, r"product must lie in 1\.\.16"),
        ({"grid": (2, 4, 4), "block": 16, "tile": (1, 4, 0), "fold": (1, 2, 1)}, "fold boxes"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(LayoutError, match=message):
        TokenLayout.of(**arguments)


@pytest.mark.parametrize(
    ("grid", "block", "tile"),
    [
        ((21, 45, 80), 128, (3, 5, 8)),
        ((21, 30, 52), 128, (3, 10, 4)),
        ((1, 1, 1), 128, (1, 1, 1)),
        ((4, 4, 4), 64, (4, 4, 4)),
    ],
)
def test_choose_tile(grid, block, tile):
    assert choose_tile(VideoGrid(*grid), block) == tile


@settings(max_examples=40, deadline=None)
@given(st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(1, 24)), st.sampled_from(BLOCK_SIZES))
def test_chosen_tiles_fit(grid, block):
    grid = VideoGrid(*grid)
    tile = choose_tile(grid, block)
    assert math.prod(tile) <= block
    assert all(1 <= side <= length for side, length in zip(tile, grid, strict=True))
    TokenLayout.of(grid, block=block, tile=tile)


def test_grid_says_itself():
    grid = VideoGrid(21, 45, 80)
    assert (str(grid), grid.tokens, grid.frame) == ("21x45x80", 75600, 3600)
