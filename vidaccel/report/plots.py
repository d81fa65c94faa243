"""Plots as inline SVG: small, without scripts, and readable in a page that is sent by mail."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from math import isfinite

from markupsafe import Markup

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 170, 56, 12, 42, 22
_COLOURS = 6  # The page has as many; a seventh line has the colour of the first.


def lines(
    title: str, series: Mapping[str, Sequence[float | None]], per: str = "frame", *, zero: bool = False
) -> Markup:
    """One line for each series; None and what is no finite number leave a gap.

    Args:
        title: what is shown, with its unit.
        series: values by name; all begin at `per` 0. A name without values is not shown, but keeps its colour: plots of
            the same names have the same colours.
        per: what the horizontal axis counts.
        zero: the vertical axis begins at 0, so that heights can be compared.

    Returns:
        SVG, or nothing where there is no value.
    """
    values = [x for each in series.values() for x in each if x is not None and isfinite(x)]
    if not values:
        return Markup("")
    low, high = _range([*values, 0.0] if zero else values)
    count = max(len(each) for each in series.values())

    def place(n: int, value: float) -> str:
        x = _LEFT + (n + 0.5) / count * (_WIDTH - _LEFT - _RIGHT)
        y = _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{x:.1f},{y:.1f}"

    shown = {name: any(x is not None and isfinite(x) for x in each) for name, each in series.items()}
    parts = [_legend(shown), *_scale(low, high)]
    for n, anchor in ((0, "start"), (count - 1, "end")):
        x = _LEFT if anchor == "start" else _WIDTH - _RIGHT
        parts.append(Markup('<text x="{}" y="{}" text-anchor="{}">{} {}</text>').format(x, _HEIGHT - 6, anchor, per, n))
    for number, each in enumerate(series.values()):
        for run in _runs(each):
            points = " ".join(place(n, value) for n, value in run)
            if len(run) == 1:
                across, down = points.split(",")
                parts.append(_dot(number, across, down))
            else:
                parts.append(Markup('<polyline class="c{}" points="{}"/>').format(number % _COLOURS, points))
    return _svg(title, parts, count=count, per=per)


def scatter(
    title: str, points: Mapping[str, tuple[float, float] | None], across: str, up: str, *, start: float | None = None
) -> Markup:
    """Named points; a line joins those that no other point beats on both axes, of which more is better.

    Args:
        title: what is shown.
        points: (x, y) by name; None is not shown, but keeps its colour.
        across: what x is.
        up: what y is.
        start: an x that is shown in any case, with a line, such as that of what the others are compared with.
    """
    found = {name: xy for name, xy in points.items() if xy is not None and all(map(isfinite, xy))}
    if not found:
        return Markup("")
    left, right = _range([x for x, _ in found.values()] + ([] if start is None else [start]))
    low, high = _range([y for _, y in found.values()])
    # Points stand off the frame.
    low, high = low - 0.1 * (high - low), high + 0.1 * (high - low)

    def place(x: float, y: float) -> tuple[float, float]:
        # A tenth of the room on each side, so that names fit.
        share = 0.1 + 0.7 * (x - left) / (right - left)
        return (
            round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1),
            round(_TOP + (high - y) / (high - low) * (_HEIGHT - _TOP - _BOTTOM), 1),
        )

    front = sorted(xy for xy in found.values() if not any(_beats(other, xy) for other in found.values()))
    line = " ".join("{},{}".format(*place(*xy)) for xy in front)
    parts = [*_scale(low, high), Markup('<polyline class="front" points="{}"/>').format(line)]
    for number, name in enumerate(points):
        if name in found:
            x, y = place(*found[name])
            parts.append(_dot(number, x, y, 4))
            label = Markup('<text x="{}" y="{}" class="c{}" text-anchor="{}">{} ({:.3g}, {:.3g})</text>')
            left_half = x < _WIDTH / 2
            side = (x + 7 if left_half else x - 7, y + 4, number % _COLOURS, "start" if left_half else "end")
            parts.append(label.format(*side, name, *found[name]))
    if start is not None:
        x, _ = place(start, low)
        across_from = Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>')
        parts.append(across_from.format(x, x, _TOP, _HEIGHT - _BOTTOM))
    for value in (left, right):
        x, _ = place(value, low)
        parts.append(Markup('<text x="{}" y="{}" text-anchor="middle">{:.3g}</text>').format(x, _HEIGHT - 6, value))
    parts.append(Markup('<text x="{}" y="32">up: {}; across: {}</text>').format(_LEFT, up, across))
    return _svg(title, parts)


def bars(title: str, rows: Mapping[str, Mapping[str, float]]) -> Markup:
    """A bar for each row, as long as its parts together.

    Args:
        title: what is shown, with its unit.
        rows: parts by name, of each row by name; parts of 0 are left out.
    """
    whole = max((sum(parts.values()) for parts in rows.values()), default=0)
    if whole <= 0:
        return Markup("")
    names = list(dict.fromkeys(part for parts in rows.values() for part in parts))
    shown = {part: any(parts.get(part, 0) > 0 for parts in rows.values()) for part in names}
    parts, top, start = [_legend(shown)], _TOP, 120
    for name, row in rows.items():
        parts.append(Markup('<text x="{}" y="{}" class="axis">{}</text>').format(start - 6, top + 14, name))
        x = float(start)
        for part in names:
            value = row.get(part, 0.0)
            width = value / whole * (_WIDTH - start - 70)
            rect = Markup('<rect class="c{}" x="{:.1f}" y="{}" width="{:.1f}" height="18"><title>{}</title></rect>')
            parts.append(rect.format(names.index(part) % _COLOURS, x, top, width, f"{name}, {part}: {value:.4g}"))
            x += width
        parts.append(Markup('<text x="{:.1f}" y="{}">{:.4g}</text>').format(x + 6, top + 14, sum(row.values())))
        top += 26
    return _svg(title, parts, height=top + 6)


def heat(title: str, rows: Sequence[Sequence[float | None]], across: str, down: str) -> Markup:
    """Values in [0, 1] as shades: a line of the picture for each row, dark is 1; None is grey.

    Args:
        title: what is shown, and what grey means.
        rows: one a `down`, values one an `across`.
        across: what columns count.
        down: what rows count.
    """
    count = max(map(len, rows), default=0)
    if not count:
        return Markup("")
    high = max(3.0, min(14.0, 220 / len(rows)))
    width = (_WIDTH - _LEFT - _RIGHT) / count
    top, parts = 26.0, []
    for number, row in enumerate(rows):
        n = 0
        for value, stretch in groupby(row):
            length = len(list(stretch))
            fill = "#8884" if value is None else f"hsl(215 70% {92 - 62 * value:.0f}%)"
            shown = "not run" if value is None else f"{value:.3g}"
            where = f"{down} {number}, {across} {n}" + (f" to {n + length - 1}" if length > 1 else "")
            rect = Markup(
                '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill="{}"><title>{}</title></rect>'
            )
            cell = (_LEFT + n * width, top + number * high, length * width, high - 0.5)
            parts.append(rect.format(*cell, fill, f"{where}: {shown}"))
            n += length
    bottom = top + len(rows) * high
    for n in {0, len(rows) - 1}:
        y = top + (n + 0.5) * high + 4
        parts.append(Markup('<text x="{}" y="{:.1f}" class="axis">{} {}</text>').format(_LEFT - 6, y, down, n))
    for n, anchor in ((0, "start"), (count - 1, "end")):
        x = _LEFT if anchor == "start" else _WIDTH - _RIGHT
        text = Markup('<text x="{}" y="{:.1f}" text-anchor="{}">{} {}</text>')
        parts.append(text.format(x, bottom + 15, anchor, across, n))
    return _svg(title, parts, height=bottom + 22)


def _svg(title: str, parts: Iterable[Markup], *, height: float = _HEIGHT, count: int = 0, per: str = "") -> Markup:
    """The frame of a plot; `data-` tells a script where its values stand."""
    opening = Markup('<svg class="plot" viewBox="0 0 {} {:g}" role="img" aria-label="{}"').format(_WIDTH, height, title)
    if per:
        opening += Markup(' data-per="{}" data-count="{}" data-from="{}" data-width="{}"').format(
            per, count, _LEFT, _WIDTH - _LEFT - _RIGHT
        ) + Markup(' data-top="{}" data-bottom="{}"').format(_TOP, _HEIGHT - _BOTTOM)
    head = Markup('><text x="0" y="14" class="title">{}</text>').format(title)
    return Markup("").join([opening, head, *parts, Markup("</svg>")])


def _legend(names: Mapping[str, bool]) -> Markup:
    """Names, those that are shown, in the colours of what they name; where there is only one, nobody has to ask."""
    if len(names) < 2:
        return Markup("")
    spans = [
        Markup('<tspan class="c{}" dx="10">{}</tspan>').format(n % _COLOURS, name)
        for n, (name, shown) in enumerate(names.items())
        if shown
    ]
    return Markup('<text x="{}" y="32">{}</text>').format(_LEFT - 10, Markup("").join(spans))


def _scale(low: float, high: float) -> list[Markup]:
    """The two ends of the vertical axis, and lines from them."""
    found = []
    for value, y in ((high, _TOP), (low, _HEIGHT - _BOTTOM)):
        found.append(Markup('<text x="{}" y="{}" class="axis">{}</text>').format(_LEFT - 6, y + 4, _short(value)))
        line = Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>')
        found.append(line.format(_LEFT, _WIDTH - _RIGHT, y, y))
    return found


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.3g}"


def _dot(number: int, x: object, y: object, radius: int = 2) -> Markup:
    return Markup('<circle class="c{}" cx="{}" cy="{}" r="{}"/>').format(number % _COLOURS, x, y, radius)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The least and the greatest value, apart even where all are the same."""
    low, high = min(values), max(values)
    return (low - 0.5, high + 0.5) if high - low < 1e-9 * max(1.0, abs(high)) else (low, high)


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] >= other[0] and one[1] >= other[1]


def _runs(values: Sequence[float | None]) -> list[list[tuple[int, float]]]:
    """Stretches without gaps."""
    found: list[list[tuple[int, float]]] = [[]]
    for n, value in enumerate(values):
        if value is not None and isfinite(value):
            found[-1].append((n, value))
        elif found[-1]:
            found.append([])
    return [run for run in found if run]
