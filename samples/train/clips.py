"""Renders scenes of the sample world: batches of clips, anti-aliased, on any device, the same for the same seeds."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from samples.models import shapes, world
from samples.models.world import Scene, Thing

_WAVES = 24


def render(
    scenes: Sequence[Scene], seeds: Sequence[int], frames: int = 33, device: torch.device | None = None
) -> Tensor:
    """Render one clip for each scene.

    What a caption leaves open (where things start, the exact speed, where the pattern lies, the shape of the clouds)
    is drawn from the clip's own seed.

    Args:
        scenes: What to show.
        seeds: One seed a scene.
        frames: Frames a clip.
        device: Where to render.

    Returns:
        (b, f, h, w, 3) float32 in [0, 1].
    """
    draws = [random.Random(seed) for seed in seeds]
    clock = torch.arange(frames, device=device, dtype=torch.float32)
    canvas = _background(scenes, draws, clock)[..., None].repeat(1, 1, 1, 1, 3)
    starts = [_starts(scene, draw) for scene, draw in zip(scenes, draws, strict=True)]
    for place in range(max(len(scene.things) for scene in scenes)):
        rows = [row for row, scene in enumerate(scenes) if len(scene.things) > place]
        for shape in world.SHAPES:
            for texture in world.TEXTURES:
                same = [r for r in rows if _kind(scenes[r].things[place]) == (shape, texture)]
                if same:
                    things = [scenes[row].things[place] for row in same]
                    _paint(
                        canvas, same, things, torch.tensor([starts[row][place] for row in same], device=device), clock
                    )
    return canvas


def _kind(thing: Thing) -> tuple[str, str]:
    return thing.shape, thing.texture


def _starts(scene: Scene, draw: random.Random) -> list[list[float]]:
    """Place the things of a scene so that the front one hides the other for a quarter of 33 frames at most."""
    starts: list[list[float]] = []
    for thing in scene.things:
        start = _start(thing, draw)
        for _ in range(40):
            if all(_meeting(start, other) <= 0.25 for other in starts):
                break
            start = _start(thing, draw)
        starts.append(start)
    return starts


def _start(thing: Thing, draw: random.Random) -> list[float]:
    """Return x, y, x and y speed, radius: the numbers that a caption does not fix."""
    dx, dy = world.DIRECTIONS[thing.direction]
    speed = world.SPEEDS[thing.speed] * draw.uniform(0.85, 1.15) / math.hypot(dx, dy)
    radius = world.SIZES[thing.size] * draw.uniform(0.95, 1.1)
    return [draw.uniform(0, world.SIZE), draw.uniform(0, world.SIZE), dx * speed, dy * speed, radius]


def _meeting(one: list[float], other: list[float]) -> float:
    """Return the share of 33 frames in which two things overlap."""
    half = world.SIZE / 2
    met = 0
    for frame in range(33):
        x, y = ((one[i] - other[i] + (one[i + 2] - other[i + 2]) * frame + half) % world.SIZE - half for i in (0, 1))
        met += math.hypot(x, y) < one[4] + other[4]
    return met / 33


def _paint(canvas: Tensor, rows: list[int], things: list[Thing], starts: Tensor, clock: Tensor) -> None:
    """Draw things of one shape and texture over the clips `rows` of `canvas`, in place."""
    pixel = torch.arange(world.SIZE, device=canvas.device, dtype=torch.float32)
    centre_x = starts[:, 0, None] + starts[:, 2, None] * clock
    centre_y = starts[:, 1, None] + starts[:, 3, None] * clock
    x = _wrap(pixel - centre_x[..., None])[:, :, None, :]
    y = _wrap(pixel - centre_y[..., None])[:, :, :, None]
    x, y = torch.broadcast_tensors(x, y)
    cover = shapes.coverage(things[0].shape, x, y, starts[:, 4, None, None, None])[..., None]
    colours = torch.tensor([world.COLOURS[thing.colour] for thing in things], device=canvas.device)
    paint = shapes.light(things[0].texture, x, y)[..., None] * colours[:, None, None, None, :]
    canvas[rows] = canvas[rows] * (1 - cover) + paint * cover


def _wrap(distance: Tensor) -> Tensor:
    """Return the shortest signed distance on the torus."""
    return torch.remainder(distance + world.SIZE / 2, world.SIZE) - world.SIZE / 2


def _background(scenes: Sequence[Scene], draws: Sequence[random.Random], clock: Tensor) -> Tensor:
    """Return (b, f, h, w) grey levels; a panning camera moves the pattern the other way."""
    device = clock.device
    numbers = []
    for scene, draw in zip(scenes, draws, strict=True):
        dx, dy = world.CAMERAS[scene.camera]
        pan = world.PAN_SPEED * draw.uniform(0.9, 1.1)
        offset = draw.uniform(0, world.SIZE), draw.uniform(0, world.SIZE)
        numbers.append([*offset, -dx * pan, -dy * pan, world.TONES[scene.tone], draw.randrange(2**31)])
    values = torch.tensor([row[:5] for row in numbers], device=device, dtype=torch.float32)
    pixel = torch.arange(world.SIZE, device=device, dtype=torch.float32)
    x = pixel - (values[:, 0, None] + values[:, 2, None] * clock)[..., None]
    y = pixel - (values[:, 1, None] + values[:, 3, None] * clock)[..., None]
    grey = values[:, 4, None, None, None].expand(-1, len(clock), world.SIZE, world.SIZE).clone()
    for pattern, texture in (("checkered", _checkered), ("cloudy", _cloudy)):
        rows = [row for row, scene in enumerate(scenes) if scene.pattern == pattern]
        if rows:
            grey[rows] += texture(x[rows], y[rows], [int(numbers[row][5]) for row in rows])
    return grey.clamp(0, 1)


def _checkered(x: Tensor, y: Tensor, seeds: list[int]) -> Tensor:
    """Squares of 32 pixels, 0.14 apart, with edges about a pixel wide."""
    del seeds
    wave_x = (torch.sin(x * (math.pi / 32)) * 10).clamp(-1, 1)
    wave_y = (torch.sin(y * (math.pi / 32)) * 10).clamp(-1, 1)
    return 0.07 * wave_x[:, :, None, :] * wave_y[:, :, :, None]


def _cloudy(x: Tensor, y: Tensor, seeds: list[int]) -> Tensor:
    """A sum of plane waves that fit the torus, each clip's own: only the other frames tell what it looks like."""
    table = []
    for seed in seeds:
        draw = random.Random(seed)
        table.append([[draw.randint(-4, 4), draw.randint(-4, 4), draw.uniform(0, 2 * math.pi)] for _ in range(_WAVES)])
    waves = torch.tensor(table, device=x.device, dtype=torch.float32)
    turn = 2 * math.pi / world.SIZE
    # cos(a + b) = cos a cos b - sin a sin b turns the sum over waves into one matrix product an image.
    a = turn * waves[:, None, :, 0, None] * x[:, :, None, :]
    b = turn * waves[:, None, :, 1, None] * y[:, :, None, :] + waves[:, None, :, 2, None]
    rows = torch.cat((torch.cos(b), -torch.sin(b)), dim=2)
    columns = torch.cat((torch.cos(a), torch.sin(a)), dim=2)
    return (0.02 * rows.transpose(2, 3) @ columns).clamp(-0.1, 0.1)
