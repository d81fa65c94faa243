"""Windows for a density: one choice on each axis, so that the product of their densities is what was asked for.

Idea: among the windows that come near, the one that covers nearly the same share of every axis.
Math: minimise the spread max_i log e_i - min_i log e_i of the extents e_i = window_i / length_i, plus 20 times the
    distance |log(prod density_i / target)|: coarse windows may miss the density by 5 % rather than stretch e-fold.
Cost: one number for each combination of windows, 75,600 on a 21x45x80 grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

TOLERANCE = 0.05
"""How far, relative to the density asked for, a plan may be from it without a note."""

_EXACTNESS = 20


class Choice(NamedTuple):
    """One window of one axis.

    Attributes:
        size: the window, in the caller's unit.
        extent: the share of the axis that it covers.
        density: kept pairs over all pairs of the axis.
    """

    size: int
    extent: float
    density: float


def most_even(
    axes: Sequence[Sequence[Choice]], target: float, share: float = 0.0
) -> tuple[float, tuple[int, int, int]]:
    """The sizes of the most even combination near a density.

    Args:
        axes: the choices along time, height and width.
        target: wanted product of their densities.
        share: of all pairs, kept in any case; the target is then what this and the windows keep together.

    Returns:
        Its cost, and a size for each axis.
    """
    product = torch.zeros(())
    low, high = torch.full((), math.inf), torch.full((), -math.inf)
    for choices in axes:
        extent = torch.tensor([choice.extent for choice in choices], dtype=torch.float64).log()
        each = torch.tensor([choice.density for choice in choices], dtype=torch.float64).log()
        product = product[..., None] + each
        low, high = torch.minimum(low[..., None], extent), torch.maximum(high[..., None], extent)
    kept = (share + (1 - share) * product.exp()).log() if share else product
    off = (kept - math.log(max(target, 1e-12))).abs()
    cost = high - low + _EXACTNESS * off
    best = int(cost.argmin())
    least = float(cost.flatten()[best])
    found = []
    for choices in reversed(axes):
        best, at = divmod(best, len(choices))
        found.append(choices[at].size)
    width, height, time = found
    return least, (time, height, width)
