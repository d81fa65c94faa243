"""Indicators against what their formulas say, on plain tensors."""

from __future__ import annotations

import pytest
import torch

from vidaccel.caching.gate import relative
from vidaccel.caching.indicator import Change, ForecastError, Indicator, OutputChange


def measured(indicator: Indicator, x: float, value: torch.Tensor) -> float | None:
    sums = indicator.measure(x, value)
    return None if sums is None else relative(sums)


def mean(x: torch.Tensor) -> float:
    return float(x.abs().mean())


@pytest.fixture
def features() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 6, 4) for _ in range(5)]


def test_forecast_error_is_zero_on_a_line_and_relative_to_the_truth(features: list[torch.Tensor]) -> None:
    start, slope, odd, *_ = features
    indicator = ForecastError(1, "newton", None)
    assert measured(indicator, 0, start) is None
    for x in (0, 3):
        indicator.computed(x, start + x * slope, start)
    assert measured(indicator, 5, start + 5 * slope) == pytest.approx(0, abs=1e-6)
    truth = start + 5 * slope + odd
    assert measured(indicator, 5, truth) == pytest.approx(mean(odd) / mean(truth), rel=1e-5)


def test_every_nth_token_is_a_fraction_of_the_memory(features: list[torch.Tensor]) -> None:
    whole, third = ForecastError(1, "newton", None), ForecastError(1, "newton", None, stride=3)
    for x, value in enumerate(features):
        for indicator in (whole, third):
            indicator.computed(x, value, value)
    assert third.nbytes * 3 == whole.nbytes
    assert measured(third, 6, features[0]) is not None


def test_change_since_the_last_computed_step(features: list[torch.Tensor]) -> None:
    indicator = Change("residual", every_step=False)
    assert measured(indicator, 0, features[0]) is None
    indicator.computed(0, features[0], features[0])
    for n in (1, 2):
        expected = mean(features[n] - features[0]) / mean(features[0])
        assert measured(indicator, n, features[n]) == pytest.approx(expected, rel=1e-5)
    assert indicator.nbytes == features[0].nbytes


def test_change_since_the_previous_step(features: list[torch.Tensor]) -> None:
    indicator = Change("modulation", every_step=True)
    assert measured(indicator, 0, features[0]) is None
    for n in (1, 2, 3):
        expected = mean(features[n] - features[n - 1]) / mean(features[n - 1])
        assert measured(indicator, n, features[n]) == pytest.approx(expected, rel=1e-5)


def test_output_change_follows_the_latent(features: list[torch.Tensor]) -> None:
    x, v = features, [3 * f + 1 for f in features]
    indicator = OutputChange()
    for n in (0, 1):
        assert measured(indicator, n, x[n]) is None
        indicator.computed(n, x[n], v[n])
    rate = mean(v[1] - v[0]) / mean(x[1] - x[0])
    assert rate == pytest.approx(3, rel=1e-5)
    for n in (2, 3):
        expected = rate * mean(x[n] - x[n - 1]) / mean(v[1])
        assert measured(indicator, n, x[n]) == pytest.approx(expected, rel=1e-5)


def test_what_is_remembered_is_a_copy(features: list[torch.Tensor]) -> None:
    indicator, value = Change("residual", every_step=False), features[0].clone()
    indicator.computed(0, value, value)
    value.zero_()
    assert measured(indicator, 1, features[0]) == 0
