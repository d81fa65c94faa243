"""Hierarchical selection against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidaccel.errors import PatternError
from vidaccel.grid import Site, TokenLayout
from vidaccel.patterns import LightForcing, TopK

SITE = Site("blocks.0.attn1.processor", 0, "self", "wan")


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(3, 6), st.integers(2, 7), st.integers(4, 9)),
    st.integers(0, 1),
    st.integers(0, 2),
    st.sampled_from([0, 5]),
    st.integers(0, 1000),
)
def test_rows_are_the_best_blocks_of_the_best_frames(grid, near, sink, text, seed):
    frames = min(grid[0], 2 * near + 1 + sink + 1)
    layout = TokenLayout.of(grid, text, 16)
    plan = LightForcing(frames, near, sink, 16).plan(layout, 0.5 * frames / grid[0], SITE)
    tiled = plan.layout
    generator = torch.Generator().manual_seed(seed)
    q, k = (tiled.to_kernel(torch.randn(1, tiled.tokens, 2, 16, generator=generator)) for _ in range(2))
    kinds = plan.select(q, k, k).mask.block_map()
    video = tiled.video_blocks
    each = video // grid[0]
    kept = int(kinds[0, 0, :video].ne(0).sum())
    assert (kinds[:, :, video:] == 2).all()
    assert (kinds[:, video:] == 2).all()
    block_of = torch.arange(tiled.slots) // 16
    for head, row in itertools.product(range(2), range(video)):
        query = q[0, (block_of == row) & tiled.filled, head].mean(0)
        tokens = [k[0, (block_of == block) & tiled.filled, head] for block in range(video)]
        frame_keys = torch.stack([torch.cat(tokens[f * each : (f + 1) * each]).mean(0) for f in range(grid[0])])
        own = row // each
        seen = {f for f in range(grid[0]) if abs(f - own) <= near or f < sink}
        ranked = [f for f in (frame_keys @ query).argsort(descending=True).tolist() if f not in seen]
        seen |= set(ranked[: frames - len(seen)])
        block_keys = torch.stack([part.mean(0) for part in tokens])
        best = (block_keys @ query).argsort(descending=True).tolist()
        eligible = [n for n in best if n // each in seen and n != row]
        assert set(kinds[head, row, :video].nonzero()[:, 0].tolist()) == {row, *eligible[: kept - 1]}


def test_all_frames_are_block_top_k():
    layout = TokenLayout.of((4, 7, 9), block=16)
    one = LightForcing(4, block=16).plan(layout, 0.4, SITE)
    two = TopK(block=16, sink_frames=0).plan(one.layout, 0.4, SITE)
    x = one.layout.to_kernel(torch.randn(1, layout.tokens, 2, 16, generator=torch.Generator().manual_seed(0)))
    if two.layout.tile == one.layout.tile:
        assert torch.equal(one.select(x, x, x).mask.idx, two.select(x, x, x).mask.idx)


@pytest.mark.parametrize("grid", [(21, 45, 80), (21, 30, 52), (33, 45, 80)], ids=str)
@pytest.mark.parametrize("density", [0.12, 0.25])
def test_at_real_sizes(grid, density):
    plan = LightForcing().plan(TokenLayout.of(grid), density, SITE)
    assert plan.layout.tile[0] == 1
    assert plan.delivered == pytest.approx(density, rel=0.03)
    assert plan.visited <= 1.2 * plan.delivered


def test_wrong_parameters_name_right_ones():
    layout = TokenLayout.of((6, 8, 8), block=16)
    with pytest.raises(PatternError, match=r"keep_frames=2 was asked for.*lies in 4 to 6"):
        LightForcing(2, block=16).plan(layout, 0.3, SITE)
    with pytest.raises(PatternError, match=r"keep_frames=9 was asked for.*lies in 4 to 6"):
        LightForcing(9, block=16).plan(layout, 0.3, SITE)
    with pytest.raises(PatternError, match="no density of its own"):
        LightForcing(block=16).plan(layout, None, SITE)
    with pytest.raises(PatternError, match="near=-1 was asked for; give a number of frames from 0 on"):
        LightForcing(near=-1)
