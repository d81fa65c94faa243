"""Merging within a clip: exact where keys are equal, the right links cut, any grid, text beside it."""

from __future__ import annotations

import pytest
import torch

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
