"""Mochi: text to video.

Attention is joint, [video | text]; each sample uses the first part of its padded text. Both guidance branches come as
one batch. Every head has RoPE tables of its own. Its timesteps rise from 0, so they are turned round for the clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..family import Call, Stack
from ..grid import Site, VideoGrid
from .joint import JointFamily, valid_text


class Mochi(JointFamily):
    """The Mochi family; `MOCHI` is its one instance."""

    name = "mochi"

    def sites(self, transformer: Any) -> list[Site]:
        """`attn1` of every block."""
        return [
            Site(f"transformer_blocks.{n}.attn1.processor", n, "joint", self.name, self.native(transformer.config))
            for n in range(len(transformer.transformer_blocks))
        ]

    def read(self, transformer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """`hidden_states` is (b, channels, frames, height, width) of latents."""
        names = ("hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask")
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        latents, text, side = given["hidden_states"], given["encoder_hidden_states"], transformer.config.patch_size
        frames, height, width = latents.shape[2:]
        grid = VideoGrid(frames, height // side, width // side)
        valid = valid_text(given["encoder_attention_mask"])
        return Call(grid, text.shape[1], 1000 - given["timestep"], text, latents.device, latents, valid)

    def tables(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """They come as (l, h, d / 2)."""
        return cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)

    def defaults(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """480p at 30 frames a second."""
        return {"fps": 30, "height": 480, "width": 848}

    def stack(self, transformer: Any) -> Stack:
        """`transformer_blocks`; the text stream is narrower than the video's."""
        config = transformer.config
        width = config.num_attention_heads * config.attention_head_dim
        latent = (config.out_channels or config.in_channels) * config.patch_size**2
        streams = ("hidden_states", "encoder_hidden_states")
        return Stack(("transformer_blocks",), streams, width, width, latent, self.name)

    def modulation(self, block: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """The time and text embedding, (b, width)."""
        temb: torch.Tensor = kwargs["temb"] if "temb" in kwargs else args[2]
        return temb


MOCHI = Mochi()
