"""Block top-k against brute force, and dynamic plans as such."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidaccel.choices import kept_share
from vidaccel.errors import PatternError
from vidaccel.grid import Site, TokenLayout
from vidaccel.kernels.select import block_means, rows_of
from vidaccel.patterns import PerHead, Radial, TopK, Union
from vidaccel.ranks import HeadPart
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


def folded(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1).flatten(1, 2)[None]


@st.composite
def layouts(draw: st.DrawFn) -> TokenLayout:
    grid = draw(st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(2, 9)))
    return TokenLayout.of(grid, draw(st.sampled_from([0, 5, 20])), 16, text_first=draw(st.booleans()))


@settings(max_examples=30, deadline=None)
@given(layouts(), st.sampled_from([None, (1, 4, 4), (2, 3, 2)]))
def test_block_means_look_at_tokens_only(layout, tile):
    layout = layout.tiled(tile)
    q, *_ = tensors(layout)
    means = block_means(q, layout)
    for block in range(layout.video_blocks):
        tokens = q[0, block * 16 : block * 16 + int(layout.q_len[block])]
        torch.testing.assert_close(means[:, block], tokens.mean(0))


@settings(max_examples=40, deadline=None)
@given(layouts(), st.floats(0.05, 1.0), st.integers(0, 2), st.sampled_from([1, 2]), st.integers(0, 1000))
def test_rows_are_the_best_blocks(layout, density, sink, batch, seed):
    sink = min(sink, layout.grid.t)
    pattern = TopK(block=16, sink_frames=sink)
    try:
        plan = pattern.plan(layout, density, SITE)
    except PatternError:
        with pytest.raises(PatternError, match="what every choice keeps"):
            pattern.plan(layout, density, SITE)
        return
    assert plan.mask is None
    tiled = plan.layout
    q, k, v = (folded(x) for x in tensors(tiled, batch, seed=seed))
    chosen = plan.select(q, k, v)
    assert chosen.k is k
    assert chosen.v is v
    kinds = chosen.mask.block_map()
    video = tiled.video_blocks
    assert kinds.shape[0] == 2 * batch
    assert (kinds[:, video:] == 2).all()
    assert (kinds[:, :, video:] == 2).all()
    position = torch.nn.functional.pad(
        tiled.positions[: video * 16, 0], (0, max(0, video * 16 - tiled.slots)), value=-1
    )
    first = [block for block in range(video) if any(0 <= t < sink for t in position[block * 16 :][:16].tolist())]
    kept = round(density * video)
    for head, row in itertools.product(range(2 * batch), range(video)):
        mine = {row, *first}
        queries = q[0, row * 16 :, head][: tiled.q_len[row]].mean(0)
        means = torch.stack([k[0, n * 16 :, head][: tiled.q_len[n]].mean(0) for n in range(video)])
        ranked = (means @ queries).argsort(descending=True).tolist()
        mine |= set([n for n in ranked if n not in mine][: kept - len(mine)])
        assert set(kinds[head, row, :video].nonzero()[:, 0].tolist()) == mine
    assert chosen.mask.visited == pytest.approx(plan.visited)


@settings(max_examples=30, deadline=None)
@given(layouts(), st.floats(0.3, 1.0), st.sampled_from([1, 2]), st.integers(0, 1000))
def test_adaptive_rows_share_one_threshold(layout, density, batch, seed):
    plan = TopK(adaptive=True, block=16, sink_frames=0).plan(layout, max(density, 1 / layout.video_blocks), SITE)
    plan = plan.of_heads(HeadPart.whole(2))
    tiled = plan.layout
    q, k, v = (folded(x) for x in tensors(tiled, batch, seed=seed))
    mask = plan.select(q, k, v).mask
    kinds, video = mask.block_map() == 2, tiled.video_blocks
    assert kinds[:, video:].all()
    assert kinds[:, :, video:].all()
    kept = kinds[:, :video, :video]
    assert kept.diagonal(dim1=1, dim2=2).all()
    assert kept.unflatten(0, (batch, 2)).flatten(1).sum(1).tolist() == [plan.select.kept * video * 2] * batch
    assert len(mask.idx) == int(mask.ptr[-1]) == int(kinds.sum())
    likely = (block_means(q, tiled) @ block_means(k, tiled).transpose(1, 2) / 4).softmax(-1)
    own = torch.eye(video, dtype=torch.bool)
    least = torch.where(kept & ~own, likely, 1).unflatten(0, (batch, 2)).flatten(1).amin(1)
    most = torch.where(kept, 0, likely).unflatten(0, (batch, 2)).flatten(1).amax(1)
    assert (least >= most - 1e-6).all()
    assert TopK(block=16, sink_frames=0).plan(layout, plan.requested, SITE).visited == plan.visited


@settings(max_examples=40, deadline=None)
@given(layouts(), st.floats(0.3, 1.0), st.floats(0.05, 0.95), st.sampled_from([1, 2]), st.integers(0, 1000))
def test_rows_end_at_their_mass(layout, density, mass, batch, seed):
    plan = TopK(top_p=mass, block=16, sink_frames=0).plan(layout, max(density, 1 / layout.video_blocks), SITE)
    tiled, most = plan.layout, plan.select.kept
    assert plan.varies
    q, k, v = (folded(x) for x in tensors(tiled, batch, seed=seed))
    mask = plan.select(q, k, v).mask
    assert mask.idx.shape[0] >= int(mask.ptr[-1])
    kinds, video = mask.block_map() == 2, tiled.video_blocks
    assert kinds[:, video:].all()
    assert kinds[:, :, video:].all()
    likely = (block_means(q, tiled) @ block_means(k, tiled).transpose(1, 2) / 4).softmax(-1)
    for head, row in itertools.product(range(2 * batch), range(video)):
        p = likely[head, row]
        ranked = [row, *(n for n in p.argsort(descending=True).tolist() if n != row)]
        needed, held = [], 0.0
        for block in ranked[:most]:
            if needed and held >= mass:
                break
            needed.append(block)
            held += float(p[block])
        assert set(kinds[head, row, :video].nonzero()[:, 0].tolist()) == set(needed)


def test_top_p_is_counted_as_it_was():
    plan = TopK(top_p=0.6, block=16).plan(TokenLayout.of((5, 7, 9), 5, 16), 0.7, SITE)
    for seed in range(4):
        choice = plan.select.choose(*tensors(plan.layout, seed=seed))
        assert float(kept_share(choice.mask)) == pytest.approx(choice.mask.density, rel=1e-5)
        assert choice.mask.density < plan.delivered


@pytest.mark.parametrize("text", [0, 5])
@pytest.mark.parametrize("parts", [None, (0, 0, 1)])
def test_a_sample_chooses_as_it_does_alone(parts, text):
    adaptive = TopK(adaptive=True, block=16)
    pattern = adaptive if parts is None else PerHead((adaptive, Radial(block=16)), parts)
    plan = pattern.plan(TokenLayout.of((4, 7, 9), text, 16), 0.4, SITE).of_heads(HeadPart.whole(3))
    q, k, v = tensors(plan.layout, batch=3, heads=3)
    q = q * torch.tensor([0.5, 4.0, 20.0])[:, None, None, None]  # one's attention is spread, another's is not
    together, _ = attend(plan, q, k, v)
    for n in range(3):
        alone, _ = attend(plan, q[n : n + 1], k[n : n + 1], v[n : n + 1])
        torch.testing.assert_close(together[n, plan.layout.filled], alone[0, plan.layout.filled])


def test_adaptive_rows_differ_in_length():
    plan = TopK(adaptive=True, block=16).plan(TokenLayout.of((4, 7, 9), block=16), 0.4, SITE)
    lengths = plan.select(*(3 * x for x in tensors(plan.layout))).mask.ptr.diff()
    assert lengths.unique().numel() > 2
    assert lengths.min() >= 1


def test_rows_are_well_formed():
    layout = TokenLayout.of((2, 4, 8), 20, 16)
    mask = rows_of(torch.tensor([[[0, 2], [1, 3], [0, 1], [2, 3]]]), layout)
    assert mask.ptr.tolist() == [0, 4, 8, 12, 16, 22, 28]
    assert mask.idx.tolist()[:8] == [0, 2, 4, 5, 1, 3, 4, 5]
    assert mask.n_full.tolist() == [4, 4, 4, 4, 6, 6]
    assert mask.ptr.dtype == mask.idx.dtype == mask.n_full.dtype == torch.int32


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("text", [0, 5])
def test_attention_over_what_was_chosen(batch, text):
    layout = TokenLayout.of((4, 7, 9), text, 16)
    plan = TopK(block=16).plan(layout, 0.4, SITE)
    q, k, v = tensors(plan.layout, batch)
    out = plan.layout.to_model(attend(plan, q, k, v)[0])
    mask = plan.select(*(folded(x) for x in (q, k, v))).mask.to_dense().unflatten(0, (batch, -1))
    assert not torch.equal(mask[:, 0], mask[:, 1])
    model = [plan.layout.to_model(x).transpose(1, 2) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*model, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("grid", "density"), [((21, 45, 80), 0.25), ((21, 30, 52), 0.15), ((33, 45, 80), 0.25)], ids=str
)
def test_density_at_real_sizes(grid, density):
    plan = TopK().plan(TokenLayout.of(grid), density, SITE)
    assert plan.delivered == pytest.approx(density, rel=0.02)
    assert plan.visited <= 1.25 * plan.delivered


def test_expected_density_is_that_of_the_calls():
    plan = TopK(block=16).plan(TokenLayout.of((5, 7, 9), block=16), 0.4, SITE)
    found = [plan.select(*tensors(plan.layout, heads=1, seed=seed)).mask.density for seed in range(20)]
    assert sum(found) / 20 == pytest.approx(plan.delivered, rel=0.02)


def test_wrong_parameters_name_right_ones():
    layout = TokenLayout.of((4, 8, 8), block=16)
    with pytest.raises(PatternError, match="no density of its own"):
        TopK(block=16).plan(layout, None, SITE)
    with pytest.raises(PatternError, match=r"ask for 0\.\d+ or more, or for fewer sink_frames"):
        TopK(block=16, sink_frames=2).plan(layout, 0.2, SITE)
    with pytest.raises(PatternError, match="has 4 frames"):
        TopK(block=16, sink_frames=5).plan(layout, 0.2, SITE)
    with pytest.raises(PatternError, match="first frames, other parts"):
        Union((TopK(block=16, sink_frames=0),), sink_frames=2).plan(layout, 0.2, SITE)
    with pytest.raises(PatternError, match=r"a share of attention in \(0, 1\), such as 0\.9"):
        TopK(top_p=1.0)
    with pytest.raises(PatternError, match="drop one"):
        TopK(top_p=0.9, adaptive=True)
    with pytest.raises(PatternError, match="the number of steps that a choice serves"):
        TopK(reselect=0)
    several = TokenLayout.of((4, 8, 8), 20, 16).with_valid_text(torch.tensor([3, 9]))
    with pytest.raises(PatternError, match="plan it for the whole text"):
        TopK(block=16).plan(several, 0.5, SITE)
