"""Rollouts: published steps, chunks, and what cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vidaccel.errors import UsageError
from vidaccel.streaming import ROLLOUTS, FewStep, Rollout


def test_published_timesteps() -> None:
    assert ROLLOUTS["self-forcing"].timesteps == pytest.approx((1000, 937.5, 833.3333333, 625))
    assert ROLLOUTS["causvid"].timesteps == (1000, 757, 522)
    rolling = Rollout(steps=(1000, 800, 600, 400, 200)).timesteps
    assert rolling == pytest.approx((1000, 952.38, 882.35, 769.23, 555.56), abs=5e-3)


def test_published_windows() -> None:
    for name, shift in (("self-forcing", 5.0), ("longlive", 5.0), ("causvid", 8.0)):
        assert (ROLLOUTS[name].chunk, ROLLOUTS[name].shift) == (3, shift)
    assert ROLLOUTS["longlive"].timesteps == ROLLOUTS["self-forcing"].timesteps
    longlive = ROLLOUTS["longlive"]
    assert (longlive.chunk, longlive.window, longlive.sink) == (3, 12, 3)
    assert ROLLOUTS["self-forcing"].window == 21


def test_chunks_end_with_what_is_left() -> None:
    assert list(Rollout().chunks(21)) == [3] * 7
    assert list(Rollout().chunks(10)) == [3, 3, 3, 1]
    assert list(Rollout(lone_first=True).chunks(8)) == [1, 3, 3, 1]
    endless = Rollout(lone_first=True).chunks(None, first=1)
    assert [next(endless) for _ in range(500)] == [3] * 500


def test_plain_data_and_back() -> None:
    rollout = Rollout(chunk=2, window=9, sink=3, rope="sink-shift", steps=(1000, 500))
    assert Rollout.of(rollout.to_dict()) == rollout
    assert Rollout.of({"steps": [1000, 500]}).steps == (1000, 500)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"chunk": 0}, "chunk 0"),
        ({"window": 5, "sink": 3}, "starts at 6"),
        ({"steps": (500, 1000)}, "fall"),
        ({"steps": ()}, "fall"),
        ({"rope": "learned"}, "absolute, relative, sink-shift"),
        ({"shift": 0}, "above 0"),
        ({"windw": 9}, "'windw'"),
        ("self-forced", "longlive"),
    ],
)
def test_what_cannot_be_is_said(given: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Rollout.of(given)


def test_a_few_steps_by_hand() -> None:
    """Flow predictions of a known clean latent lead to it, whatever noise is added between the steps."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(1, 2, 3, 4, 4, generator=generator)
    noise = torch.randn(2, *clean.shape, generator=generator)
    seen: list[torch.Tensor] = []

    def flow(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return (x - clean) / (t.item() / 1000)

    found = FewStep((1000, 500)).run(noise, flow, lambda index, timestep, x: x)
    torch.testing.assert_close(found, clean, atol=1e-6, rtol=0)
    torch.testing.assert_close(seen[1], 0.5 * clean + 0.5 * noise[1], atol=1e-6, rtol=0)


def test_a_step_that_stops_gives_nothing() -> None:
    noise = torch.zeros(2, 1, 1, 1, 2, 2)
    calls: list[int] = []

    def stop(index: int, timestep: float, x: torch.Tensor) -> None:
        calls.append(index)

    assert FewStep((1000, 500)).run(noise, lambda x, t: x, stop) is None
    assert calls == [0]
