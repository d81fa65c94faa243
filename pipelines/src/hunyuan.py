"""HunyuanVideo: text to video and image to video, by concatenated latents or by token replacement.

Attention is joint: [video | text], text padded to a fixed length of which each sample uses the first part. The first
layers have projections of their own for text, the others share one set. The text's refiner has attention too; it stays
dense.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

from ..errors import InstallError
from ..family import Call, Stack
from ..grid import Site, VideoGrid
from .joint import JointFamily, valid_text

LISTS = ("transformer_blocks", "single_transformer_blocks")


class Hunyuan(JointFamily):
    """The HunyuanVideo family; `HUNYUAN` is its one instance."""

    name = "hunyuan"

    def sites(self, transformer: Any) -> list[Site]:
        """Layers of two streams, then those of one."""
        names = [
            f"{blocks}.{n}.attn.processor" for blocks in LISTS for n in range(len(getattr(transformer, blocks, ())))
        ]
        native = self.native(transformer.config)
        return [Site(name, layer, "joint", self.name, native) for layer, name in enumerate(names)]

    def read(self, transformer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """`hidden_states` is (b, channels, frames, height, width) of latents."""
        names = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask")
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        latents, text = given["hidden_states"], given["encoder_hidden_states"]
        grid = VideoGrid(*(size // side for size, side in zip(latents.shape[2:], patch(transformer), strict=True)))
        valid = valid_text(given["encoder_attention_mask"])
        return Call(grid, text.shape[1], given["timestep"], text, latents.device, latents, valid)

    def defaults(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """24 frames a second."""
        return {"fps": 24}

    def native(self, config: Mapping[str, Any]) -> tuple[int, int] | None:
        """720x1280 pixels."""
        return (45, 80)

    def split_plan(self, transformer: Any) -> dict[str, Any]:
        """Both streams at the first block, RoPE's tables where they are made.

        Raises:
            InstallError: an image replaces the first frame's tokens, which blocks then modulate by their number.
        """
        if transformer.config.get("image_condition_type") == "token_replace":
            raise InstallError(
                f"{type(transformer).__name__} with image_condition_type token_replace cannot be split over several "
                "GPUs: its blocks modulate the first tokens of their input as the first frame's, whichever rank they "
                "are on; use a checkpoint with latent_concat, or one video on each GPU"
            )
        stream = ContextParallelInput(split_dim=1, expected_dims=3)
        table = ContextParallelInput(split_dim=0, expected_dims=2, split_output=True)
        return {
            "rope": {0: table, 1: table},
            "transformer_blocks.0": {"hidden_states": stream, "encoder_hidden_states": stream},
            "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
        }

    def stack(self, transformer: Any) -> Stack:
        """Both lists of blocks: all take and return both streams."""
        config = transformer.config
        width = config.num_attention_heads * config.attention_head_dim
        latent = config.out_channels * math.prod(patch(transformer))
        lists = tuple(name for name in LISTS if hasattr(transformer, name))
        streams = ("hidden_states", "encoder_hidden_states")
        return Stack(lists, streams, width, width, latent, self.name, modulation_per_token=True)

    def modulation(self, block: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """(b, l, width): the video tokens as the first block's attention gets them, normalised and modulated."""
        names = ("hidden_states", "encoder_hidden_states", "temb", "mask", "rope", "token_replace_emb", "num_tokens")
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        replaced = given.get("token_replace_emb")
        if replaced is None:
            modulated: torch.Tensor = block.norm1(given["hidden_states"], emb=given["temb"])[0]
        else:  # a second embedding modulates the first frame
            modulated = block.norm1(given["hidden_states"], given["temb"], replaced, given["num_tokens"])[0]
        return modulated


def patch(transformer: Any) -> tuple[int, int, int]:
    """Latents of one token along (t, y, x)."""
    config = transformer.config
    return (config.patch_size_t, config.patch_size, config.patch_size)


HUNYUAN = Hunyuan()
