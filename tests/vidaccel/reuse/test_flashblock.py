"""Reuse of the past's part: exactness, the measure of its error, and calibration."""

from __future__ import annotations

import json
import math

import pytest
import torch

from vidaccel.errors import UsageError
from vidaccel.kernels.attention import attention
from vidaccel.kernels.merge import merge
from vidaccel.reuse import FlashBlock
from vidaccel.reuse.flashblock import Calibration, late_error


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
    half = attention(*(x.bfloat16() for x in (q, k[:, :boundary], v[:, :boundary])))[1]
    assert half.dtype == lse.dtype == torch.float32
    # Of rounded inputs, and not rounded itself: most of it needs more digits than bf16 has.
    assert (half != half.bfloat16()).float().mean() > 0.9


def test_a_calibration_may_come_from_json() -> None:
    table = (((True, False), (False, True)),)
    read = FlashBlock(calibrated=json.loads(json.dumps(table)))
    assert read == FlashBlock(calibrated=table)
    assert hash(read) == hash(FlashBlock(calibrated=table))


@pytest.mark.parametrize("drift", [0.05, 0.1, 0.2])
def test_a_few_rows_tell_the_error_of_all(drift: float) -> None:
    """Isotropic random keys, the hardest case: every query looks elsewhere as soon as it moves."""
    q, k, v = (random(1, length, 4, 32, seed=n) for n, length in enumerate((96, 400, 400)))
    moved = q + drift * random(*q.shape, seed=9)
    moved[:, :, 3] = q[:, :, 3]
    past, own = slice(0, 300), slice(300, 400)
    old = attention(q, k[:, past], v[:, past])
    mine = attention(moved, k[:, own], v[:, own])
    exact, reused = attention(moved, k, v)[0], merge(*old, *mine)[0]
    real = late_error(exact, reused)
    assert ((real[0, :3] > drift / 2) & (real[0, :3] < 2.5 * drift)).all()
    assert real[0, 3] < 1e-5, "a head whose queries stay is exact"
    torch.testing.assert_close(late_error(exact[:, ::8], reused[:, ::8]), real, atol=1e-5, rtol=0.25)


def test_little_of_the_past_is_a_little_error_and_no_past_none() -> None:
    q, k, v = (random(1, length, 2, 16, seed=n) for n, length in enumerate((20, 60, 60)))
    out, lse = attention(q, k, v)
    other, nothing = random(*out.shape, seed=5), torch.full_like(lse, -torch.inf)

    def error(past: torch.Tensor, past_lse: torch.Tensor, own_lse: torch.Tensor) -> float:
        own = (out, own_lse)
        return float(late_error(merge(out, past_lse, *own)[0], merge(past, past_lse, *own)[0]).max())

    assert error(other, lse, lse + 20) < 1e-6
    assert error(other, lse, lse - 20) > 0.5
    assert error(0 * out, nothing, lse) == 0


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
