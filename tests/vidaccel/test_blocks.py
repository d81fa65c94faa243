"""Block masks against the same mask spelled out token by token."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidaccel.blocks import BlockMask, Window
from vidaccel.errors import MaskError
from vidaccel.grid import TokenLayout


@st.composite
def layouts(draw: st.DrawFn) -> TokenLayout:
    grid = draw(st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)))
    text = draw(st.sampled_from([0, 5, 20]))
    tile = draw(st.sampled_from([None, (1, 4, 4), (2, 2, 4), (2, 3, 2)]))
    return TokenLayout.of(grid, text, 16, tile, text_first=draw(st.booleans()))


@st.composite
def masks(draw: st.DrawFn, layout: TokenLayout | None = None) -> tuple[BlockMask, torch.Tensor, torch.Tensor]:
    """A random mask with the maps of kept and of partial blocks that it was built from."""
    layout = layout or draw(layouts())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    shape = (draw(st.sampled_from([1, 3])), layout.blocks, layout.blocks)
    keep = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.2, 0.6, 1.0]))
    partial = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.5]))
    return BlockMask.of(keep, layout, partial=partial, window=window_of(layout)), keep, partial & keep


def boxes_of(layout: TokenLayout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A box around every token: first position, end, own position. Text and holes stand at -1."""
    position = layout.positions
    return position - torch.tensor([1, 2, 1]), position + torch.tensor([1, 2, 3]), position


def window_of(layout: TokenLayout) -> Window:
    return Window.of(*boxes_of(layout), layout.grid)


def spelled_out(layout: TokenLayout, keep: torch.Tensor, partial: torch.Tensor) -> torch.Tensor:
    """(h, tokens, tokens) bool in model order, one pair at a time."""
    dense = torch.zeros(keep.shape[0], layout.tokens, layout.tokens, dtype=torch.bool)
    slot = layout.slot_of.tolist()
    lo, hi, pos = (side.tolist() for side in boxes_of(layout))
    for q, k in itertools.product(range(layout.tokens), repeat=2):
        i, j = slot[q], slot[k]
        m, n = i // layout.block, j // layout.block
        inside = all(p >= 0 and low <= p < high for low, p, high in zip(lo[i], pos[j], hi[i], strict=True))
        dense[:, q, k] = keep[:, m, n] & (~partial[:, m, n] | inside)
    return dense


@settings(max_examples=15, deadline=None)
@given(masks())
def test_dense_is_the_definition(built):
    mask, keep, partial = built
    layout = mask.layout
    dense = spelled_out(layout, keep, partial)
    assert torch.equal(mask.to_dense(), dense)
    start = layout.text if layout.text_first else 0
    video = dense[:, start : start + layout.grid.tokens, start : start + layout.grid.tokens]
    assert mask.density == pytest.approx(float(video.double().mean()))


@settings(max_examples=40, deadline=None)
@given(masks())
def test_rows_round_trip(built):
    mask, keep, partial = built
    layout = mask.layout
    assert torch.equal(mask.block_map(), keep.to(torch.int8) * 2 - partial.to(torch.int8))
    assert mask.heads == keep.shape[0]
    assert mask.has_empty_rows == bool((~keep.any(-1)).any())
    for head, row in itertools.product(range(mask.heads), range(layout.blocks)):
        r = head * layout.blocks + row
        listed = mask.idx[mask.ptr[r] : mask.ptr[r + 1]].tolist()
        full, rest = listed[: mask.n_full[r]], listed[mask.n_full[r] :]
        assert full == (keep & ~partial)[head, row].nonzero()[:, 0].tolist()
        assert rest == partial[head, row].nonzero()[:, 0].tolist()


@settings(max_examples=40, deadline=None)
@given(masks())
def test_visited_counts_whole_tiles(built):
    mask, keep, _ = built
    n, layout = mask.layout.video_blocks, mask.layout
    touched = int(keep[:, :n, :n].sum())
    assert mask.visited == pytest.approx(touched * 16 * 16 / (keep.shape[0] * layout.grid.tokens**2))
    assert mask.visited >= mask.density - 1e-12


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_union(data):
    layout = data.draw(layouts())
    one, *_ = data.draw(masks(layout))
    two, *_ = data.draw(masks(layout))
    both = one.union(two)
    assert both.heads == max(one.heads, two.heads)
    assert torch.equal(both.to_dense(), one.to_dense() | two.to_dense())
    assert torch.equal(both.block_map(), two.union(one).block_map())


def test_union_with_a_mask_without_window():
    layout = TokenLayout.of((2, 4, 4), block=16)
    everything = torch.ones(2, 2, dtype=torch.bool)
    window = window_of(layout)
    partial = BlockMask.of(everything, layout, partial=everything, window=window)
    diagonal = BlockMask.of(torch.eye(2, dtype=torch.bool), layout)
    union = diagonal.union(partial)
    assert union.window is window
    assert union.block_map()[0].tolist() == [[2, 1], [1, 2]]


def test_union_errors():
    layout = TokenLayout.of((2, 4, 4), block=16)
    keep = torch.ones(2, 2, dtype=torch.bool)
    mask = BlockMask.of(keep, layout, partial=keep, window=window_of(layout))
    with pytest.raises(MaskError, match="different layouts"):
        mask.union(BlockMask.of(keep, layout.tiled((2, 4, 2))))
    lo, hi, pos = boxes_of(layout)
    wider = Window.of(lo - 1, hi, pos, layout.grid)
    with pytest.raises(MaskError, match="different token windows"):
        mask.union(BlockMask.of(keep, layout, partial=keep, window=wider))


def test_building_errors():
    layout = TokenLayout.of((2, 4, 4), text=3, block=16)
    with pytest.raises(MaskError, match=r"needs \(heads, 3, 3\), torch.bool"):
        BlockMask.of(torch.ones(2, 2, dtype=torch.bool), layout)
    with pytest.raises(MaskError, match=r"torch\.float32 was given"):
        BlockMask.of(torch.ones(3, 3), layout)
    keep = torch.ones(3, 3, dtype=torch.bool)
    with pytest.raises(MaskError, match="without a window"):
        BlockMask.of(keep, layout, partial=keep)


def test_partial_counts_only_where_kept():
    layout = TokenLayout.of((2, 4, 4), block=16)
    mask = BlockMask.of(torch.eye(2, dtype=torch.bool), layout, partial=torch.ones(2, 2, dtype=torch.bool).triu(1))
    assert mask.block_map()[0].tolist() == [[2, 0], [0, 2]]


def test_density_is_of_video_alone_and_visited_counts_holes():
    layout = TokenLayout.of((1, 4, 6), text=5, block=16)
    keep = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1]], dtype=torch.bool)
    mask = BlockMask.of(keep, layout)
    assert mask.density == pytest.approx((16 * 16 + 8 * 8) / 24**2)
    assert mask.visited == pytest.approx(2 * 16 * 16 / 24**2)
    assert BlockMask.of(torch.ones_like(keep), layout).visited > 1


def test_to_a_device_is_the_same_mask():
    layout = TokenLayout.of((2, 4, 4), block=16)
    keep = torch.eye(2, dtype=torch.bool)
    mask = BlockMask.of(keep, layout, partial=keep, window=window_of(layout))
    assert mask.to("cpu") is mask
    moved = mask.to("meta")
    assert {moved.ptr.device.type, moved.layout.device.type, moved.window.lo.device.type} == {"meta"}


@settings(max_examples=15, deadline=None)
@given(masks())
def test_what_lies_past_the_last_row_means_nothing(built):
    mask, *_ = built
    padded = replace(mask, idx=torch.cat([mask.idx, mask.idx.new_zeros(7)]))
    assert torch.equal(padded.block_map(), mask.block_map())
    assert padded.density == mask.density


def test_key_blocks_of_their_own():
    layout = TokenLayout.of((2, 4, 8), 5, 16)
    lengths = torch.cat([layout.q_len, torch.tensor([16, 3], dtype=torch.int32)])
    # Four video blocks, one of text, and two of merged keys.
    chosen = [[0, 4, 5], [1, 4, 6], [2, 4, 5], [3, 4, 6], [0, 1, 2, 3, 4]]
    ptr = torch.tensor([0, 3, 6, 9, 12, 17], dtype=torch.int32)
    idx = torch.tensor([block for row in chosen for block in row], dtype=torch.int32)
    mask = BlockMask(ptr, idx, ptr.diff(), layout, k_len=lengths)
    assert [row.nonzero()[:, 0].tolist() for row in mask.block_map()[0]] == chosen
    assert mask.density == pytest.approx((2 * 32 + 2 * 19) * 16 / 64**2)
    assert mask.visited == pytest.approx(8 * 16**2 / 64**2)
    with pytest.raises(MaskError, match="join masks over the same keys"):
        mask.union(mask)
    with pytest.raises(MaskError, match="its keys are no tokens"):
        mask.to_dense()
