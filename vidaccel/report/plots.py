"""Line plots as inline SVG: small, without scripts, and readable in a page that is sent by mail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from markupsafe import Markup

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 170, 56, 12, 26, 22


def lines(title: str, series: Mapping[str, Sequence[float | None]], per: str = "frame") -> Markup:
    """One line for each series; None and what is no finite number leave a gap.

    Args:
        title: what is shown, with its unit.
        series: values by name; all begin at `per` 0.
        per: what the horizontal axis counts.

    Returns:
        SVG, or nothing where there is no value.
    """
    values = [x for each in series.values() for x in each if x is not None and isfinite(x)]
    if not values:
        return Markup("")
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    count = max(len(each) for each in series.values())

    def place(n: int, value: float) -> str:
        x = _LEFT + (n + 0.5) / count * (_WIDTH - _LEFT - _RIGHT)
        y = _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{x:.1f},{y:.1f}"

    parts = [
        Markup(
            '<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}" data-count="{}" data-per="{}">'
        ).format(_WIDTH, _HEIGHT, title, count, per),
        Markup('<text x="{}" y="15">{}</text>').format(_LEFT, title),
    ]
    for value, y in ((high, _TOP + 4), (low, _HEIGHT - _BOTTOM)):
        parts.append(Markup('<text x="{}" y="{}" class="axis">{}</text>').format(_LEFT - 6, y, f"{value:.4g}"))
    for n, anchor in ((0, "start"), (count - 1, "end")):
        x = _LEFT if anchor == "start" else _WIDTH - _RIGHT
        parts.append(Markup('<text x="{}" y="{}" text-anchor="{}">{} {}</text>').format(x, _HEIGHT - 6, anchor, per, n))
    for number, (name, each) in enumerate(series.items()):
        for run in _runs(each):
            points = " ".join(place(n, value) for n, value in run)
            if len(run) == 1:
                across, down = points.split(",")
                parts.append(Markup('<circle class="c{}" cx="{}" cy="{}" r="2"/>').format(number % 6, across, down))
            else:
                parts.append(Markup('<polyline class="c{}" points="{}"/>').format(number % 6, points))
        x = _WIDTH - _RIGHT - 130 * (len(series) - 1 - number)
        parts.append(Markup('<text x="{}" y="15" class="c{} name">{}</text>').format(x, number % 6, name))
    return Markup("").join([*parts, Markup("</svg>")])


def steps(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Markup]:
    """Plots over the denoising steps of runs: time, sparse layers, and what a cache's gate saw.

    Args:
        runs: the `calls` of reports, by name.
    """
    return [
        lines(title, {name: _by_step(calls, key) for name, calls in runs.items() if calls}, "step")
        for title, key in (
            ("time of the transformer, ms", "ms"),
            ("share of layers that ran sparse", "sparse"),
            ("error that the cache's gate saw", "gate_error"),
        )
    ]


def _by_step(calls: Sequence[Mapping[str, Any]], key: str) -> list[float | None]:
    """A value of each step: times add up over its calls, of anything else the first that is there counts."""
    found: list[float | None] = [None] * (1 + max(call["step"] for call in calls))
    for call in calls:
        step, layers = call["step"], call["sparse_layers"] + call["dense_layers"]
        value = (call["sparse_layers"] / layers if layers else None) if key == "sparse" else call.get(key)
        if key == "ms" and value is not None:
            found[step] = (found[step] or 0.0) + value
        elif found[step] is None:
            found[step] = value
    return found


def _runs(values: Sequence[float | None]) -> list[list[tuple[int, float]]]:
    """Stretches without gaps."""
    found: list[list[tuple[int, float]]] = [[]]
    for n, value in enumerate(values):
        if value is not None and isfinite(value):
            found[-1].append((n, value))
        elif found[-1]:
            found.append([])
    return [run for run in found if run]
