"""CogVideoX 2b, 5b and 1.5: text to video, image to video, video to video.

Attention is joint with text first, all 226 text tokens in use, padding too, as it was trained. Both guidance branches
come as one batch. 2b has no RoPE; a token of 1.5 holds two latent frames. Its processors call torch's attention
themselves, so `set_attention_backend` does not reach its dense layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

from ..family import Call, Stack
from ..grid import Site, VideoGrid
from .joint import JointFamily


class CogVideoX(JointFamily):
    """The CogVideoX family; `COGVIDEOX` is its one instance."""

    name = "cogvideox"
    text_first = True

    def sites(self, transformer: Any) -> list[Site]:
        """`attn1` of every block."""
        return [
            Site(f"transformer_blocks.{n}.attn1.processor", n, "joint", self.name, self.native(transformer.config))
            for n in range(len(transformer.transformer_blocks))
        ]

    def read(self, transformer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """`hidden_states` is (b, frames, channels, height, width) of latents."""
        given = dict(zip(("hidden_states", "encoder_hidden_states", "timestep"), args, strict=False)) | dict(kwargs)
        latents, text = given["hidden_states"], given["encoder_hidden_states"]
        frames, _, height, width = latents.shape[1:]
        t, y, x = patch(transformer)
        grid = VideoGrid(frames // t, height // y, width // x)
        return Call(grid, text.shape[1], given["timestep"], text, latents.device, latents)

    def defaults(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The sizes that its authors name: 49 frames at 8 a second, and 81 at 16 for 1.5."""
        if config.get("patch_size_t"):
            return {"fps": 16, "height": 768, "width": 1360, "num_frames": 81}
        return {"fps": 8, "height": 480, "width": 720, "num_frames": 49}

    def split_plan(self, transformer: Any) -> dict[str, Any]:
        """Both streams at the first block; RoPE's tables, which its pipelines make, at the door."""
        stream = ContextParallelInput(split_dim=1, expected_dims=3)
        table = ContextParallelInput(split_dim=0, expected_dims=2)
        return {
            "": {"image_rotary_emb": [table, table]},
            "transformer_blocks.0": {"hidden_states": stream, "encoder_hidden_states": stream},
            "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
        }

    def stack(self, transformer: Any) -> Stack:
        """`transformer_blocks`."""
        config = transformer.config
        width = config.num_attention_heads * config.attention_head_dim
        latent = config.out_channels * math.prod(patch(transformer))
        streams = ("hidden_states", "encoder_hidden_states")
        return Stack(("transformer_blocks",), streams, width, config.time_embed_dim, latent, self._model(config))

    def modulation(self, block: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """The time embedding, (b, channels)."""
        temb: torch.Tensor = kwargs["temb"] if "temb" in kwargs else args[2]
        return temb

    def _model(self, config: Any) -> str:
        size = {(30, 30): "2b", (42, 48): "5b"}.get((config.num_layers, config.num_attention_heads))
        image = config.in_channels > config.out_channels
        if size is None:
            return self.name
        if config.patch_size_t:
            return f"{self.name}1.5-{'i2v' if image else 't2v'}-{size}"
        return f"{self.name}-{size}{'-i2v' * image}"


def patch(transformer: Any) -> tuple[int, int, int]:
    """Latents of one token along (t, y, x)."""
    config = transformer.config
    return (config.patch_size_t or 1, config.patch_size, config.patch_size)


COGVIDEOX = CogVideoX()
