"""How far a mean or a share can be trusted: 95 % intervals over pairs of videos.

Pairs of one prompt and seed are the samples. Frames are not: those of one video are alike, and would promise more.

Source: Student 1908 for means (the two values differ by chance in one of 20 repetitions); Wilson 1927 for shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, stdev

_NORMAL = 1.959964
# The 97.5 % point of Student's t for 1, 2, ... degrees of freedom.
_STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Where the mean lies; None for fewer than two values, which say nothing of how they scatter."""
    if len(values) < 2:
        return None
    half = _student(len(values) - 1) * stdev(values) / sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def share_interval(right: int, count: int) -> tuple[float, float] | None:
    """Where a share lies that was seen as `right` of `count`; None for no samples."""
    if count == 0:
        return None
    z2 = _NORMAL**2
    centre = (right + z2 / 2) / (count + z2)
    half = _NORMAL / (count + z2) * sqrt(right * (count - right) / count + z2 / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def _student(freedom: int) -> float:
    """The 97.5 % point of Student's t: from the table, then by its expansion around the normal one (to 0.001)."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    z = _NORMAL
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
