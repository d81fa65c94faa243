"""Fused forecasts against the definition that runs on CPUs, and against float64."""

from __future__ import annotations

import pytest
import torch

from vidaccel.caching import forecast as definition
from vidaccel.kernels import forecast

pytest.importorskip("triton")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WEIGHTS = [1.0, -2.5, 0.125, 3.0, -0.7]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels are compiled here, not interpreted")
    return str(request.param)


def noise(n: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(n)]


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weighted_sum(terms: int, dtype: torch.dtype, device: str) -> None:
    for shape in ((1, 3), (2, 2049)):
        given, weights = noise(terms, shape, dtype), WEIGHTS[:terms]
        found = forecast.weighted_sum([x.to(device) for x in given], weights, dtype).cpu()
        exact = sum(w * x.double() for w, x in zip(weights, given, strict=True))
        assert found.dtype == dtype
        assert found.shape == shape
        # One rounding at the end; the interpreter cuts where a GPU rounds.
        error = (found.double() - exact).abs()
        assert (error <= torch.finfo(dtype).eps * exact.abs() + 1e-6).all()
        torch.testing.assert_close(found, definition.combine(given, weights, dtype))


def test_result_of_another_type(device: str) -> None:
    (x,) = noise(1, (2, 5), torch.bfloat16)
    assert torch.equal(forecast.weighted_sum([x.to(device)], [0.5], torch.float32).cpu(), x.float() / 2)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_sums(reference: bool, dtype: torch.dtype, device: str) -> None:
    for terms, shape in ((1, (2, 5)), (2, (1, 70_000)), (3, (3, 7, 31))):
        *given, actual, against = noise(terms + 2, shape, dtype)
        other = against if reference else None
        weights = WEIGHTS[:terms]
        there = [x.to(device) for x in given]
        found = forecast.error_sums(there, weights, actual.to(device), None if other is None else other.to(device))
        assert found.dtype == torch.float64
        exact = [x.double() for x in (*given, actual, against if reference else actual)]
        forecasted = sum(w * x for w, x in zip(weights, exact, strict=False))
        wrong = torch.stack([(forecasted - exact[-2]).flatten(1).abs().sum(1), exact[-1].flatten(1).abs().sum(1)])
        torch.testing.assert_close(found.cpu(), wrong, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            definition.absolute_error(given, weights, actual, other), wrong, rtol=1e-6, atol=1e-6
        )


def test_truth_of_other_strides(device: str) -> None:
    given, actual = noise(2, (2, 6, 4), torch.float32)
    strided = torch.cat([actual, actual], 1).to(device)[:, ::2]
    found = forecast.error_sums([given.to(device)], [1.0], strided, None)
    expected = definition.absolute_error([given], [1.0], strided.cpu())
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-6)


def test_nan_stays(device: str) -> None:
    given, actual = noise(2, (2, 9), torch.float32)
    given[1, 4] = torch.nan
    found = forecast.error_sums([given.to(device)], [1.0], actual.to(device), None)
    assert found[0].isnan().tolist() == [False, True]
    assert not found[1].isnan().any()


@pytest.mark.gpu
def test_a_ladder_forecasts_the_same_on_both_devices_and_always() -> None:
    values = [x.cumsum(1).to(torch.bfloat16) for x in noise(5, (2, 3000, 64), torch.float32)]
    here, there = (definition.Ladder(3) for _ in range(2))
    for n, value in enumerate(values[:4]):
        here.update(float(n), value)
        there.update(float(n), value.cuda())
    expected, found = here.forecast(4.5), there.forecast(4.5)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.cpu(), expected, rtol=0.01, atol=0.01)
    error = here.error(4.5, values[4])
    repeated = [there.error(4.5, values[4].cuda()) for _ in range(20)]
    assert all(torch.equal(x, repeated[0]) for x in repeated)
    torch.testing.assert_close(repeated[0].cpu(), error, rtol=1e-4, atol=0)


@pytest.mark.gpu
def test_more_than_two_billion_elements() -> None:
    x = torch.full((1, 2**31 + 100), 1.0, dtype=torch.bfloat16, device="cuda")
    x[0, -1] = 3
    found = forecast.weighted_sum([x], [2.0], torch.bfloat16)
    assert found[0, -1] == 6
    assert found[0, -2] == 2
    assert forecast.error_sums([x], [2.0], x, None).flatten().tolist() == pytest.approx(2 * [2**31 + 102])
