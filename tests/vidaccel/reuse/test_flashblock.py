"""Reuse of the past's part: exactness, the estimate of its error, and calibration."""

from __future__ import annotations

import math

import pytest
import torch

from vidaccel.errors import UsageError
from vidaccel.kernels.attention import attention
from vidaccel.kernels.merge import merge
from vidaccel.reuse import FlashBlock
from vidaccel.reuse.flashblock import Calibration, predicted_error


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("boundary", [1, 37, 64, 199])
def test_a_boundary_at_any_token_is_exact(boundary: int) -> None:
    q, k, v = (random(2, length, 3, 16, seed=n) for n, length in enumerate((50, 200, 200)))
    whole, whole_lse = attention(q, k, v)
    past = attention(q, k[:, :boundary], v[:, :boundary])
    own = attention(q, k[:, boundary:], v[:, boundary:])
    out, lse = merge(*past, *own)
    torch.testing.assert_close(out, whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(lse, whole_lse, atol=1e-6, rtol=0)
    assert lse.dtype == torch.float32


@pytest.mark.parametrize("drift", [0.05, 0.1, 0.2])
def test_the_predicted_error_bounds_the_real_one(drift: float) -> None:
    """Isotropic random keys, the hardest case: every query looks elsewhere as soon as it moves."""
    q, k, v = (random(1, length, 4, 32, seed=n) for n, length in enumerate((96, 400, 400)))
    moved = q + drift * random(*q.shape, seed=9)
    past, own = slice(0, 300), slice(300, 400)
    old = attention(q, k[:, past], v[:, past])
    new = attention(moved, k[:, past], v[:, past])
    mine = attention(moved, k[:, own], v[:, own])
    exact, reused = merge(*new, *mine)[0], merge(*old, *mine)[0]
    real = (exact - reused).norm(dim=(1, 3)) / exact.norm(dim=(1, 3))
    predicted = predicted_error(*new, *old, mine[1])
    assert (predicted > 0.6 * real).all()
    assert (predicted < 3 * real + 0.01).all()
    rows = torch.arange(0, 96, 12)
    few = predicted_error(new[0][:, rows], new[1][:, :, rows], old[0][:, rows], old[1][:, :, rows], mine[1][:, :, rows])
    torch.testing.assert_close(few, predicted, atol=0.06, rtol=0)


def test_nothing_moved_nothing_predicted_and_little_mass_little_error() -> None:
    q, k, v = (random(1, length, 2, 16, seed=n) for n, length in enumerate((20, 60, 60)))
    out, lse = attention(q, k, v)
    other = random(*out.shape, seed=5)
    assert predicted_error(out, lse, out, lse, lse).max() < 1e-3
    assert predicted_error(out, lse, other, lse, lse + 20).max() < 1e-6
    nothing = torch.full_like(lse, -torch.inf)
    assert predicted_error(0 * out, nothing, 0 * out, nothing, lse).max() == 0
    assert predicted_error(out, lse, other, lse, lse - 20).min() > 0.5


def test_calibration_averages_and_refreshes_failing_heads_at_once() -> None:
    calibration = Calibration()
    out, lse = random(1, 30, 3, 8, seed=0), torch.zeros(1, 3, 30)
    far, late = out.clone(), lse.clone()
    far[:, :, 1] *= -1
    late[:, 2] += 0.2
    reuse = calibration.see(0, 0, out, lse, far, late)
    assert reuse.tolist() == [[True, False, False]]
    for _ in range(9):
        calibration.see(0, 0, out, lse, out, lse)
    # One bad chunk in ten moves the averages to cos 0.8 and drift 0.02.
    assert calibration.table() == (((False, True, False),),)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="probe"):
        FlashBlock(probe=0)
    assert math.isclose(FlashBlock().threshold, 0.05)
