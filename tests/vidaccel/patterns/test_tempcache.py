"""Merging within a clip: the definition in plain loops, exact where keys are equal, any grid, text beside it."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vidaccel.errors import PatternError
from vidaccel.grid import Site, TokenLayout
from vidaccel.kernels.attention import attention
from vidaccel.patterns.tempcache import TempCache
from vidaccel.wrapping import attend

SITE = Site("", 0, "self", "wan")


def tensors(layout: TokenLayout, moving: int = 0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v (1, tokens, 2, 16); keys are equal in all frames but for the first `moving` places of each."""
    generator = torch.Generator().manual_seed(seed)
    grid = layout.grid
    q, v = (torch.randn(1, layout.tokens, 2, 16, generator=generator) for _ in range(2))
    k = torch.randn(1, grid.frame, 2, 16, generator=generator).repeat(1, grid.t, 1, 1)
    k.view(1, grid.t, grid.frame, 2, 16)[:, :, :moving] = torch.randn(1, grid.t, moving, 2, 16, generator=generator)
    text = torch.randn(1, layout.text, 2, 16, generator=generator)
    return q, torch.cat([k, text], 1), v


def merged(k: torch.Tensor, v: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values and sizes of the groups of one head, for k and v (frames, places, d)."""
    frames, places, _ = k.shape
    alike = torch.nn.functional.cosine_similarity(k[1:], k[:-1], dim=-1).tolist()
    links = sorted(itertools.product(range(frames - 1), range(places)), key=lambda at: -alike[at[0]][at[1]])
    joined = links[: frames * places - groups]
    if joined and len(joined) < len(links):
        (t, p), (u, r) = links[len(joined) - 1], links[len(joined)]
        assume(alike[t][p] - alike[u][r] > 1e-5)  # rounding decides nothing
    means, sizes = [], []
    for place in range(places):
        runs = [[0]]
        for frame in range(1, frames):
            if (frame - 1, place) in joined:
                runs[-1].append(frame)
            else:
                runs.append([frame])
        means += [(k[run, place].mean(0), v[run, place].mean(0)) for run in runs]
        sizes += [len(run) for run in runs]
    assert len(sizes) == groups
    keys, values = (torch.stack(each) for each in zip(*means, strict=True))
    return keys, values, torch.tensor(sizes, dtype=k.dtype)


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 7)),
    st.sampled_from([0, 5, 20]),
    st.booleans(),
    st.sampled_from([16, 32, 64]),
    st.floats(0.0, 1.0),
    st.integers(1, 2),
    st.integers(1, 3),
    st.data(),
)
def test_attention_is_that_of_the_groups(
    grid: tuple[int, int, int],
    text: int,
    text_first: bool,
    block: int,
    apart: float,
    batch: int,
    heads: int,
    data: st.DataObject,
) -> None:
    layout = TokenLayout.of(grid, text, block, text_first=text_first)
    tokens, places = layout.grid.tokens, layout.grid.frame
    density = (places + apart * (tokens - places)) / tokens
    groups = round(density * tokens)
    plan = TempCache(block=block).plan(layout, density, SITE)
    assert plan.delivered == pytest.approx(groups / tokens)
    valid = [text] * batch
    if text:
        valid = [data.draw(st.integers(1, text)) for _ in range(batch)]
        plan = plan.with_valid_text(torch.tensor(valid))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    q, k, v = (torch.randn(batch, layout.tokens, heads, 16, generator=generator) for _ in range(3))
    moved = [plan.layout.to_kernel(x).clone() for x in (q, k, v)]
    for x in moved:
        x[:, ~plan.layout.filled] = torch.nan
    out = plan.layout.to_model(attend(plan, *moved)[0])
    start = text if text_first else 0
    video, words = slice(start, start + tokens), slice(0, text) if text_first else slice(tokens, None)
    for sample, head in itertools.product(range(batch), range(heads)):
        queries, keys, values = (x[sample, :, head].double() for x in (q, k, v))
        told = [x[words][: valid[sample]] for x in (keys, values)]
        own = [x[video].view(grid[0], places, 16) for x in (keys, values)]
        key, value, size = merged(*own, groups)
        logits = torch.cat([queries[video] @ key.T / 4 + size.log(), queries[video] @ told[0].T / 4], 1)
        expected = logits.softmax(1) @ torch.cat([value, told[1]])
        torch.testing.assert_close(out[sample, video, head].double(), expected, atol=1e-5, rtol=1e-5)
        logits = queries[words] @ torch.cat([keys[video], told[0]]).T / 4
        expected = logits.softmax(1) @ torch.cat([values[video], told[1]])
        torch.testing.assert_close(out[sample, words, head].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("grid", "text"), [((5, 4, 6), 0), ((4, 5, 7), 0), ((4, 5, 7), 9)])
def test_equal_keys_merge_exactly(grid: tuple[int, int, int], text: int) -> None:
    layout = TokenLayout.of(grid, text, block=16)
    places = layout.grid.frame
    moving = places // 4
    density = (moving * grid[0] + places - moving) / layout.grid.tokens
    plan = TempCache(block=16).plan(layout, density, SITE)
    assert plan.delivered == pytest.approx(density, abs=1 / layout.grid.tokens)
    q, k, v = tensors(layout, moving)
    expected, _ = attention(q, k, v)
    moved = [plan.layout.to_kernel(x) for x in (q, k, v)]
    out = plan.layout.to_model(attend(plan, *moved)[0])
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=0)


def test_the_most_similar_keys_are_merged_and_merging_beats_dropping() -> None:
    layout = TokenLayout.of((6, 4, 8), block=16)
    q, k, v = tensors(layout, moving=8)
    k = k + 0.05 * torch.randn(k.shape, generator=torch.Generator().manual_seed(5))
    expected, _ = attention(q, k, v)

    def error(out: torch.Tensor) -> float:
        return float((out - expected).norm() / expected.norm())

    errors = [
        error(attend(TempCache(block=16).plan(layout, density, SITE), q, k, v)[0]) for density in (1.0, 0.5, 0.375)
    ]
    assert errors[0] < 1e-5
    assert errors[0] < errors[1] <= errors[2] < 0.1
    kept = attention(q, k[:, -72:], v[:, -72:])[0]
    assert errors[2] < 0.3 * error(kept)


def test_a_choice_serves_later_steps() -> None:
    layout = TokenLayout.of((4, 4, 4), block=16)
    plan = TempCache(block=16).plan(layout, 0.5, SITE)
    q, k, v = tensors(layout, moving=5)
    first, held = attend(plan, q, k, v)
    assert torch.equal(attend(plan, q, k, v, held)[0], first)
    assert not torch.equal(attend(plan, q, k, 2 * v, held)[0], first)


def test_samples_merge_for_themselves() -> None:
    layout = TokenLayout.of((4, 4, 4), block=16)
    plan = TempCache(block=16).plan(layout, 0.5, SITE)
    first, second = tensors(layout, 5, seed=1), tensors(layout, 9, seed=2)
    both = [torch.cat(pair) for pair in zip(first, second, strict=True)]
    alone = torch.cat([attend(plan, *first)[0], attend(plan, *second)[0]])
    torch.testing.assert_close(attend(plan, *both)[0], alone, atol=1e-6, rtol=0)


def test_fewer_groups_than_places_cannot_be() -> None:
    with pytest.raises(PatternError, match=r"0\.250 or more"):
        TempCache(block=16).plan(TokenLayout.of((4, 4, 4), block=16), 0.2, SITE)
