"""Forecasts against polynomials, closed forms and fp64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidaccel.caching import forecast
from vidaccel.caching.forecast import Ladder, absolute_error, combine

gaps = st.lists(st.integers(1, 5), min_size=4, max_size=6)


def polynomial(x: float, coefficients: list[float]) -> torch.Tensor:
    scale = torch.linspace(0.5, 2, 6, dtype=torch.float64).view(1, 3, 2)
    return sum((c * x**n * scale**n for n, c in enumerate(coefficients)), torch.zeros_like(scale))


@given(gaps, st.integers(0, 3), st.lists(st.floats(-1, 1), min_size=4, max_size=4), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_newton_is_exact_on_irregular_anchors(
    gaps: list[int], order: int, coefficients: list[float], ahead: int
) -> None:
    ladder, x = Ladder(order), 0.0
    for gap in gaps:
        x += gap
        ladder.update(x, polynomial(x, coefficients[: order + 1]))
    expected = polynomial(x + ahead, coefficients[: order + 1])
    torch.testing.assert_close(ladder.forecast(x + ahead), expected, atol=1e-8, rtol=1e-8)
    assert len(ladder.terms) == len(ladder.anchors) == order + 1


@pytest.mark.parametrize("form", ["newton", "taylor"])
def test_falling_sigmas_are_coordinates_too(form: forecast.Form) -> None:
    ladder = Ladder(1, form)
    for sigma in (1.0, 0.93, 0.8):
        ladder.update(sigma, polynomial(sigma, [0.3, -2.0]))
    torch.testing.assert_close(ladder.forecast(0.61), polynomial(0.61, [0.3, -2.0]))


def test_taylor_misses_a_quadratic_and_newton_does_not() -> None:
    """y = 1 - x/10 + x^2/100 on anchors 5 apart: the recursion of the papers is 0.05 to 0.2 off, see the module."""
    errors = {}
    for form in ("newton", "taylor"):
        ladder = Ladder(2, form)
        for x in (0.0, 5.0, 10.0, 15.0):
            ladder.update(x, torch.full((1, 1), 1 - x / 10 + x * x / 100, dtype=torch.float64))
        errors[form] = [
            abs(float(ladder.forecast(15.0 + s)) - (1 - (15 + s) / 10 + (15 + s) ** 2 / 100)) for s in range(1, 5)
        ]
    assert max(errors["newton"]) < 1e-9
    # d_2 is a constant 2/100 here, but d_1 is the slope half a gap ago: off by 0.05 a step.
    assert errors["taylor"] == pytest.approx([0.05, 0.1, 0.15, 0.2])


@pytest.mark.parametrize(
    ("anchors", "order", "taylor", "newton"),
    [
        ([0, 5, 10, 15, 20], 3, 0.0786, 0.0425),
        ([0, 5, 10, 15, 20], 2, 0.0622, 0.0870),
        ([0, 1, 2, 3, 4, 5, 10, 11, 16], 3, 0.216, 0.0208),
    ],
)
def test_a_decaying_exponential(anchors: list[int], order: int, taylor: float, newton: float) -> None:
    """exp(-t/12), four steps ahead, relative error. Newton is not better everywhere: order 2 on even anchors."""
    found = {}
    for form in ("newton", "taylor"):
        ladder = Ladder(order, form)
        for x in anchors:
            ladder.update(x, torch.full((1, 1), math.exp(-x / 12), dtype=torch.float64))
        truth = math.exp(-(anchors[-1] + 4) / 12)
        found[form] = abs(float(ladder.forecast(anchors[-1] + 4)) - truth) / truth
    assert found == pytest.approx({"taylor": taylor, "newton": newton}, rel=5e-3)


def test_short_history_lowers_the_order() -> None:
    ladder = Ladder(3)
    assert not ladder.ready
    ladder.update(0, torch.ones(1, 2))
    assert torch.equal(ladder.forecast(7), torch.ones(1, 2))
    ladder.update(1, torch.full((1, 2), 3.0))
    assert torch.equal(ladder.forecast(2), torch.full((1, 2), 5.0))
    assert ladder.nbytes == 2 * 2 * 4


@pytest.mark.parametrize("form", ["newton", "taylor"])
@pytest.mark.parametrize("anchors", [(0.0, 4.0), (1.0, 0.6)], ids=["steps", "sigmas"])
def test_beyond_its_reach_a_forecast_stays(form: forecast.Form, anchors: tuple[float, float]) -> None:
    ladder = Ladder(1, form, reach=0.5)
    before, last = anchors
    ladder.update(before, torch.tensor([[1.0]]))
    assert ladder.forecast(last).item() == 1
    ladder.update(last, torch.tensor([[3.0]]))
    gap = last - before
    found = [ladder.forecast(last + share * gap).item() for share in (0.25, 0.5, 0.75, 3)]
    assert found == pytest.approx([3.5, 4, 4, 4])
    wrong, _ = ladder.error(last + 3 * gap, torch.tensor([[5.0]]))
    assert wrong.item() == pytest.approx(1), "the gate sees the very forecast that is trusted"


def test_reuse_is_a_copy() -> None:
    ladder, feature = Ladder(0), torch.randn(2, 5)
    before = feature.clone()
    ladder.update(0, feature)
    feature.zero_()
    ladder.forecast(1).add_(1)
    assert torch.equal(ladder.forecast(2), before)


def test_a_repeated_coordinate_or_another_shape_starts_anew() -> None:
    ladder = Ladder(2)
    for x in (0, 1, 2):
        ladder.update(x, torch.full((1, 2), float(x)))
    ladder.update(2, torch.full((1, 2), 9.0))
    assert ladder.anchors == [2]
    assert torch.equal(ladder.forecast(5), torch.full((1, 2), 9.0))
    ladder.update(3, torch.ones(1, 3))
    assert [term.shape for term in ladder.terms] == [(1, 3)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("form", ["newton", "taylor"])
def test_storage_is_narrow_and_arithmetic_wide(dtype: torch.dtype, form: forecast.Form) -> None:
    """Against the same ladder in fp64: what remains is the rounding of stored terms and of the result."""
    torch.manual_seed(0)
    narrow, exact = Ladder(2, form), Ladder(2, form)
    for x in (0, 1, 3, 4):
        y = torch.randn(2, 40).to(dtype)
        narrow.update(x, y)
        exact.update(x, y.double())
    assert all(term.dtype == dtype for term in narrow.terms)
    assert narrow.forecast(6).dtype == dtype
    bound = sum(
        abs(w) * t.abs() * torch.finfo(dtype).eps for w, t in zip(exact.weights(6), exact.terms, strict=True)
    ) * (2 if form == "newton" else 3)
    error = (narrow.forecast(6).double() - exact.forecast(6)).abs()
    assert (error <= bound + torch.finfo(dtype).eps * exact.forecast(6).abs()).all()


def test_named_storage() -> None:
    ladder = Ladder(1, storage=torch.bfloat16)
    ladder.update(0, torch.randn(1, 8))
    assert ladder.nbytes == 16
    assert ladder.forecast(1).dtype == torch.float32


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    values = [torch.randn(2, 7, 3) for _ in range(4)]

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        ladder = Ladder(2)
        for x, y in enumerate(values[:3]):
            ladder.update(x, y)
        return ladder.forecast(3.5), ladder.error(3.5, values[3])

    whole = run()
    monkeypatch.setattr(forecast, "_CHUNK", 5)
    parts = run()
    assert torch.equal(whole[0], parts[0])
    torch.testing.assert_close(whole[1], parts[1], rtol=1e-6, atol=0)


def test_error_sums_are_per_sample_and_add_up_over_shards() -> None:
    torch.manual_seed(0)
    guess, actual = torch.randn(3, 10, 4), torch.randn(3, 10, 4)
    sums = absolute_error([guess], [1.0], actual)
    torch.testing.assert_close(sums[0], (guess - actual).abs().sum((1, 2)).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(sums[1], actual.abs().sum((1, 2)).double(), rtol=1e-6, atol=0)
    shards = sum(absolute_error([guess[:, s]], [1.0], actual[:, s]) for s in (slice(0, 5), slice(5, 10)))
    torch.testing.assert_close(sums, shards, rtol=1e-6, atol=0)
    against = absolute_error([guess], [1.0], actual, guess)
    torch.testing.assert_close(against[1], guess.abs().sum((1, 2)).double(), rtol=1e-6, atol=0)


def test_combine_leaves_its_terms_alone() -> None:
    terms = [torch.ones(2, 3), torch.ones(2, 3)]
    assert torch.equal(combine(terms, [1.0, 2.0], torch.bfloat16), torch.full((2, 3), 3.0, dtype=torch.bfloat16))
    assert torch.equal(terms[0], torch.ones(2, 3))
