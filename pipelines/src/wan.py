"""Wan 2.1 and 2.2: text to video, image to video, video to video, VACE, TI2V-5B and the two experts of A14B.

Text sits in its own cross-attention (`attn2`), so `attn1` sees video tokens alone, (b, l, h * d), with RMSNorm across
all heads before they are split, and RoPE on interleaved pairs of channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import InstallError
from ..exchange import Exchange
from ..family import Call, Stack
from ..grid import Site, TokenLayout, VideoGrid
from .arrange import Projected, to_kernel
from .dense import DenseOnRanks

# Of what projects to q, k and v at once.
_THIRDS = (lambda x: x.chunk(3, -1)[0], lambda x: x.chunk(3, -1)[1], lambda x: x.chunk(3, -1)[2])


class Wan(DenseOnRanks):
    """The Wan family; `WAN` is its one instance.

    Attributes:
        masked: the error where self-attention is given a mask.
    """

    name = "wan"
    masked = "an attention mask was passed to Wan's self-attention; sparse patterns cannot honour it: pass none"

    def sites(self, transformer: Any) -> list[Site]:
        """`attn1` of every block; VACE's own blocks run first and count as the layers that they feed."""
        names = [
            (f"vace_blocks.{n}.attn1.processor", layer)
            for n, layer in enumerate(getattr(transformer.config, "vace_layers", ()))
        ]
        names += [(f"blocks.{n}.attn1.processor", n) for n in range(len(transformer.blocks))]
        native = self.native(transformer.config)
        return [Site(name, layer, "self", self.name, native) for name, layer in names]

    def cross_sites(self, transformer: Any) -> list[str]:
        """`attn2` of every block, VACE's own ones too."""
        return [site.name.replace(".attn1.", ".attn2.") for site in self.sites(transformer)]

    def read(self, transformer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """`hidden_states` is (b, channels, frames, height, width) of latents."""
        given = dict(zip(("hidden_states", "timestep", "encoder_hidden_states"), args, strict=False)) | dict(kwargs)
        latents = given["hidden_states"]
        patch = transformer.config.patch_size
        grid = VideoGrid(*(size // side for size, side in zip(latents.shape[2:], patch, strict=True)))
        return Call(grid, 0, given["timestep"], given.get("encoder_hidden_states"), latents.device, latents)

    def is_video(self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None) -> bool:
        """Cross-attention gets encoder states, self-attention gets none."""
        return encoder_hidden_states is None

    def layout(self, call: Call, block: int) -> TokenLayout:
        """Video tokens only."""
        return TokenLayout.of(call.grid, block=block)

    def project(
        self,
        attn: Any,
        layout: TokenLayout,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        exchange: Exchange | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v in kernel order: normalised across heads, split, rotated, reordered.

        Raises:
            InstallError: an attention mask; Wan's pipelines pass none, and a block mask cannot carry it.
        """
        if attention_mask is not None:
            raise InstallError(self.masked)
        if attn.fused_projections:
            states, linears = attn.to_qkv(hidden_states), _THIRDS
        else:
            states, linears = hidden_states, (attn.to_q, attn.to_k, attn.to_v)
        video = Projected(states, linears, attn.heads, (attn.norm_q, attn.norm_k), across=True)
        return to_kernel(layout, video, None, rotary_emb, exchange)

    def output(self, attn: Any, out: torch.Tensor, hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
        """(b, tokens, h, d) -> (b, tokens, width)."""
        out = out.flatten(2, 3).type_as(hidden_states)
        for module in attn.to_out:
            out = module(out)
        return out

    def defaults(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """24 frames a second for TI2V-5B, whose VAE has 48 channels, 16 for the others."""
        return {"fps": 24 if config.get("out_channels") == 48 else 16}

    def native(self, config: Mapping[str, Any]) -> tuple[int, int] | None:
        """480x832 pixels, 16 a token; 704x1280 for TI2V-5B, 32 a token. 14B was trained at 720x1280 as well."""
        return (22, 40) if config.get("out_channels") == 48 else (30, 52)

    def stack(self, transformer: Any) -> Stack:
        """`blocks`; VACE's own blocks run before them and stay as they are."""
        config = transformer.config
        width = config.num_attention_heads * config.attention_head_dim
        latent = config.out_channels * math.prod(config.patch_size)
        return Stack(("blocks",), ("hidden_states",), width, 6 * width, latent, self._model(config))

    def modulation(self, block: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """The projected time embedding, (b, 6, width); of TI2V's one for each token, the last token's."""
        temb: torch.Tensor = kwargs["temb"] if "temb" in kwargs else args[2]
        return temb if temb.ndim == 3 else temb[:, -1]

    def _model(self, config: Any) -> str:
        size = {(30, 12): "1.3b", (40, 40): "14b", (30, 24): "5b"}.get((config.num_layers, config.num_attention_heads))
        if size is None:
            return self.name
        kind = "ti2v" if size == "5b" else "i2v" if config.in_channels > config.out_channels else "t2v"
        return f"{self.name}-{kind}-{size}"


WAN = Wan()
