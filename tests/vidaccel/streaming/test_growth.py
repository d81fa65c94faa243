"""Chunk-aware growth against the published schedules (as sparsities, 1 - density)."""

from __future__ import annotations

import pytest

from vidaccel.errors import PatternError
from vidaccel.streaming.growth import Growth

# Sparsity, its base, frames, chunk, window, beta, sparsities of the first chunks, of the last.
TABLE = [
    (0.88, 0.98, 21, 3, None, 0.3748, [0, 0.8270, 0.8551, 0.8718, 0.8832, 0.8917, 0.8982], 0.8982),
    (0.85, 0.95, 21, 3, 12, 0.36084, [0, 0.8027, 0.8297, 0.8458, 0.8568, 0.8649, 0.8713], 0.8713),
    (0.85, 0.95, 63, 3, 12, 0.52793, [0, 0.7345, 0.7740, 0.7976, 0.8137, 0.8256, 0.8348], 0.8835),
    (0.85, 0.95, 120, 3, 12, 0.67812, [0, 0.6732, 0.7240, 0.7542], 0.8881),
    (0.85, 0.95, 128, 8, 32, None, [0, 0.754954], 0.881041),
]


@pytest.mark.parametrize(("sparsity", "base", "frames", "chunk", "window", "beta", "first", "last"), TABLE)
def test_published_schedules(
    sparsity: float,
    base: float,
    frames: int,
    chunk: int,
    window: int | None,
    beta: float | None,
    first: list[float],
    last: float,
) -> None:
    growth = Growth(1 - sparsity, 1 - base, chunk, frames, window)
    assert [1 - growth.at(number) for number in range(len(first))] == pytest.approx(first, abs=6e-5)
    assert 1 - growth.at(frames // chunk - 1) == pytest.approx(last, abs=6e-5)
    if beta is not None:
        assert growth.beta == pytest.approx(beta, abs=6e-5)
    seen = [min((n + 1) * chunk, window or 10**9) for n in range(1, frames // chunk)]
    mean = sum(growth.at(n) * kv for n, kv in enumerate(seen, 1)) / sum(seen)
    assert mean == pytest.approx(1 - sparsity)


def test_past_the_end_the_last_value_stays() -> None:
    growth = Growth(0.12, 0.02, frames=21)
    assert growth.at(7) == growth.at(100_000) == growth.at(6)


def test_kept_blocks_of_the_short_preset() -> None:
    growth = Growth(0.12, 0.02, frames=21)
    blocks = [24 * 3 * (number + 1) for number in range(7)]
    kept = [int(growth.at(number) * count) for number, count in enumerate(blocks)]
    assert kept == [72, 24, 31, 36, 42, 46, 51]


def test_impossible_densities_are_refused() -> None:
    with pytest.raises(PatternError, match="no larger"):
        Growth(0.1, 0.2)
