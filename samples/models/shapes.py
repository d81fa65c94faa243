"""The outlines of the sample world, as signed distances: negative inside, zero on the edge, in pixels.

Renderer and checker share these functions, and nothing else about a clip: the checker measures frames against them.
Coordinates are relative to the object's centre, x to the right and y DOWN, as in images.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Outline = Callable[[Tensor, Tensor, Tensor], Tensor]


def circle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Radius r."""
    return torch.hypot(x, y) - r


def square(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Sides of 1.8 r."""
    return torch.maximum(x.abs(), y.abs()) - 0.9 * r


def triangle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Equilateral, one corner up; its centre of mass is the origin."""
    slanted = x.abs() * (math.sqrt(3) / 2) - y * 0.5
    return torch.maximum(slanted, y) - 0.58 * r


def star(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Five points, one up; the inner corners lie at 0.45 of the outer radius."""
    step = 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    folded = (torch.remainder(angle + step / 2, step) - step / 2).abs()
    length = torch.hypot(x, y)
    px, py = length * torch.cos(folded), length * torch.sin(folded)
    # Within one folded wedge the outline is a single segment, from (r, 0) to the inner corner.
    inner = 0.45 * r
    dx, dy = inner * math.cos(step / 2) - r, inner * math.sin(step / 2)
    return ((px - r) * dy - py * dx) / torch.sqrt(dx * dx + dy * dy)


def cross(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Two bars of 2 r by 0.68 r."""
    wide = torch.maximum(x.abs() - r, y.abs() - 0.34 * r)
    tall = torch.maximum(x.abs() - 0.34 * r, y.abs() - r)
    return torch.minimum(wide, tall)


def ring(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Outer radius r, inner radius r / 2."""
    return (torch.hypot(x, y) - 0.75 * r).abs() - 0.25 * r


OUTLINES: dict[str, Outline] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "star": star,
    "cross": cross,
    "ring": ring,
}


def coverage(shape: str, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Return how much of each pixel the shape covers, in [0, 1]: an edge one pixel wide."""
    return (0.5 - OUTLINES[shape](x, y, r)).clamp(0, 1)


def light(texture: str, x: Tensor, y: Tensor) -> Tensor:
    """Return the brightness factor of a texture at a place of the object: 1, or `DARK` in a stripe or spot."""
    if texture == "striped":
        dark = (0.5 + 8 * torch.sin((x + y) * (2 * math.pi / 36))).clamp(0, 1)
    elif texture == "spotted":
        u, v = torch.remainder(x + 16, 32) - 16, torch.remainder(y + 16, 32) - 16
        dark = (10.0 - torch.hypot(u, v)).clamp(0, 1)
    else:
        return torch.ones_like(x)
    return 1 - (1 - DARK) * dark


DARK = 0.45
