"""Spatial and temporal heads against brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vidaccel.errors import PatternError
from vidaccel.grid import Site, TokenLayout
from vidaccel.patterns import FlashBlock, PerHead, SparseVideoGen, TopK
from vidaccel.patterns.svg import near_and_across
from vidaccel.wrapping import attend

SITE = Site("blocks.0.attn1.processor", 0, "self", "wan")


def tensors(layout: TokenLayout, heads: int = 2, seed: int = 0, batch: int = 1) -> list[torch.Tensor]:
    """q, k, v in kernel order, their holes full of NaN."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(3):
        x = layout.to_kernel(torch.randn(batch, layout.tokens, heads, 16, generator=generator)).clone()
        x[:, ~layout.filled] = torch.nan
        found.append(x)
    return found


@st.composite
def layouts(draw: st.DrawFn) -> TokenLayout:
    grid = draw(st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(2, 9)))
    return TokenLayout.of(grid, draw(st.sampled_from([0, 5, 20])), 16, text_first=draw(st.booleans()))


@settings(max_examples=30, deadline=None)
@given(layouts(), st.floats(0.3, 0.9), st.integers(0, 1000))
def test_each_head_gets_the_mask_that_errs_less(layout, density, seed):
    try:
        plan = SparseVideoGen(samples=10**6, sink_frames=0, block=16).plan(layout, density, SITE)
    except PatternError:
        assume(False)
    tiled, select = plan.layout, plan.select
    assert len(select.rows.unique()) == layout.grid.tokens
    q, k, v = tensors(tiled, seed=seed)
    kinds = select.choose(q, k, v).mask.block_map() == 2
    video = tiled.video_blocks
    assert kinds[:, video:].all()
    assert kinds[:, :, video:].all()
    model = [tiled.to_model(x)[0].transpose(0, 1).double() for x in (q, k, v)]
    logits = model[0] @ model[1].transpose(1, 2) / 4
    whole = logits.softmax(-1) @ model[2]
    slot = tiled.slot_of
    own = slice(layout.text, None) if layout.text_first else slice(layout.grid.tokens)
    errors = []
    for blocks in select.masks:
        keep = torch.ones(tiled.blocks, tiled.blocks, dtype=torch.bool)
        keep[:video, :video] = False
        keep[:video].scatter_(1, blocks, True)
        dense = keep[slot[:, None] // 16, slot // 16]
        part = logits.masked_fill(~dense, -torch.inf).softmax(-1) @ model[2]
        errors.append((part - whole)[:, own].square().sum((1, 2)))
    near, across = errors
    for head in range(2):
        if abs(near[head] - across[head]) > 1e-4 * near[head]:
            expected = select.masks[int(across[head] < near[head])]
            assert torch.equal(kinds[head, :video, :video].nonzero()[:, 1].view(video, -1), expected)


@settings(max_examples=30, deadline=None)
@given(layouts())
def test_orders_rank_time_or_space_first(layout):
    tiled = layout.tiled((1, 4, 4))
    video = tiled.video_blocks
    forced = torch.eye(video, dtype=torch.bool)
    near, across = near_and_across(tiled, forced)
    position = [tiled.positions[n * 16 : n * 16 + int(tiled.q_len[n])].double().mean(0) for n in range(video)]
    for row in range(video):
        apart = [
            (round(float((p - position[row]).abs()[0]), 5), round(float((p - position[row])[1:].norm()), 5))
            for p in position
        ]
        mine = sorted(range(video), key=lambda n: (n != row, *apart[n], n))
        theirs = sorted(range(video), key=lambda n: (n != row, *apart[n][::-1], n))
        assert near[row].tolist() == mine
        assert across[row].tolist() == theirs


def test_it_tells_spatial_heads_from_temporal_ones():
    """Head 0 looks at its own frame, head 1 at its own place, heads 2 and 3 likewise, of another sample."""
    layout = TokenLayout.of((8, 8, 8), 0, 16)
    plan = SparseVideoGen(block=16, sink_frames=0).plan(layout, 0.25, SITE)
    position = plan.layout.positions.long()
    frame = torch.nn.functional.one_hot(position[:, 0], 64).float()
    place = torch.nn.functional.one_hot(position[:, 1] * 8 + position[:, 2], 64).float()
    x = 12 * torch.stack([frame, place, place, frame], 1)[None]
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    rows = plan.select.choose(x, x, v).mask.block_map()[:, : plan.layout.video_blocks] == 2
    expected = [plan.select.masks[n] for n in (0, 1, 1, 0)]
    for kept, blocks in zip(rows, expected, strict=True):
        assert torch.equal(kept.nonzero()[:, 1].view(len(blocks), -1), blocks)


@pytest.mark.parametrize(("text", "batch"), [(0, 2), (5, 1)])
def test_attention_over_what_was_chosen(text, batch):
    plan = SparseVideoGen(block=16).plan(TokenLayout.of((4, 7, 9), text, 16), 0.5, SITE)
    q, k, v = tensors(plan.layout, batch=batch)
    out, choice = attend(plan, q, k, v)
    mask = choice.mask.to_dense().unflatten(0, (batch, -1))
    model = [plan.layout.to_model(x).transpose(1, 2) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*model, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(plan.layout.to_model(out), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("grid", "density"), [((21, 45, 80), 0.25), ((13, 30, 45), 0.3)], ids=str)
def test_density_at_real_sizes(grid, density):
    plan = SparseVideoGen().plan(TokenLayout.of(grid), density, SITE)
    assert plan.delivered == pytest.approx(density, rel=0.03)
    assert plan.visited <= 1.3 * plan.delivered


def test_same_seed_same_rows():
    layout = TokenLayout.of((4, 8, 8), 0, 16)
    rows = [SparseVideoGen(samples=9, seed=seed, block=16).plan(layout, 0.5, SITE).select.rows for seed in (0, 0, 1)]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    assert len(rows[0].unique()) == 9


def test_wrong_parameters_name_right_ones():
    layout = TokenLayout.of((4, 8, 8), block=16)
    with pytest.raises(PatternError, match="no density of its own"):
        SparseVideoGen(block=16).plan(layout, None, SITE)
    with pytest.raises(PatternError, match="give 1 or more, usually 32"):
        SparseVideoGen(samples=0)
    with pytest.raises(PatternError, match=r"ask for 0\.\d+ or more, or for fewer sink_frames"):
        SparseVideoGen(block=16, sink_frames=2).plan(layout, 0.2, SITE)


@pytest.mark.parametrize("valid", [(7,), (7, 12)], ids=str)
@pytest.mark.parametrize(
    "pattern",
    [
        SparseVideoGen(block=16),
        PerHead((SparseVideoGen(block=16), TopK(block=16)), (0, 1, 0, 0)),
        FlashBlock(part=SparseVideoGen(block=16)),
    ],
    ids=lambda pattern: pattern.name,
)
def test_padding_of_the_prompts_decides_nothing(pattern: Any, valid: tuple[int, ...]) -> None:
    """Heads are told apart by what a call attends to, whatever stands behind the prompt of any sample."""
    layout, samples = TokenLayout.of((4, 8, 8), 20, 16), len(valid)
    select = pattern.plan(layout, 0.5, SITE).with_valid_text(torch.tensor(valid)).select
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, layout.slots, 4 * samples, 8, generator=generator) for _ in range(3))
    chosen = select.choose(q, k, v).mask.idx
    for n, length in enumerate(valid):
        start = layout.video_blocks * layout.block + length
        for x in (k, v):
            x[:, start:, 4 * n : 4 * n + 4] = torch.nan
    assert torch.equal(select.choose(q, k, v).mask.idx, chosen)


@pytest.mark.parametrize("seen", [0, 1], ids=["near", "across"])
def test_a_mask_that_misses_all_that_a_row_looks_at_loses(seen: int) -> None:
    """In fp16 all its weights are 0."""
    select = SparseVideoGen(samples=1, sink_frames=0, block=16).plan(TokenLayout.of((4, 8, 8), 0, 16), 0.3, SITE).select
    alone = select.kept_keys[seen, 0] & ~select.kept_keys[1 - seen, 0]
    assert alone.any()
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(1, select.layout.slots, 1, 8, generator=generator).half()
    q, k = torch.zeros_like(v), torch.zeros_like(v)
    q[..., 0], k[0, alone, :, 0] = 10, 30
    kept = select.choose(q, k, v).mask.block_map()[0] > 0
    assert torch.equal(kept.nonzero()[:, 1].view(len(kept), -1), select.masks[seen])
