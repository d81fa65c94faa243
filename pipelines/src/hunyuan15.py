"""HunyuanVideo-1.5: text to video and image to video.

As HunyuanVideo, with two streams in all layers, and three kinds of text: image, glyphs, prompt, 1,985 slots of which a
text prompt alone fills a few dozen. diffusers' processor spells the padding out as a mask of all pairs, anew in every
layer: 12 GiB and more at 720p. Here padded text is cut off before attention, on dense layers too. Nothing that is used
changes: no valid token ever sees padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0

from ..exchange import Exchange
from ..family import Call
from ..grid import TokenLayout, VideoGrid
from .dense import attend_to_valid
from .hunyuan import Hunyuan, patch
from .joint import Heads, JointFamily, valid_text

# Text is kept in steps of so many tokens, so that prompts of similar lengths share a layout.
STEP = 64


class Hunyuan15(Hunyuan):
    """The HunyuanVideo-1.5 family; `HUNYUAN15` is its one instance."""

    name = "hunyuan15"

    def read(self, transformer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """`hidden_states` is (b, channels, frames, height, width) of latents; valid text of all kinds comes first."""
        names = (
            "hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask", "timestep_r",
            "encoder_hidden_states_2", "encoder_attention_mask_2", "image_embeds",
        )  # fmt: skip
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        latents, image, embeds = given["hidden_states"], given["image_embeds"], given["encoder_hidden_states"]
        grid = VideoGrid(*(size // side for size, side in zip(latents.shape[2:], patch(transformer), strict=True)))
        # The model takes an image of zeros for none.
        image_mask = (image != 0).any().expand(image.shape[:2])
        masks = given["encoder_attention_mask"], given["encoder_attention_mask_2"], image_mask
        slots = sum(mask.shape[1] for mask in masks)
        valid = valid_text(*masks)
        text = min(slots, -(-max(valid) // STEP) * STEP)
        pairs = len(latents) * (grid.tokens + slots) ** 2
        note = (
            f"padded text is cut off before attention: for {slots} text slots diffusers would build a mask of "
            f"{pairs / 2**30:.3g} GiB, twice, in each of {len(transformer.transformer_blocks)} layers; none is built"
        )
        return Call(grid, text, given["timestep"], embeds, latents.device, latents, valid, (note,), slots)

    def defaults(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """24 frames a second; the checkpoint's own resolution, 480p or 720p, at 16:9."""
        height, width = (720, 1280) if config.get("target_size", 0) > 640 else (480, 848)
        return {"fps": 24, "height": height, "width": width}

    def native(self, config: Mapping[str, Any]) -> tuple[int, int] | None:
        """That resolution."""
        return JointFamily.native(self, config)

    def project(
        self,
        attn: Any,
        layout: TokenLayout,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        exchange: Exchange | None = None,
    ) -> Heads:
        """As all joint attention, with the text that the layout, of this rank alone, has room for."""
        text = encoder_hidden_states[:, : (layout if exchange is None else exchange.layout).text]
        return super().project(attn, layout, hidden_states, text, attention_mask, rotary_emb, exchange)

    def output(
        self, attn: Any, out: torch.Tensor, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Padded text attends to nothing, so zeros are its output."""
        missing = hidden_states.shape[1] + encoder_hidden_states.shape[1] - out.shape[1]
        out = torch.nn.functional.pad(out, (0, 0, 0, 0, 0, missing))
        return super().output(attn, out, hidden_states, encoder_hidden_states)

    def dense(
        self,
        attn: Any,
        processor: Any,
        valid: tuple[torch.Tensor, ...] | None,
        exchange: Exchange | None,
        *inputs: Any,
        **kwargs: Any,
    ) -> Any:
        """The attention of diffusers on the user's own backend, without padded text and so without a mask."""
        if exchange is not None or valid is None or type(processor) is not HunyuanVideo15AttnProcessor2_0:
            return super().dense(attn, processor, valid, exchange, *inputs, **kwargs)
        hidden_states, text, _, rotary_emb = inputs
        most = max(len(own) for own in valid)
        streams = self.streams(attn, hidden_states, text[:, :most], rotary_emb)
        return self.output(attn, attend_to_valid(streams, most, valid, processor), hidden_states, text)


HUNYUAN15 = Hunyuan15()
