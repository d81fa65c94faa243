"""Reads colour, shape, direction and more off the frames of a clip, and compares them with what was asked for.

The reader knows the world (palette, outlines, speeds) but nothing of how a clip was made: it takes frames, rendered or
generated, and needs no model. Every background is neutral, so what has chroma is an object; its hue names the colour,
its path on the torus the direction, and its mean silhouette, laid on top of itself along the path, the shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import shapes, world
from .world import Scene

_CHROMA = 0.2
"""Chroma (largest minus smallest channel) from which a pixel belongs to an object."""
_AREA = 350.0
"""Pixels of one colour, on average over the frames, from which it is an object."""
_BOX = 128
"""Side of the window, around an object, in which its silhouette is read."""


@dataclass(frozen=True)
class Reading:
    """One object as read from the frames; `direction` is None where it hardly moves or turns on its way."""

    colour: str
    shape: str
    direction: str | None
    speed: str
    texture: str
    area: float


@dataclass(frozen=True)
class Verdict:
    """What a clip gets right of its scene. With two objects, each answer needs both to be right.

    `camera` is None where the background shows no pattern, so that no movement could be seen.
    """

    colour: bool
    shape: bool
    direction: bool
    speed: bool
    texture: bool
    camera: bool | None

    @property
    def right(self) -> bool:
        """Colour, shape and direction are all right."""
        return self.colour and self.shape and self.direction


def check(frames: Tensor | np.ndarray, scene: Scene) -> Verdict:
    """Compare frames with the scene they should show.

    Args:
        frames: (f, h, w, 3) in [0, 1], h = w = 256.
        scene: What was asked for.
    """
    found = read_objects(frames)
    wanted = {thing.colour: thing for thing in scene.things}
    match = {reading.colour: reading for reading in found if reading.colour in wanted}
    pairs = [(match[colour], thing) for colour, thing in wanted.items() if colour in match]
    every = len(pairs) == len(wanted)
    camera = None if scene.pattern == "plain" else read_camera(frames) == scene.camera
    return Verdict(
        colour=every and len(found) == len(wanted),
        shape=every and all(reading.shape == thing.shape for reading, thing in pairs),
        direction=every and all(reading.direction == thing.direction for reading, thing in pairs),
        speed=every and all(reading.speed == thing.speed for reading, thing in pairs),
        texture=every and all(reading.texture == thing.texture for reading, thing in pairs),
        camera=camera,
    )


def read_objects(frames: Tensor | np.ndarray) -> list[Reading]:
    """Return what moves in the frames, the largest first; colours that cover next to nothing are left out."""
    video = _video(frames)
    labels = _label(video)
    found = []
    pixels = torch.bincount(labels.flatten() + 1, minlength=len(world.COLOURS) + 1)[1:]
    for number, colour in enumerate(world.COLOURS):
        area = float(pixels[number]) / len(video)
        if area >= _AREA:
            found.append(_read(video, (labels == number).float(), colour, area))
    found.sort(key=lambda reading: -reading.area)
    # The blurred seam between two objects, or a stain inside one, can have a third hue: not an object of its own.
    return [reading for reading in found if reading.area >= 0.1 * found[0].area]


def read_camera(frames: Tensor | np.ndarray) -> str:
    """Return which way the camera pans: the shift under which the background best repeats itself four frames on."""
    video = _video(frames)[::4].permute(0, 3, 1, 2)
    video = F.avg_pool2d(video, 5, 1, 2, count_include_pad=False)
    coloured = (video.amax(1) - video.amin(1) > 0.5 * _CHROMA).float()
    neutral = F.max_pool2d(F.max_pool2d(coloured, (13, 1), 1, (6, 0)), (1, 13), 1, (0, 6)) == 0
    grey = video.mean(1)
    errors: dict[str, float] = {}
    for name, (dx, dy) in world.CAMERAS.items():
        for pixels in (0,) if name == "still" else (9, 10, 11):
            shift = (-dy * pixels, -dx * pixels)
            both = neutral[1:] & torch.roll(neutral[:-1], shift, (1, 2))
            change = (grey[1:] - torch.roll(grey[:-1], shift, (1, 2))).square() * both
            error = float(change.sum() / both.sum().clamp(min=1))
            errors[name] = min(error, errors.get(name, error))
    return min(errors, key=lambda name: errors[name])


def _video(frames: Tensor | np.ndarray) -> Tensor:
    video = torch.as_tensor(frames).float()
    expected = (world.SIZE, world.SIZE, 3)
    if video.ndim != 4 or tuple(video.shape[1:]) != expected:
        raise ValueError(f"frames must be (f, {world.SIZE}, {world.SIZE}, 3), not {tuple(video.shape)}")
    return video


def _label(video: Tensor) -> Tensor:
    """Return (f, h, w): the number of the palette colour with the nearest hue, -1 for neutral pixels."""
    labels = torch.full(video.shape[:3], -1, device=video.device)
    coloured = video.amax(-1) - video.amin(-1) > _CHROMA
    palette = _hue(torch.tensor(list(world.COLOURS.values()), device=video.device))
    distance = (torch.remainder(_hue(video[coloured])[:, None] - palette + math.pi, 2 * math.pi) - math.pi).abs()
    labels[coloured] = distance.argmin(-1)
    return labels


def _hue(rgb: Tensor) -> Tensor:
    red, green, blue = rgb.unbind(-1)
    return torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)


def _read(video: Tensor, mask: Tensor, colour: str, area: float) -> Reading:
    path, areas = _path(mask)
    direction, speed = _direction(path)
    # Frames in which another object hides a part of this one show less of it.
    clear = areas >= areas.median()
    shape, texture = _look(video[clear], mask[clear], path[clear])
    return Reading(colour, shape, direction, "quickly" if speed > 3.3 else "slowly", texture, area)


def _path(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centre of mass on the torus, (f, 2) as x and y, and the area in each frame, (f,)."""
    turn = torch.arange(world.SIZE, device=mask.device) * (2 * math.pi / world.SIZE)
    wave = torch.polar(torch.ones_like(turn), turn)
    x = (mask.sum(1).to(wave.dtype) @ wave).angle()
    y = (mask.sum(2).to(wave.dtype) @ wave).angle()
    return torch.stack((x, y), -1) * (world.SIZE / (2 * math.pi)), mask.sum((1, 2))


def _direction(path: Tensor) -> tuple[str | None, float]:
    """Return the direction, if the first and the second half of the path agree with it, and the pixels a frame."""
    steps = _wrap(path.diff(dim=0)).cpu()
    move = steps.mean(0)
    speed = float(move.norm())
    half = len(steps) // 2
    if speed < 0.5:
        return None, speed
    heading = move / move.norm()
    for part in (steps[:half].mean(0), steps[half:].mean(0)):
        if float(part @ heading) < 0.7 * float(part.norm()):
            return None, speed
    vectors = torch.tensor(list(world.DIRECTIONS.values()), dtype=torch.float32)
    nearest = int((vectors / vectors.norm(dim=1, keepdim=True) @ heading).argmax())
    return list(world.DIRECTIONS)[nearest], speed


def _wrap(distance: Tensor) -> Tensor:
    return torch.remainder(distance + world.SIZE / 2, world.SIZE) - world.SIZE / 2


def _look(video: Tensor, mask: Tensor, path: Tensor) -> tuple[str, str]:
    """Name shape and texture from the object's mean over the frames, each shifted so that it lies in the middle."""
    rows = torch.cat((mask[..., None], video.amax(-1, keepdim=True) * mask[..., None]), -1)
    stack = torch.stack(
        [_centre(frame, centre) for frame, centre in zip(rows, path.round().int().tolist(), strict=True)]
    )
    mean = stack.mean(0)
    silhouette, brightness = mean[..., 0], mean[..., 1] / mean[..., 0].clamp(min=0.5)
    names, outlines, lights = _templates(str(mask.device))
    common = torch.minimum(outlines, silhouette).sum((1, 2)) / torch.maximum(outlines, silhouette).sum((1, 2))
    best = int(common.argmax())
    inside = 1 - F.max_pool2d((silhouette < 0.8).float()[None], 7, 1, 3)[0]
    return names[best], _texture(brightness, inside, lights[best // _PER_SHAPE])


def _centre(frame: Tensor, centre: list[int]) -> Tensor:
    x, y = centre
    return torch.roll(frame, (_BOX // 2 - y, _BOX // 2 - x), (0, 1))[:_BOX, :_BOX]


def _texture(brightness: Tensor, inside: Tensor, lights: Tensor) -> str:
    """Correlate the brightness inside the silhouette with each texture; too flat, or like none of them, is plain."""
    count = inside.sum().clamp(min=1)
    level = (brightness * inside).sum() / count
    change = (brightness - level) * inside
    if float((change.square().sum() / count).sqrt() / level.clamp(min=0.05)) < 0.12:
        return "plain"
    scores = []
    for light in lights:
        wave = (light - (light * inside).sum() / count) * inside
        scores.append(float((wave * change).sum() / (wave.norm() * change.norm()).clamp(min=1e-6)))
    best = int(np.argmax(scores))
    return world.TEXTURES[1 + best] if scores[best] > 0.25 else "plain"


_RADII = tuple(range(22, 56, 2))
_PER_SHAPE = len(_RADII)


@lru_cache(maxsize=4)
def _templates(device: str) -> tuple[list[str], Tensor, Tensor]:
    """Return names and (n, box, box) silhouettes of every shape and radius, and (shape, texture, box, box) lights.

    Each is centred on its own centre of mass, as the measured silhouette is.
    """
    pixel = torch.arange(_BOX, device=device, dtype=torch.float32) - _BOX // 2
    x, y = pixel[None, :].expand(_BOX, _BOX), pixel[:, None].expand(_BOX, _BOX)
    names, outlines, lights = [], [], []
    for shape in world.SHAPES:
        for radius in _RADII:
            r = torch.tensor(float(radius), device=device)
            cover = shapes.coverage(shape, x, y, r)
            dx, dy = float((cover * x).sum() / cover.sum()), float((cover * y).sum() / cover.sum())
            names.append(shape)
            outlines.append(shapes.coverage(shape, x + dx, y + dy, r))
        lights.append(torch.stack([shapes.light(texture, x + dx, y + dy) for texture in world.TEXTURES[1:]]))
    return names, torch.stack(outlines), torch.stack(lights)
