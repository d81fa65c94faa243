"""SkyReels-V2: its blocks are Wan's; with diffusion forcing each frame has a timestep of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..family import Call
from .wan import Wan


class SkyReels(Wan):
    """The SkyReels-V2 family; `SKYREELS` is its one instance."""

    name = "skyreels"

    masked = (
        "SkyReels-V2 was asked for a causal_block_size above 1 (its transformer's num_frame_per_block), for which "
        "diffusers masks the frames of later blocks; sparse patterns cannot honour that mask: use causal_block_size=1, "
        "which goes with any ar_step, or a cache alone"
    )

    def read(self, transformer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """As Wan's, with one timestep for all frames: the largest, and a little of their mean.

        With `ar_step` later frames lag behind, so that the largest one stands still for many steps; their mean falls at
        each. It does not rise where the next stretch of a long video begins, most of whose frames may be known: the
        largest does.
        """
        call = super().read(transformer, args, kwargs)
        time = call.timestep.double()
        return call._replace(timestep=time.amax(-1) + 1e-3 * time.mean(-1) if time.ndim > 1 else call.timestep)

    def defaults(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """24 frames a second."""
        return {"fps": 24}

    def native(self, config: Mapping[str, Any]) -> tuple[int, int] | None:
        """544x960 pixels; the 720p checkpoints have the same configuration as 540p ones."""
        return (34, 60)

    def modulation(self, block: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """The projected time embedding, (b, 6, width); where it is (b, 6, tokens, width), the last token's."""
        temb: torch.Tensor = kwargs["temb"] if "temb" in kwargs else args[2]
        return temb if temb.ndim == 3 else temb[:, :, -1]


SKYREELS = SkyReels()
