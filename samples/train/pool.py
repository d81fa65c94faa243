"""A pool of rendered clips as bytes, and random crops from it: rendering once, training many steps."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from samples.models import world
from samples.train.clips import render


def clip_pool(clips: int, frames: int, seed: int, device: torch.device, batch: int = 8) -> Tensor:
    """Return (clips, frames, h, w, 3) uint8: random scenes that hold no held-out triple, fixed by `seed`."""
    rng = random.Random(seed)
    pool = torch.empty((clips, frames, world.SIZE, world.SIZE, 3), dtype=torch.uint8, device=device)
    for first in range(0, clips, batch):
        seeds = [seed + index for index in range(first, min(first + batch, clips))]
        scenes = [world.draw(rng) for _ in seeds]
        video = render(scenes, seeds, frames, device)
        pool[first : first + len(seeds)] = (video * 255).round().byte()
    return pool


def crops(pool: Tensor, out: Tensor, generator: torch.Generator) -> None:
    """Fill `out` (b, 3, f, h, w) with random windows of random clips, in [-1, 1]."""
    batch, _, frames, height, width = out.shape
    highs = (pool.shape[0], pool.shape[1] - frames + 1, pool.shape[2] - height + 1, pool.shape[3] - width + 1)
    draws = [torch.randint(high, (batch,), generator=generator).tolist() for high in highs]
    windows = [
        pool[clip, time : time + frames, y : y + height, x : x + width] for clip, time, y, x in zip(*draws, strict=True)
    ]
    out.copy_(torch.stack(windows).permute(0, 4, 1, 2, 3))
    out.div_(127.5).sub_(1)
