"""Hybrid memory's linear state: the running mean is the explicit sum, and moves with the stream."""

from __future__ import annotations

import torch

from vidaccel.pipelines.rotary import rotate_pairs
from vidaccel.reuse.linear_state import CAP, LinearState
from vidaccel.streaming import VideoRope

ROPE, GRID, HEADS, D = VideoRope((12, 6, 6)), (2, 3), 2, 24


def frame(number: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotated keys, plain keys, values of one frame, (1, 6, 2, 24)."""
    generator = torch.Generator().manual_seed(100 * seed + number)
    raw, v = (torch.randn(1, 6, HEADS, D, generator=generator, dtype=torch.float64) for _ in range(2))
    return rotate_pairs(raw, *ROPE.rotary(number, 1, *GRID)), raw, v


def state(seed: int = 1) -> LinearState:
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(D, D, generator=generator).double(), torch.randn(D, generator=generator).double()
    return LinearState(weight, bias, ROPE)


def test_unrotated_is_what_was_rotated() -> None:
    rotated, raw, _ = frame(7)
    torch.testing.assert_close(VideoRope.unrotated(rotated, ROPE.rotary(7, 1, *GRID)), raw, atol=1e-6, rtol=0)


def test_the_running_mean_is_the_explicit_sum() -> None:
    found, frames = state(), [frame(number) for number in range(5)]
    for each in frames:
        found.absorb(*each)
    keys, plain, values = (torch.cat(parts, 1) for parts in zip(*frames, strict=True))
    query, raw, _ = frame(9, seed=3)
    for head in range(HEADS):
        k, v = keys[0, :, head], values[0, :, head]
        sums = sum(torch.outer(a, b) for a, b in zip(k, v, strict=True)) / 30
        z = plain[0, :, head].relu().mean(0)
        rows = []
        for q, r in zip(query[0, :, head], raw[0, :, head], strict=True):
            rows.append(found.weight @ ((q @ sums) / (r.relu() @ z + 1e-6)) + found.bias)
        expected = torch.stack(rows)
        torch.testing.assert_close(found.attend(query, raw)[0, :, head], expected, atol=1e-10, rtol=1e-10)
    assert found.tokens == 30
    assert found.h.shape == (HEADS, D, D), "the state grows"


def test_beyond_the_cap_what_was_absorbed_keeps_its_distance() -> None:
    """The stream goes on by 3 frames; the state as if its frames stood 3 later, not before the cap."""
    moved, later = state(), state()
    for number in range(3):
        moved.absorb(*frame(number))
        _, raw, v = frame(number)
        later.absorb(rotate_pairs(raw, *ROPE.rotary(number + 3, 1, *GRID)), raw, v)
    before = moved.h.clone()
    moved.advance(CAP)
    assert torch.equal(moved.h, before)
    moved.advance(CAP + 3)
    torch.testing.assert_close(moved.h, later.h, atol=1e-6, rtol=0)


def test_going_back() -> None:
    found = state()
    found.absorb(*frame(0))
    moment, before = found.snapshot(), found.h.clone()
    found.absorb(*frame(1))
    found.restore(moment)
    assert torch.equal(found.h, before)
    assert found.tokens == 6
