"""SkyReels-V2: its blocks are Wan's; with diffusion forcing each frame has a timestep of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .wan import Wan


class SkyReels(Wan):
    """The SkyReels-V2 family; `SKYREELS` is its one instance."""

    name = "skyreels"

    def defaults(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """24 frames a second."""
        return {"fps": 24}

    def modulation(self, block: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """The projected time embedding, (b, 6, width); where it is (b, 6, tokens, width), the last token's."""
        temb: torch.Tensor = kwargs["temb"] if "temb" in kwargs else args[2]
        return temb if temb.ndim == 3 else temb[:, :, -1]


SKYREELS = SkyReels()
