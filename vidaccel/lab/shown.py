"""Does a video show what its prompt says? For prompts of the sample world, read off the frames by its checker."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from .._samples import checker, world

_THING = (
    "an? (?:(?P<size>{}) )?(?:(?P<texture>{}) )?(?P<colour>{}) (?P<shape>{}) moves (?P<direction>{})(?: (?P<speed>{}))?"
).format(
    *map(
        "|".join,
        (
            world.SIZES,
            world.TEXTURES,
            world.COLOURS,
            world.SHAPES,
            sorted(world.DIRECTIONS, key=len)[::-1],
            world.SPEEDS,
        ),
    )
)
_THINGS = re.compile(_THING)
_REST = re.compile(
    "(?:, (?:(?P<pattern>{}) )?(?P<tone>{}) background)?(?:, camera pans (?P<camera>{}))?".format(
        *map("|".join, (world.PATTERNS, world.TONES, world.CAMERAS))
    )
)


def scene_of(prompt: str) -> world.Scene | None:
    """The scene that a prompt describes; None where it is not one of the sample world's captions."""
    things = []
    at = 0
    while (found := _THINGS.match(prompt, at)) is not None:
        things.append(world.Thing(**{key: value for key, value in found.groupdict().items() if value}))
        at = found.end()
        if not prompt.startswith(" and ", at):
            break
        at += len(" and ")
    rest = _REST.fullmatch(prompt, at)
    if not things or rest is None:
        return None
    return world.Scene(tuple(things), **{key: value for key, value in rest.groupdict().items() if value})


def shows(prompt: str, frames: npt.NDArray[np.uint8]) -> bool | None:
    """Whether colour, shape and direction are those of the prompt.

    Args:
        prompt: what was asked for.
        frames: (f, h, w, 3) bytes.

    Returns:
        None where that cannot be told: another world, another size, or too few frames to see a direction.
    """
    scene = scene_of(prompt)
    if scene is None or frames.shape[1:3] != (world.SIZE, world.SIZE) or len(frames) < 5:
        return None
    return checker.check(frames / np.float32(255), scene).right
