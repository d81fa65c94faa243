"""LTX-Video: text to video and image to video.

As in Wan, text has its own cross-attention (`attn2`). Norms and RoPE come before heads are split. The pipeline hands
the transformer tokens, (b, tokens, channels), so their grid comes from its other arguments; both guidance branches are
one call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import InstallError
from ..exchange import Exchange
from ..family import Call, Family, Stack
from ..grid import Site, TokenLayout, VideoGrid
from .rotary import rotate_pairs


class LTX(Family):
    """The LTX-Video family; `LTX_VIDEO` is its one instance."""

    name = "ltx"
    rope_of_samples = True

    def sites(self, transformer: Any) -> list[Site]:
        """`attn1` of every block."""
        return [
            Site(f"transformer_blocks.{n}.attn1.processor", n, "self", self.name, self.native(transformer.config))
            for n in range(len(transformer.transformer_blocks))
        ]

    def cross_sites(self, transformer: Any) -> list[str]:
        """`attn2` of every block."""
        return [site.name.replace(".attn1.", ".attn2.") for site in self.sites(transformer)]

    def read(self, transformer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """`num_frames`, `height` and `width` count latents, which are tokens here.

        Raises:
            InstallError: they are missing, or other tokens stand beside the video's, as conditions of frames do.
        """
        names = ("hidden_states", "encoder_hidden_states", "timestep", "mask", "num_frames", "height", "width")
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        latents = given["hidden_states"]
        sizes = [given.get(name) for name in ("num_frames", "height", "width")]
        if None in sizes or VideoGrid(*sizes).tokens != latents.shape[1]:  # type: ignore[arg-type]
            raise InstallError(
                f"LTX-Video was called with {latents.shape[1]} tokens and num_frames, height, width = {sizes}: these "
                "do not say where each token stands; use the text-to-video or the image-to-video pipeline"
            )
        grid = VideoGrid(*sizes)  # type: ignore[arg-type]
        return Call(grid, 0, given["timestep"], given["encoder_hidden_states"], latents.device, latents)

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
        """q, k, v in kernel order: normalised across heads, rotated, split, reordered."""
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        if rotary_emb is not None:
            query, key = rotate_pairs(query, *rotary_emb), rotate_pairs(key, *rotary_emb)
        query, key, value = (x.type_as(value).unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        if exchange is not None:
            query, key, value = exchange.arrive(query, key, value, order=layout.order)
            return query, key, value
        return layout.to_kernel(query), layout.to_kernel(key), layout.to_kernel(value)

    def output(self, attn: Any, out: torch.Tensor, hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
        """(b, tokens, h, d) -> (b, tokens, width)."""
        out = out.flatten(2, 3).type_as(hidden_states)
        for module in attn.to_out:
            out = module(out)
        return out

    def defaults(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The frame rate that the pipeline gives to its RoPE."""
        return {"fps": 25}

    def native(self, config: Mapping[str, Any]) -> tuple[int, int] | None:
        """Its pipeline's 512x704 pixels, 32 a token."""
        return (16, 22)

    def split_plan(self, transformer: Any) -> dict[str, Any]:
        """None that works.

        Raises:
            InstallError: always.
        """
        raise InstallError(
            "LTX-Video cannot be split over several GPUs: diffusers' plan leaves the mask of its cross-attention as it "
            "was for all heads, and attention of a part of them fails; render one video on each GPU instead"
        )

    def stack(self, transformer: Any) -> Stack:
        """`transformer_blocks`."""
        config = transformer.config
        width = config.num_attention_heads * config.attention_head_dim
        return Stack(("transformer_blocks",), ("hidden_states",), width, 6 * width, config.out_channels, self.name)

    def modulation(self, block: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """The projected time embedding, (b, 6 * width); of one for each token, the last token's."""
        temb: torch.Tensor = kwargs["temb"] if "temb" in kwargs else args[2]
        return temb[:, -1]


LTX_VIDEO = LTX()
