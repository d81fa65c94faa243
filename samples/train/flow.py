"""Flow matching: what a transformer is asked for, and at which times."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from samples.train.parts import FLOW_SHIFT

Velocity = Callable[[Tensor, Tensor], Tensor]
"""Noisy latents (b, c, f, h, w) and times (b,) in [0, 1] to a velocity, shaped as the latents."""


def shifted(even: Tensor, shift: float = FLOW_SHIFT) -> Tensor:
    """Move evenly spread times towards noise as the sampler's shift does: s = n u / (1 + (n - 1) u)."""
    return shift * even / (1 + (shift - 1) * even)


def times(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw times in [0, 1] that are spread evenly over the whole batch, then shifted."""
    total = torch.Size(shape).numel()
    spread = torch.randperm(total, generator=generator, device=generator.device)
    even = (spread + torch.rand(total, generator=generator, device=generator.device)) / total
    return shifted(even).view(shape)


def noisy(latents: Tensor, time: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the latents (b, c, f, h, w) under noise of `time`, which broadcasts, and the velocity noise - latents."""
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    return latents * (1 - time) + noise * time, noise - latents


def flow_loss(velocity: Velocity, latents: Tensor, generator: torch.Generator) -> Tensor:
    """Return the mean squared error of the velocity at random times, spread evenly over the batch."""
    time = times((len(latents),), generator)
    inputs, target = noisy(latents, time[:, None, None, None, None], generator)
    return (velocity(inputs, time).float() - target).square().mean()


@torch.no_grad()
def held_loss(velocity: Velocity, latents: Tensor) -> float:
    """Return the loss of held clips, with the same noise and times at each call."""
    generator = torch.Generator(latents.device).manual_seed(1)
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=latents.is_cuda):
        return float(flow_loss(velocity, latents, generator))
