"""Pyramid attention against its definition, spelled out key by key."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, currently_in_test_context, given, settings
from hypothesis import strategies as st

from vidaccel.errors import PatternError
from vidaccel.grid import Site, TokenLayout
from vidaccel.patterns import Pyramid
from vidaccel.patterns.pyramid import LEVELS, Counts, fractions_for
from vidaccel.wrapping import attend

SITE = Site("blocks.0.attn1.processor", 0, "self", "wan")


def tensors(layout: TokenLayout, batch: int = 1, heads: int = 2, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v in kernel order, their holes full of NaN."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(3):
        x = layout.to_kernel(torch.randn(batch, layout.tokens, heads, 16, generator=generator)).clone()
        x[:, ~layout.filled] = torch.nan
        found.append(x)
    return found


def levels_of(plan, q, k, sink=0):
    """(h, video, video) of one sample: the level at which each row sees each tile, 0 where it does not."""
    layout, counts = plan.layout, plan.select.counts
    video, block = layout.video_blocks, layout.block
    tiles = [slice(n * block, n * block + int(layout.q_len[n])) for n in range(video)]
    groups = -(-video // 8)
    first = [bool((layout.positions[tile, 0] < sink).any()) for tile in tiles]
    levels = torch.zeros(q.shape[2], video, video, dtype=torch.int64)
    eight, four, two = counts.open

    def cut(best, nodes, many):
        """The best ones, and the others."""
        order = sorted(nodes, key=best.__getitem__, reverse=True)
        if currently_in_test_context() and 0 < many < len(order) and best[order[many]] > -math.inf:
            assume(best[order[many - 1]] - best[order[many]] > 1e-6)  # rounding decides nothing
        return order[:many], order[many:]

    for head in range(q.shape[2]):
        queries, keys = (torch.stack([x[0, tile, head].double().mean(0) for tile in tiles]) for x in (q, k))
        for row in range(video):
            scores = (keys @ queries[row]).tolist()
            scores = [math.inf if n == row or first[n] else score for n, score in enumerate(scores)]
            scores += [-math.inf] * (8 * groups - video)
            best = {size: [max(scores[n : n + size]) for n in range(0, len(scores), size)] for size in LEVELS}
            order, rest = cut(best[8], range(groups), eight)
            seen = {(8, n) for n in cut(best[8], rest, counts.coarse)[0]}
            for size, many in ((4, four), (2, two)):
                order, rest = cut(best[size], [2 * n + part for n in order for part in (0, 1)], many)
                seen |= {(size, n) for n in rest}
            seen |= {(1, 2 * n + part) for n in order for part in (0, 1)}
            for level, node in seen:
                levels[head, row, node * level : min((node + 1) * level, video)] = level
    return levels


def spelled_out(plan, q, k, v, text=0, sink=0):
    """(1, slots, h, d): one softmax over tokens and means, each with the logarithm of what it stands for."""
    layout = plan.layout
    levels = levels_of(plan, q, k, sink)
    video, block = layout.video_blocks, layout.block
    out = torch.zeros_like(q)
    words = slice(video * block, video * block + text)
    for head in range(q.shape[2]):
        means = {}
        for tile, level in itertools.product(range(video), LEVELS):
            end = tile * block + int(layout.q_len[tile])
            parts = [slice(start, min(start + level, end)) for start in range(tile * block, end, level)]
            sizes = torch.tensor([part.stop - part.start for part in parts])
            means[tile, level] = (*(torch.stack([x[0, part, head].mean(0) for part in parts]) for x in (k, v)), sizes)
        for row in range(video):
            mine = [means[tile, int(level)] for tile, level in enumerate(levels[head, row]) if level]
            mine.append((k[0, words, head], v[0, words, head], torch.ones(text)))
            keys, values, sizes = (torch.cat(each) for each in zip(*mine, strict=True))
            own = slice(row * block, row * block + int(layout.q_len[row]))
            out[0, own, head] = (q[0, own, head] @ keys.T / 4 + sizes.log()).softmax(-1) @ values
    return out


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(3, 6), st.integers(4, 8), st.integers(5, 9)),
    st.sampled_from([0, 5, 20]),
    st.booleans(),
    st.sampled_from([16, 16, 32, 64]),
    st.floats(0.3, 0.9),
    st.integers(0, 1),
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(0, 1000),
)
def test_attention_is_one_softmax_over_tokens_and_means(
    grid, text, text_first, block, density, sink, batch, heads, seed
):
    layout = TokenLayout.of(grid, text, block, text_first=text_first)
    pattern = Pyramid(block=block, sink_frames=sink)
    try:
        plan = pattern.plan(layout, density, SITE)
    except PatternError:
        with pytest.raises(PatternError, match="or more, for fewer sink_frames, or for smaller blocks"):
            pattern.plan(layout, density, SITE)
        return
    q, k, v = tensors(plan.layout, batch, heads, seed)
    out, _ = attend(plan, q, k, v)
    video = plan.layout.filled & (torch.arange(plan.layout.slots) < plan.layout.video_blocks * block)
    for sample in range(batch):
        one = (x[sample : sample + 1] for x in (q, k, v))
        expected = spelled_out(plan, *one, text, sink)[0, video]
        torch.testing.assert_close(out[sample, video], expected, atol=5e-6, rtol=1e-5)
    model = [plan.layout.to_model(x).transpose(1, 2) for x in (q, k, v)]
    dense = torch.nn.functional.scaled_dot_product_attention(*model).transpose(1, 2)
    words = slice(0, text) if text_first else slice(layout.grid.tokens, None)
    torch.testing.assert_close(plan.layout.to_model(out)[:, words], dense[:, words], atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("grid", [(4, 8, 8), (2, 16, 12), (4, 7, 9)])
def test_equal_keys_in_every_group_make_it_dense(grid):
    """A mean with log-count stands for its keys exactly where these are equal, and everything is covered."""
    plan = Pyramid((0.25, 0.25, 0.25, 0.25), block=16).plan(TokenLayout.of(grid, 4, 16), None, SITE)
    assert plan.delivered < 0.7
    q, k, v = tensors(plan.layout)
    whole = plan.layout.video_blocks * 16
    for x in (k, v):
        for start in range(0, min(whole, plan.layout.slots), 8):
            x[:, start : start + 8] = torch.where(
                plan.layout.filled[start : start + 8, None, None], x[:, start : start + 1], torch.nan
            )
    levels = levels_of(plan, q, k)
    out, _ = attend(plan, q, k, v)
    model = [plan.layout.to_model(x).transpose(1, 2) for x in (q, k, v)]
    dense = torch.nn.functional.scaled_dot_product_attention(*model).transpose(1, 2)
    covered = (levels > 0).all(0).all(-1)
    assert covered.any()
    queries = covered.repeat_interleave(16)[: plan.layout.slots][plan.layout.slot_of[: plan.layout.grid.tokens]]
    assert (levels > 1).any()
    got = plan.layout.to_model(out)[:, : len(queries)][:, queries]
    torch.testing.assert_close(got, dense[:, : len(queries)][:, queries], atol=2e-6, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.floats(0.02, 1.0))
def test_counts_make_a_tree_that_costs_what_was_asked(tiles, density):
    counts = Counts.of(tiles, fractions_for(density), (1, 1, 1))
    eight, four, two = counts.open
    assert 1 <= eight <= -(-tiles // 8)
    assert 1 <= four <= 2 * eight
    assert 1 <= two <= 2 * four
    assert 0 <= counts.coarse <= -(-tiles // 8) - eight
    assert min(counts.kept) >= 0
    assume(density * tiles >= 8)
    assert abs(sum(counts.kept) - density * tiles) <= max(1.5, 0.02 * tiles + 7 * (tiles % 8 > 0) * (density > 0.9))


@pytest.mark.parametrize("density", [0.05, 0.15, 0.25, 0.34, 0.5, 0.9, 1.0])
def test_fractions_make_their_density(density):
    fractions = fractions_for(density)
    assert sum(share / level for share, level in zip(fractions, LEVELS, strict=True)) == pytest.approx(density)
    assert sum(fractions) <= 1 + 1e-9
    assert density < 0.35 or sum(fractions) == pytest.approx(1)


@pytest.mark.parametrize(
    ("grid", "density"), [((21, 45, 80), 0.25), ((21, 30, 52), 0.15), ((33, 45, 80), 0.1)], ids=str
)
def test_density_and_coverage_at_real_sizes(grid, density):
    plan = Pyramid().plan(TokenLayout.of(grid), density, SITE)
    assert plan.delivered == pytest.approx(density, rel=0.05)
    assert plan.visited <= 1.25 * plan.delivered
    covered = sum(many * level for many, level in zip(plan.select.counts.kept, LEVELS, strict=True))
    assert covered / plan.layout.video_blocks > 2.5 * density


def test_density_is_that_of_the_calls():
    plan = Pyramid(block=16).plan(TokenLayout.of((5, 7, 9), block=16), 0.4, SITE)
    found = [plan.select(*tensors(plan.layout, heads=1, seed=seed)).mask.density for seed in range(20)]
    assert sum(found) / 20 == pytest.approx(plan.delivered, rel=0.08)


def test_padded_text_falls_away():
    layout = TokenLayout.of((3, 8, 8), 20, 16)
    plan = Pyramid(block=16).plan(layout, 0.5, SITE)
    q, k, v = tensors(plan.layout, 2)
    for valid in (torch.tensor([7, 20]), torch.tensor([3, 16])):
        out, _ = attend(plan.with_valid_text(valid), q, k, v)
        for sample in range(2):
            one = [x[sample : sample + 1].clone() for x in (q, k, v)]
            alone, _ = attend(plan.with_valid_text(valid[sample : sample + 1]), *one)
            torch.testing.assert_close(out[sample][plan.layout.filled], alone[0][plan.layout.filled])
            padded = plan.layout.slot_of[192 + int(valid[sample]) :]
            for x in one[1:]:
                x[:, padded] += 1
            again, _ = attend(plan.with_valid_text(valid[sample : sample + 1]), *one)
            assert torch.equal(again[0, : 192 + 16], alone[0, : 192 + 16])


def test_wrong_parameters_name_right_ones():
    layout = TokenLayout.of((4, 8, 8), block=16)
    with pytest.raises(PatternError, match="or levels such as"):
        Pyramid(block=16).plan(layout, None, SITE)
    with pytest.raises(PatternError, match=r"ask for 0\.\d+ or more"):
        Pyramid(block=16, sink_frames=2).plan(layout, 0.2, SITE)
    with pytest.raises(PatternError, match="at most 1 together"):
        Pyramid((0.5, 0.5, 0.5, 0.5))
    with pytest.raises(PatternError, match=r"such as 0\.1/0\.15/0\.15/0\.35"):
        Pyramid((0.5, 0.5))
    with pytest.raises(PatternError, match="the number of steps that a choice serves"):
        Pyramid(reselect=0)
