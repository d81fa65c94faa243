"""Blocks of the past: balanced blocks, Light Forcing against brute force, hashing, rows of some heads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from vidaccel.errors import UsageError
from vidaccel.kernels.attention import attention
from vidaccel.patterns.hashing import HashPlanes
from vidaccel.reuse import CausalAnn, CausalLightForcing, FlashBlock, Methods
from vidaccel.reuse.past import HashedPast
from vidaccel.reuse.plan import ChunkPlanner
from vidaccel.reuse.selection import (
    FrameRule,
    best_of,
    block_means,
    frame_layout,
    only_heads,
    rectangle,
    row_layout,
)
from vidaccel.streaming import Rollout


@pytest.mark.parametrize(
    ("y", "x", "block", "blocks", "short", "long"),
    [(30, 52, 128, 13, 120, 120), (30, 52, 64, 25, 62, 63), (45, 80, 128, 29, 124, 125), (45, 80, 64, 57, 63, 64)],
)
def test_published_resolutions_are_cut_evenly(y: int, x: int, block: int, blocks: int, short: int, long: int) -> None:
    layout = frame_layout(2, y, x, block)
    assert layout.blocks == 2 * blocks
    assert {int(layout.q_len.min()), int(layout.q_len.max())} == {short, long}
    assert int(layout.q_len.sum()) == 2 * y * x
    tokens = torch.arange(2 * y * x)[None]
    assert torch.equal(layout.to_model(layout.to_kernel(tokens)), tokens)
    frame = layout.positions[:, 0].view(-1, block)
    assert all(len(set(row[row >= 0].tolist())) == 1 for row in frame), "a block crosses frames"
    held = layout.to_kernel(tokens)[0].view(-1, block)
    assert all(torch.equal(row[:n].diff(), torch.ones(n - 1)) for row, n in zip(held, layout.q_len, strict=True))


@pytest.mark.parametrize(("frame", "keep"), [((30, 52), 3), ((45, 80), 6)])
def test_light_forcing_is_what_brute_force_finds(frame: tuple[int, int], keep: int) -> None:
    block, history, own = 64, 9, 3
    one, all_frames = frame_layout(own, *frame, block), frame_layout(history + own, *frame, block)
    per_frame = one.blocks // own
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, one.blocks, 8, generator=generator)
    key = torch.randn(2, all_frames.blocks, 8, generator=generator)
    always = torch.zeros(history, dtype=torch.bool)
    always[[0, 7]] = True  # as in a ring: the latest frame may stand anywhere
    kept = int(0.15 * all_frames.blocks)
    rule = FrameRule(torch.tensor(kept), (keep + own) * per_frame, keep, always, 0, per_frame)
    scores = rule.scores(query, key, rule.frame_means(key, all_frames.q_len))
    mask = best_of(scores, rule.kept, rule.most, one, all_frames.q_len)
    chosen = mask.idx[: 2 * one.blocks * kept].view(2, one.blocks, kept)
    length = all_frames.q_len.double().view(history + own, per_frame)
    for head in range(2):
        means = key[head].double().view(history + own, per_frame, 8)
        frame_key = (means * length[..., None]).sum(1) / length.sum(1)[:, None]
        for row in range(0, one.blocks, 7):
            q = query[head, row].double()
            score = [float("inf") if always[f] else float(frame_key[f] @ q) for f in range(history)]
            frames = sorted(range(history), key=lambda f: -score[f])[:keep] + list(range(history, history + own))
            blocks = [f * per_frame + n for f in frames for n in range(per_frame)]
            best = sorted(blocks, key=lambda b: -float(key[head, b].double() @ q))[:kept]
            assert chosen[head, row].tolist() == sorted(best)
    touched = {len(set((row // per_frame).tolist())) for head in chosen for row in head}
    assert max(touched) <= keep + own


def test_rectangles_and_rows_of_some_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 40, 3, 16, generator=generator)
    k, v = (torch.randn(1, 90, 3, 16, generator=generator) for _ in range(2))
    layout, k_len = row_layout(40, 16), torch.tensor([16, 16, 16, 16, 16, 10], dtype=torch.int32)
    chosen = torch.stack([torch.randperm(6, generator=generator)[:4].sort().values for _ in range(9)]).view(3, 3, 4)
    mask = rectangle(chosen, layout, k_len)
    out, _ = attention(q, k, v, mask)
    for head in range(3):
        for row in range(3):
            keys = torch.cat([torch.arange(16 * b, min(16 * b + 16, 90)) for b in chosen[head, row].tolist()])
            own = slice(16 * row, min(16 * row + 16, 40))
            expected, _ = attention(q[:, own, head, None], k[:, keys][:, :, head, None], v[:, keys][:, :, head, None])
            torch.testing.assert_close(out[:, own, head, None], expected, atol=1e-5, rtol=0)
    wanted = torch.tensor([True, False, True])
    some, some_lse = attention(q, k, v, only_heads(mask, wanted))
    torch.testing.assert_close(some[:, :, wanted], out[:, :, wanted], atol=1e-6, rtol=0)
    assert some[:, :, 1].abs().max() == 0
    assert (some_lse[:, 1] == -torch.inf).all()
    shared = rectangle(torch.arange(6).expand(1, 3, -1), layout, k_len)
    some, _ = attention(q, k, v, only_heads(shared, wanted))
    torch.testing.assert_close(some[:, :, wanted], attention(q, k, v)[0][:, :, wanted], atol=1e-5, rtol=0)


def test_means_count_tokens_and_weights() -> None:
    x = torch.arange(40.0).view(1, 20, 1, 2)
    length = torch.tensor([8, 5, 4])
    means = block_means(x, length, 8)
    assert means[0, 1].tolist() == x[0, 8:13, 0].mean(0).tolist()
    weight = torch.zeros(1, 20)
    weight[0, 8], weight[0, 9], weight[0, 14] = 3.0, 1.0, 100.0
    weighted = block_means(x, length, 8, weight)
    assert weighted[0, 1].tolist() == ((3 * x[0, 8, 0] + x[0, 9, 0]) / 4).tolist()
    assert weighted[0, 0].tolist() == [0, 0], "a block without a key has no mean"


def test_codes_of_neighbours_and_counts() -> None:
    planes = HashPlanes.of(6)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 200, 2, 16, generator=generator)
    codes = planes.codes(x)
    assert codes.shape == (2, 200)
    near = planes.codes(x + 1e-4)
    assert (codes == near).float().mean() > 0.98
    counts = planes.counts(codes)
    assert counts.shape == (2, 64)
    assert counts.sum(1).tolist() == [200, 200]
    order, sorted_counts = planes.sort(codes, 64)
    assert torch.equal(sorted_counts.sum(1), counts)
    assert torch.equal(codes.gather(1, order), codes.sort(dim=1).values)
    assert torch.equal(planes.affinity, planes.affinity.T)
    assert (planes.affinity.diagonal() == 1).all()
    # In Gray order, codes next to each other differ in one bit.
    assert torch.allclose(planes.affinity.diagonal(1), torch.full((63,), 1 / 16))


def test_a_rule_without_history_has_no_means_of_frames() -> None:
    rule = FrameRule(torch.tensor(1), 4, None, torch.zeros(0, dtype=torch.bool), 2, 2)
    assert rule.frame_means(torch.ones(2, 4, 8), torch.full((4,), 16)).shape == (2, 0, 8)


@pytest.mark.parametrize("merged", [0, 40])
def test_no_row_of_neighbours_is_empty(merged: int) -> None:
    """However few blocks are kept, and however many places for merged keys hold nothing."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, length, 2, 16, generator=generator) for length in (40, 100))
    sizes = torch.zeros(2, merged) if merged else None
    mask, _, k_order = HashedPast(CausalAnn(density=0.01, block=16)).choose(q, k, 1, sizes)
    assert mask.ptr.diff().tolist() == [1] * (2 * 3)
    for row, block in enumerate(mask.idx[:6].tolist()):
        assert (k_order[row // 3, block * 16 : block * 16 + 16] >= merged).any(), "a row has nothing but empty places"


def test_reuse_rests_where_the_own_chunk_alone_is_more_than_is_chosen() -> None:
    """Measured on one H200, 480p, window 12: Light Forcing 0.88 times dense's speed, with FlashBlock on top 0.64."""
    rollout, device = Rollout(window=12, sink=3), torch.device("cpu")
    found = {}
    for density, insists in ((0.15, False), (0.15, True), (0.4, False)):
        light = CausalLightForcing(density, density / 3)
        methods = Methods.of([light, FlashBlock()], math.inf if insists else None)
        found[density, insists] = ChunkPlanner(methods, rollout, (30, 52), device).plan(30, 3, list(range(9)))
    rests = found[0.15, False]
    assert not rests.plan.reuses
    assert (
        f"all 75 blocks of the own chunk are attended to, where Light Forcing keeps {rests.plan.rule.kept}"
        in rests.note
    )
    assert found[0.15, True].plan.reuses
    assert found[0.4, False].plan.rule.kept > 75
    # The own chunk is whole, and as many blocks as are there, up to those kept, are chosen of the past.
    rule = found[0.4, False].plan.rule
    assert found[0.4, False].density == pytest.approx(min(75 + int(rule.kept), rule.most) / 300)
    assert found[0.4, False].plan.reuses
    assert not found[0.4, False].note


def test_sorting_must_be_worth_it() -> None:
    """Measured on one H200 beside dense attention, window 12, density 0.3: 0.85 times as fast at 480p."""
    rollout, device = Rollout(window=12, sink=3), torch.device("cpu")
    found = {}
    for size, grid in (("480p", (30, 52)), ("720p", (45, 80))):
        for forced in (False, True):
            methods = Methods.of([CausalAnn(0.3)], math.inf if forced else None)
            found[size, forced] = ChunkPlanner(methods, rollout, grid, device).plan(30, 3, list(range(9)))
    assert found["480p", False].density == 1
    assert "by estimate" in found["480p", False].note
    kept = found["480p", True].plan.ann_kept
    assert kept == round(0.3 * math.ceil(9 * 1560 / 64))
    for forced in (False, True):
        assert found["720p", forced].plan.ann_kept == round(0.3 * math.ceil(9 * 3600 / 64))
        assert not found["720p", forced].note


@pytest.mark.parametrize("method", [CausalAnn, CausalLightForcing])
def test_blocks_are_those_of_the_kernels(method: Any) -> None:
    for block in (0, 8, 48):
        with pytest.raises(UsageError, match="block one of 16, 32, 64, 128"):
            method(block=block)
