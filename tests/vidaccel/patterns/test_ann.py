"""Sign hashing: codes, order, choice of blocks, and what it finds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidaccel.errors import PatternError
from vidaccel.grid import Site, TokenLayout
from vidaccel.patterns import Ann
from vidaccel.wrapping import attend

SITE = Site("blocks.0.attn1.processor", 0, "self", "wan")


def random(layout: TokenLayout, seed: int, heads: int = 2, width: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return layout.to_kernel(torch.randn(1, layout.tokens, heads, width, generator=generator))


def gray(place: int) -> int:
    return place ^ (place >> 1)


def test_codes_are_sides_in_gray_order():
    layout = TokenLayout.of((3, 4, 7), 5, 16)
    select = Ann(bits=5, block=16).plan(layout, 0.6, SITE).select
    x = random(layout, 0)
    found = select.planes.codes(x[:, :84])
    video = x[0, :84].double()
    for head in range(2):
        sides = (video[:, head] - video[:, head].mean(0)) @ select.planes.planes[:16].double() > 0
        expected = [sum(int(side) << bit for bit, side in enumerate(row)) for row in sides.tolist()]
        assert [gray(place) for place in found[head].tolist()] == expected


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(2, 4), st.integers(3, 6), st.integers(4, 8)),
    st.integers(1, 8),
    st.integers(0, 1),
    st.sampled_from([0, 5]),
    st.integers(0, 1000),
)
def test_rows_are_the_blocks_with_most_in_common(grid, bits, sink, text, seed):
    layout = TokenLayout.of(grid, text, 16)
    tokens, frame = layout.grid.tokens, layout.grid.frame
    plan = Ann(bits, sink, block=16).plan(layout, 0.7, SITE)
    q, k, v = (random(layout, seed + n) for n in range(3))
    chosen = plan.select(q, k, v)
    kinds = chosen.mask.block_map()
    video = layout.video_blocks
    assert (kinds[:, :video, video:] == 2).all()
    assert (kinds[:, video:] == 2).all()
    q_codes, k_codes = (plan.select.planes.codes(x[:, :tokens]).T for x in (q, k))
    for head in range(2):
        order = chosen.order[0, :, head]
        assert order.sort().values.tolist() == list(range(layout.slots))
        assert order[tokens:].tolist() == list(range(tokens, layout.slots))
        places = q_codes[order[:tokens], head]
        assert (places.diff() >= 0).all()
        fixed = sink * frame
        assert torch.equal(chosen.k[0, :fixed, head], k[0, :fixed, head])
        sorted_keys = [*range(fixed), *sorted(range(fixed, tokens), key=lambda n: int(k_codes[n, head]))]
        assert torch.equal(chosen.k[0, :tokens, head], k[0, sorted_keys, head])
        assert torch.equal(chosen.v[0, :tokens, head], v[0, sorted_keys, head])
        key_places = k_codes[sorted_keys, head].tolist()
        forced = -(-fixed // 16)
        for row in range(video):
            queries = [gray(p) for p in places[row * 16 : (row + 1) * 16].tolist()]
            score = [
                sum(16.0 ** -(a ^ gray(b)).bit_count() for a in queries for b in key_places[n * 16 : (n + 1) * 16])
                for n in range(video)
            ]
            mine = kinds[head, row, :video].nonzero()[:, 0].tolist()
            assert len(mine) == int(kinds[0, 0, :video].ne(0).sum()) > 0
            assert mine[:forced] == list(range(forced))
            worst = min((score[n] for n in mine if n >= forced), default=float("inf"))
            assert all(score[n] <= worst * (1 + 1e-5) for n in range(video) if n not in mine)


def test_moved_tokens_come_back():
    layout = TokenLayout.of((3, 6, 8), 5, 16)
    plan = Ann(bits=4, block=16).plan(layout, 1.0, SITE)
    q, k, v = (random(layout, n, width=32) for n in range(3))
    out = layout.to_model(attend(plan, q, k, v)[0])
    model = [layout.to_model(x).transpose(1, 2) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*model).transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


def test_it_finds_planted_neighbours():
    """Every query has its own few keys: those hold nearly all of its attention, wherever they stand."""
    layout = TokenLayout.of((4, 16, 16), block=16)
    generator = torch.Generator().manual_seed(0)
    topic = torch.randn(16, 32, generator=generator)
    about = torch.randint(16, (layout.tokens,), generator=generator)
    q, k = (4 * (topic[about] + 0.2 * torch.randn(layout.tokens, 32, generator=generator)) for _ in range(2))
    q, k = q[None, :, None], k[None, :, None]
    exact = (q[0, :, 0] @ k[0, :, 0].T / 32**0.5).softmax(-1)

    def recall(plan) -> float:
        chosen = plan.select(q, k, torch.arange(layout.tokens).float()[None, :, None, None].expand(k.shape))
        keep = torch.zeros(layout.tokens, layout.tokens, dtype=torch.bool)
        keep[chosen.order[0, :, 0][:, None], chosen.v[0, :, 0, 0].long()] = chosen.mask.to_slots()[0]
        return float((exact * keep).sum(1).mean())

    assert recall(Ann(sink_frames=0, block=16).plan(layout, 0.2, SITE)) > 0.9
    assert recall(Ann(sink_frames=0, block=16).plan(layout, 0.2, SITE)) > recall(
        Ann(1, sink_frames=0, block=16).plan(layout, 0.2, SITE)
    )


@pytest.mark.parametrize("grid", [(21, 45, 80), (21, 30, 52)], ids=str)
def test_at_real_sizes(grid):
    plan = Ann().plan(TokenLayout.of(grid), 0.25, SITE)
    assert plan.delivered == pytest.approx(0.25, rel=0.01)
    assert plan.visited <= 1.01 * plan.delivered


def test_wrong_parameters_name_right_ones():
    layout = TokenLayout.of((4, 8, 8), block=16)
    with pytest.raises(PatternError, match="give 1 to 8"):
        Ann(bits=0)
    with pytest.raises(PatternError, match="fewer sink_frames"):
        Ann(sink_frames=2, block=16).plan(layout, 0.2, SITE)
