"""The sample world: what a clip may show, and how a caption says it.

Coloured shapes drift over grey backgrounds on a torus: what leaves the frame on one side comes back on the other, so
"moves right" stays true however long the clip is. Directions are as seen in the frame; a panning camera moves only
the background, the opposite way. Every palette colour is saturated and every background is neutral.

A part of all (colour, shape, direction) triples is held out of training: `is_held_out`. Each colour with each shape,
each colour with each direction and each shape with each direction is still seen, so a model that has learned the
words, not the list, can draw the rest.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection
from dataclasses import dataclass

from .shapes import OUTLINES

SIZE = 256
"""Height and width of the world, in pixels."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.12),
    "orange": (0.98, 0.50, 0.05),
    "yellow": (0.95, 0.88, 0.10),
    "green": (0.10, 0.72, 0.22),
    "cyan": (0.10, 0.80, 0.88),
    "blue": (0.14, 0.28, 0.95),
    "purple": (0.55, 0.15, 0.90),
    "pink": (0.98, 0.20, 0.62),
}
SHAPES = tuple(OUTLINES)
DIRECTIONS: dict[str, tuple[int, int]] = {
    "right": (1, 0),
    "down-right": (1, 1),
    "down": (0, 1),
    "down-left": (-1, 1),
    "left": (-1, 0),
    "up-left": (-1, -1),
    "up": (0, -1),
    "up-right": (1, -1),
}
"""Name to (x, y), y down."""
SIZES = {"small": 34.0, "large": 46.0}
"""Name to radius in pixels: every shape is at least 48 pixels wide."""
SPEEDS = {"slowly": 2.0, "quickly": 5.0}
"""Name to pixels a frame."""
TEXTURES = ("plain", "striped", "spotted")
TONES = {"black": 0.10, "grey": 0.45, "white": 0.86}
PATTERNS = ("plain", "checkered", "cloudy")
CAMERAS: dict[str, tuple[int, int]] = {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PAN_SPEED = 2.5
PARTS = ("size", "texture", "speed", "background", "camera")
"""The parts of a caption that may be left unsaid."""


@dataclass(frozen=True)
class Thing:
    """One moving object."""

    colour: str
    shape: str
    direction: str
    speed: str = "slowly"
    texture: str = "plain"
    size: str = "large"

    def caption(self, omit: Collection[str] = ()) -> str:
        """Say the object in words, as in `a large striped red circle moves up-left quickly`."""
        words = ["a"]
        words += [self.size] if "size" not in omit else []
        words += [self.texture] if "texture" not in omit and self.texture != "plain" else []
        words += [self.colour, self.shape, "moves", self.direction]
        words += [self.speed] if "speed" not in omit else []
        return " ".join(words)


@dataclass(frozen=True)
class Scene:
    """What one clip shows: one or two things (the later in front), a background and a camera."""

    things: tuple[Thing, ...]
    tone: str = "black"
    pattern: str = "plain"
    camera: str = "still"

    def caption(self, omit: Collection[str] = ()) -> str:
        """Say the scene in words; `omit` names parts (of `PARTS`) to leave unsaid."""
        text = " and ".join(thing.caption(omit) for thing in self.things)
        if "background" not in omit:
            pattern = "" if self.pattern == "plain" else f"{self.pattern} "
            text += f", {pattern}{self.tone} background"
        if "camera" not in omit and self.camera != "still":
            text += f", camera pans {self.camera}"
        return text


def is_held_out(thing: Thing) -> bool:
    """Whether training never shows this (colour, shape, direction): 64 of the 384 triples."""
    colour = list(COLOURS).index(thing.colour)
    shape = SHAPES.index(thing.shape)
    direction = list(DIRECTIONS).index(thing.direction)
    return (colour + shape + 2 * direction) % len(SHAPES) == 0


def draw(rng: random.Random, things: int | None = None, held_out: bool = False) -> Scene:
    """Draw a scene at random. Two things move in different directions, so that neither hides the other for long.

    Args:
        rng: Where the randomness comes from.
        things: How many objects; None draws one (60 %) or two.
        held_out: Draw held-out triples only, instead of none of them.
    """
    count = things if things is not None else rng.choices((1, 2), (6, 4))[0]
    colours = rng.sample(list(COLOURS), count)
    drawn: list[Thing] = []
    for colour in colours:
        while True:
            thing = Thing(
                colour=colour,
                shape=rng.choice(SHAPES),
                direction=rng.choice(list(DIRECTIONS)),
                speed=rng.choice(list(SPEEDS)),
                texture=rng.choices(TEXTURES, (5, 3, 3))[0],
                size=rng.choice(list(SIZES)),
            )
            apart = all(thing.direction != other.direction for other in drawn)
            if apart and is_held_out(thing) == held_out:
                break
        drawn.append(thing)
    pattern = rng.choice(PATTERNS)
    panning = pattern != "plain" and rng.random() < 0.4
    camera = rng.choice([name for name in CAMERAS if name != "still"]) if panning else "still"
    return Scene(tuple(drawn), tone=rng.choice(list(TONES)), pattern=pattern, camera=camera)


def unseen(count: int = 64) -> list[Scene]:
    """Return one-object scenes, all different: held-out triples in turn, the rest of each drawn with a fixed seed."""
    rng = random.Random(64)
    triples = [triple for triple in itertools.product(COLOURS, SHAPES, DIRECTIONS) if is_held_out(Thing(*triple))]
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = draw(rng, things=1)
        thing = scene.things[0]
        kept = Thing(*triples[len(scenes) % len(triples)], thing.speed, thing.texture, thing.size)
        found = Scene((kept,), tone=scene.tone, pattern=scene.pattern, camera=scene.camera)
        scenes += [found] if found not in scenes else []
    return scenes


def words() -> list[str]:
    """Return every word that a caption can hold, sorted."""
    held = {"a", "and", "moves", "background", "camera", "pans"}
    for names in (COLOURS, SHAPES, DIRECTIONS, SIZES, SPEEDS, TEXTURES, TONES, PATTERNS, CAMERAS):
        held.update(names)
    return sorted(held)
