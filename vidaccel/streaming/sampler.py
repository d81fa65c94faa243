"""Denoising one chunk: a few steps with fresh noise between them, or many along a scheduler.

Math (few steps), for a flow prediction v at noise level s: x0 = x - s v; then x = (1 - s') x0 + s' noise at the next
    level s', with noise of its own. In fp64, as Self-Forcing has it.
Nothing here waits for the device: noise levels are Python numbers, timesteps are tensors made beforehand. A
    scheduler of diffusers may: UniPC of order 2 and more solves a small system on it, which synchronises on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

# (latents, timesteps (b,)) -> flow prediction of the same shape
Flow = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# (step, timestep, latents) -> latents, or None to stop
OnStep = Callable[[int, float, torch.Tensor], torch.Tensor | None]


class Sampler(Protocol):
    """Turns noise into a chunk."""

    @property
    def steps(self) -> int:
        """Denoising steps of one chunk."""
        ...

    @property
    def draws(self) -> int:
        """How many noise tensors a chunk needs, the first one included."""
        ...

    def run(self, noise: torch.Tensor, flow: Flow, on_step: OnStep) -> torch.Tensor | None:
        """Denoise one chunk.

        Args:
            noise: (draws, b, channels, frames, height, width).
            flow: the model.
            on_step: called after each step.

        Returns:
            The chunk, or None where `on_step` stopped it.
        """
        ...


class FewStep:
    """A few steps, renoised with fresh noise: distribution-matched models such as Self-Forcing, CausVid and LongLive.

    Args:
        timesteps: falling, in (0, 1000]; noise level = timestep / 1000.
    """

    def __init__(self, timesteps: Sequence[float]) -> None:
        self.timesteps = tuple(float(t) for t in timesteps)

    @property
    def steps(self) -> int:
        """See `Sampler`."""
        return len(self.timesteps)

    @property
    def draws(self) -> int:
        """See `Sampler`."""
        return len(self.timesteps)

    def run(self, noise: torch.Tensor, flow: Flow, on_step: OnStep) -> torch.Tensor | None:
        """See `Sampler`."""
        latents = noise[0]
        batch = latents.shape[0]
        for index, timestep in enumerate(self.timesteps):
            level = timestep / 1000
            velocity = flow(latents, latents.new_full((batch,), timestep, dtype=torch.float32))
            clean = latents.double() - level * velocity.double()
            if index + 1 < self.steps:
                after = self.timesteps[index + 1] / 1000
                clean = (1 - after) * clean + after * noise[index + 1].double()
            found = on_step(index, timestep, clean.to(latents.dtype))
            if found is None:
                return None
            latents = found
        return latents


class ManyStep:
    """Many steps along a diffusers scheduler (UniPC, flow-match Euler): causal models that were not distilled.

    Args:
        scheduler: set anew for each chunk.
        steps: denoising steps.
    """

    draws = 1

    def __init__(self, scheduler: Any, steps: int) -> None:
        self.scheduler = scheduler
        self.steps = steps

    def run(self, noise: torch.Tensor, flow: Flow, on_step: OnStep) -> torch.Tensor | None:
        """See `Sampler`."""
        latents = noise[0]
        # Timesteps stay on the CPU, so that looking at them waits for nothing.
        self.scheduler.set_timesteps(self.steps, device="cpu")
        self.scheduler.set_begin_index(0)
        for index, timestep in enumerate(self.scheduler.timesteps):
            value = float(timestep)
            velocity = flow(latents, latents.new_full((latents.shape[0],), value, dtype=torch.float32))
            latents = self.scheduler.step(velocity.to(latents.dtype), timestep, latents, return_dict=False)[0]
            found = on_step(index, value, latents)
            if found is None:
                return None
            latents = found
        return latents
