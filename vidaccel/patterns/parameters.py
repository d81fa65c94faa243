"""Checks that patterns share. Every message says what was asked and what would be right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import PatternError
from ..grid import VideoGrid
from .plan import Pattern

AXES = ("time", "height", "width")


def sides(values: Sequence[int]) -> str:
    """(13, 28, 50) -> "13x28x50"."""
    return "x".join(map(str, values))


def check_sides(pattern: str, name: str, value: Any, least: int, axes: Sequence[str] = AXES) -> None:
    """Raise PatternError unless `value` is None or a tuple of whole numbers from `least` on, one an axis."""
    if value is None:
        return
    whole = isinstance(value, tuple) and all(isinstance(number, int) and number >= least for number in value)
    if not whole or len(value) != len(axes):
        raise PatternError(
            f"{pattern} {name} {value!r} was asked for; it is a tuple of {len(axes)} whole numbers from {least} on, "
            f"along {', '.join(axes)}"
        )


def check_tile(pattern: str, tile: Any) -> None:
    """Raise PatternError unless `tile` is None, the sides of a box, or those of a rod, which ends in 0."""
    check_sides(pattern, "tile", tile, 0)
    if tile is not None and min(tile[:2]) < 1:
        raise PatternError(
            f"{pattern} tile {tile!r} was asked for; its sides along time and height are 1 or more, and so is the "
            "last, or 0 for rods that go on along the width"
        )


def check_knob(
    pattern: str, name: str, value: Any, density: float | None, instead: str = "a window along time, height and width"
) -> None:
    """Raise PatternError unless exactly one of a knob and a density was given, and the density lies in (0, 1]."""
    if density is not None and value is not None:
        raise PatternError(
            f"density {density} and {name} {value} were both given, and either decides alone; "
            f"drop the {name} to get the density, or the density to keep the {name}"
        )
    if value is None:
        check_needed(pattern, density, f", or {instead}")
    check_density(density)


def check_given(pattern: Pattern, density: float | None) -> None:
    """Raise PatternError where a pattern can do nothing with a density, or without one, on any grid."""
    check_density(density)
    check = getattr(pattern, "check", None)
    if check is not None:
        check(density)


def nested(pattern: Pattern) -> Iterator[Pattern]:
    """A pattern, and all those that it is made of."""
    yield pattern
    parts: Any = getattr(pattern, "patterns", ())
    for part in parts.values() if isinstance(parts, Mapping) else parts:
        yield from nested(part)


def check_model(pattern: Pattern, layers: int, heads: int) -> None:
    """Raise PatternError where a pattern, or a part of it, is made for another number of layers or heads."""
    for part in nested(pattern):
        check = getattr(part, "check_model", None)
        if check is not None:
            check(layers, heads)


def check_heads(pattern: str, named: int, heads: int) -> None:
    """Raise PatternError unless as many heads are named as there are."""
    if named != heads:
        raise PatternError(
            f"{pattern} was asked for with {named} heads, but the model has {heads}; name as many, one after another"
        )


def is_beyond(density: float, nearest: float) -> bool:
    """The nearest that a pattern has is too far from a density that was asked for."""
    return nearest > 2 * density


def check_reached(density: float | None, nearest: float, rule: str, grid: VideoGrid, instead: str = "") -> None:
    """Raise PatternError where the nearest that a pattern has is more than twice the density that was asked for."""
    if density is not None and is_beyond(density, nearest):
        ways = [f"ask for density {nearest:.3g} or more" if nearest < 1 else "run it dense", instead]
        raise PatternError(
            f"density {density:.3g} was asked for, but the nearest there is on a {grid} grid, {rule}, keeps "
            f"{nearest:.3g}; {', or '.join(filter(None, ways))}"
        )


def check_needed(pattern: str, density: float | None, instead: str = "") -> None:
    """Raise PatternError where no density was given."""
    if density is None:
        raise PatternError(
            f"{pattern} has no density of its own; give one, such as density=0.25 (on a command line --density "
            f"0.25){instead}"
        )


def check_density(density: Any) -> None:
    """Raise PatternError unless a density is None or a number in (0, 1]."""
    try:
        is_sound = density is None or 0 < density <= 1
    except TypeError:
        is_sound = False
    if not is_sound:
        raise PatternError(
            f"density {density!r} was asked for; it is the fraction of pairs kept, in (0, 1], 1 is dense"
        )


def check_sink(pattern: str, frames: int, grid: VideoGrid) -> None:
    """Raise PatternError unless the grid has the frames that every query is to see."""
    if not 0 <= frames <= grid.t:
        raise PatternError(
            f"{pattern} sink_frames={frames} was asked for, but a {grid} grid has {grid.t} frames; give 0 to {grid.t}"
        )
