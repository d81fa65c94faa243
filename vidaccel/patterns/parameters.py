"""Checks that patterns share. Every message says what was asked and what would be right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import PatternError
from ..grid import VideoGrid

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
    if density is None and value is None:
        raise PatternError(f"{pattern} has no density of its own; give one, such as density=0.25, or {instead}")
    check_density(density)


def check_density(density: float | None) -> None:
    """Raise PatternError unless a density lies in (0, 1]."""
    if density is not None and not 0 < density <= 1:
        raise PatternError(f"density {density} was asked for; it is the fraction of pairs to keep, in (0, 1]")


def check_sink(pattern: str, frames: int, grid: VideoGrid) -> None:
    """Raise PatternError unless the grid has the frames that every query is to see."""
    if not 0 <= frames <= grid.t:
        raise PatternError(
            f"{pattern} sink_frames={frames} was asked for, but a {grid} grid has {grid.t} frames; give 0 to {grid.t}"
        )
