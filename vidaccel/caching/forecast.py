"""Forecasting a feature of the next steps from its values at the steps that were computed.

Idea: along a denoising trajectory features move smoothly, so that a polynomial through the last few computed ones tells
    the next.
Math, with anchors x_0 (newest) .. x_m and a stored term for each order:
    Newton  c_j = f[x_0 .. x_j] (divided differences)     y(x) = sum_j c_j prod_{i<j} (x - x_i)
    Taylor  d_0 = y, d_{j+1} = (d_j - d_j') / (x_0 - x_1)  y(x) = sum_j d_j (x - x_0)^j / j!
    where ' is the term at the previous anchor. Order 0 is reuse.
    With a reach r, x goes no farther from x_0 than r |x_0 - x_1|: beyond, the forecast stays what it is there. A line
    through two anchors with noise of variance v forecasts with (1 + 2 s + 2 s^2) v, s = (x - x_0) / (x_0 - x_1), so
    that a long run after a short gap is mostly noise: 2.5 v at s = 0.5, 41 v at s = 4.
Cost: order + 1 stored tensors; an update and a forecast each read them once, on CUDA in one kernel a forecast.
Source: the Taylor form is TaylorSeer's (arXiv 2503.06923), also used by CG-Taylor (arXiv 2508.02240). It is exact for
    straight lines only, since d_2 is the second derivative half a gap ago and each gap alone is its divisor. Newton's
    form has the same cost and is exact for every polynomial of its degree on any anchors.
Limits: terms are stored in `storage` (the feature's own type by default), and all arithmetic is fp32 or wider.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from ..kernels import forecast as fused

Form = Literal["newton", "taylor"]

# Elements handled at a time: bounds the fp32 temporaries at 64 MiB, where a 14B model's features at 720p have 1.5 GB.
_CHUNK = 1 << 24


def combine(terms: Sequence[torch.Tensor], weights: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """The weighted sum of equally shaped contiguous tensors, in `dtype`, added up in fp32 or wider."""
    if dtype != torch.float64 and fused.can_run(terms):
        return fused.weighted_sum(terms, weights, dtype)
    out = torch.empty_like(terms[0], dtype=dtype)
    target, flat = out.view(-1), [term.view(-1) for term in terms]
    for part in _parts(target.numel()):
        target[part] = _weighted([term[part] for term in flat], weights)
    return out


def absolute_error(
    terms: Sequence[torch.Tensor], weights: Sequence[float], actual: torch.Tensor, reference: torch.Tensor | None = None
) -> torch.Tensor:
    """How far a weighted sum is from the truth, without keeping the sum.

    Args:
        terms: (b, ...) each.
        weights: one a term.
        actual: (b, ...), the truth.
        reference: (b, ...), what the error is measured against; None is the truth.

    Returns:
        (2, b) fp64: for each sample, sum |weighted sum - actual| and sum |reference|. Sums rather than a ratio, so that
        they can be added over samples or over the shards of a parallel group before they are divided.
    """
    if fused.can_run(terms, actual, *([] if reference is None else [reference])):
        return fused.error_sums(terms, weights, actual, reference)
    sums = torch.zeros(2, actual.shape[0], dtype=torch.float64, device=actual.device)
    against = actual if reference is None else reference
    for sample in range(actual.shape[0]):
        flat = [x[sample].reshape(-1) for x in (*terms, actual, against)]
        for part in _parts(flat[0].numel()):
            *pieces, truth, base = (x[part] for x in flat)
            sums[0, sample] += _weighted(pieces, weights).sub_(truth).abs_().sum()
            sums[1, sample] += base.to(_wide(base)).abs().sum()
    return sums


class Ladder:
    """Remembers a feature at the last anchors and forecasts it.

    Args:
        order: highest order; 0 reuses the last value. A short history gives a lower order.
        form: "newton" or "taylor".
        storage: type of the stored terms; None keeps the feature's.
        reach: how far a forecast goes on, in gaps between the last two anchors; None is without end.

    Attributes:
        anchors: where the feature is known, newest first.
        terms: one tensor an order, of the feature's shape.
    """

    def __init__(
        self, order: int, form: Form = "newton", storage: torch.dtype | None = None, reach: float | None = None
    ) -> None:
        self.order = order
        self.form = form
        self.reach = reach
        self.anchors: list[float] = []
        self.terms: list[torch.Tensor] = []
        self._storage = storage
        self._dtype = torch.float32

    @property
    def ready(self) -> bool:
        """There is something to forecast from."""
        return bool(self.terms)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(term.nbytes for term in self.terms)

    def estimate(self, elements: int, itemsize: int) -> int:
        """Bytes held once the history is as long as the order wants it, for features of so many elements."""
        return (self.order + 1) * elements * (self._storage.itemsize if self._storage else itemsize)

    def clear(self) -> None:
        """Forget everything."""
        self.anchors, self.terms = [], []

    def fits(self, y: torch.Tensor) -> bool:
        """The history is of this shape and on this device."""
        return self.ready and self.terms[0].shape == y.shape and self.terms[0].device == y.device

    @torch.no_grad()
    def update(self, x: float, y: torch.Tensor) -> None:
        """Take a computed value in: y at coordinate x.

        A value of another shape or device, or at a coordinate that is an anchor already (schedulers of second order
        repeat timesteps), starts the history anew.
        """
        if x in self.anchors or not self.fits(y):
            self.clear()
        self._dtype = y.dtype
        if len(self.terms) <= self.order:
            self.terms.append(torch.empty(y.shape, dtype=self._storage or y.dtype, device=y.device))
        gaps = [x - anchor for anchor in self.anchors]
        if self.form == "taylor":
            gaps = gaps[:1] * len(gaps)
        source, flat = y.reshape(-1), [term.view(-1) for term in self.terms]
        for part in _parts(source.numel()):
            carry = source[part].to(_wide(y))
            for order, term in enumerate(flat):
                # Terms live in half the bytes, but the chain of differences is never rounded on its way up.
                change = (carry - term[part]).div_(gaps[order]) if order + 1 < len(flat) else carry
                term[part] = carry
                carry = change
        self.anchors = [x, *self.anchors][: self.order + 1]

    def weights(self, x: float) -> list[float]:
        """What each term counts at coordinate x."""
        if self.reach is not None and len(self.anchors) > 1:
            ahead, farthest = x - self.anchors[0], self.reach * abs(self.anchors[0] - self.anchors[1])
            x = self.anchors[0] + math.copysign(min(abs(ahead), farthest), ahead)
        if self.form == "taylor":
            return [(x - self.anchors[0]) ** order / math.factorial(order) for order in range(len(self.terms))]
        return [math.prod(x - anchor for anchor in self.anchors[:order]) for order in range(len(self.terms))]

    @torch.no_grad()
    def forecast(self, x: float) -> torch.Tensor:
        """The feature at coordinate x, in its own type: a fresh tensor."""
        return combine(self.terms, self.weights(x), self._dtype)

    @torch.no_grad()
    def error(self, x: float, y: torch.Tensor) -> torch.Tensor:
        """(2, b): sum |forecast - y| and sum |y| of each sample; see `absolute_error`."""
        return absolute_error(self.terms, self.weights(x), y)


def _weighted(pieces: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    total = pieces[0].to(_wide(pieces[0]), copy=True).mul_(weights[0])
    for piece, weight in zip(pieces[1:], weights[1:], strict=True):
        total.add_(piece, alpha=weight)
    return total


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _parts(size: int) -> Iterator[slice]:
    for start in range(0, size, _CHUNK):
        yield slice(start, start + _CHUNK)
