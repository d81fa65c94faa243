"""Trains one short text length as if it were any other.

`WanPipeline` pads the text with zero vectors to `max_sequence_length`, and the cross-attention sees them: nothing
masks them out. All pads have the same key and value, so n of them weigh as much as one whose logit is raised by
log n. Training therefore keeps 40 slots and draws the length it pretends to have; 64 and 512 both work afterwards.
"""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor
from torch.nn import functional as F

SLOTS = 40


class PaddedTextProcessor:
    """Cross-attention with a logit bias on the text slots; one `bias` (b, 1, 1, slots) serves all layers."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, bias: Tensor) -> None:
        self.bias = bias

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend from the video to the text, as `WanAttnProcessor` does, with the bias."""
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        key = attn.norm_k(attn.to_k(encoder_hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        value = attn.to_v(encoder_hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key.to(query.dtype), value, attn_mask=self.bias.to(query.dtype))
        return attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2, 3)))


def padding_bias(mask: Tensor, lengths: Tensor) -> Tensor:
    """Return the bias (b, 1, 1, slots) that makes the pads of `mask` weigh as much as those of a longer text.

    Args:
        mask: (b, slots), 1 for text and 0 for pads.
        lengths: (b,) padded lengths to pretend, each at least the number of slots.
    """
    words = mask.sum(1)
    pads = mask.shape[1] - words
    weight = torch.log((lengths - words).float() / pads.clamp(min=1))
    return ((1 - mask) * weight[:, None])[:, None, None, :]
