"""Joint attention over captions of many lengths in which no mask is needed.

`HunyuanVideoTransformer3DModel` keeps attention off the pads by a mask, and a mask keeps it off the fastest kernels.
Pads stand at the end of a sample, so a batch can be read as 2 b sequences laid one behind the other: video and words
of a sample, then its pads, which attend to themselves and are read by nobody. Words and video get what the mask gives.
"""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn


class PackedAttention:
    """Attention of a dual or a single block of HunyuanVideo, on a GPU without the mask that it is given."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Attend as `HunyuanVideoAttnProcessor2_0` does: video (b, n, c), words (b, m, c), mask (b, 1, 1, n + m)."""
        dual, words = attn.add_q_proj is not None, encoder_hidden_states.shape[1]
        video = self._heads(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        if dual:
            layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            norms = (attn.norm_added_q, attn.norm_added_k)
        else:
            layers, norms = (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k)
        text = self._heads(attn, encoder_hidden_states, layers, norms)
        turned = [apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in video[:2]] + [video[2]]
        query, key, value = (torch.cat((x, y), 1).to(video[2].dtype) for x, y in zip(turned, text, strict=True))
        mixed = attend(query, key, value, attention_mask).flatten(2)
        seen, read = mixed[:, :-words], mixed[:, -words:]
        if dual:
            return attn.to_out[1](attn.to_out[0](seen)), attn.to_add_out(read)
        return seen, read

    @staticmethod
    def _heads(attn: Attention, x: Tensor, layers: tuple, norms: tuple) -> list[Tensor]:
        query, key, value = (layer(x).unflatten(2, (attn.heads, -1)) for layer in layers)
        return [norms[0](query), norms[1](key), value]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Return attention (b, n, h, d) over the keys that `mask` (b, 1, 1, n) leaves: for each sample, its first ones.

    Rows of the others are of no use: they depend on the device.
    """
    if not query.is_cuda:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), mask).transpose(1, 2)
    batch, length = query.shape[:2]
    kept = mask[:, 0, 0].sum(1)
    ends = F.pad(torch.stack((kept, length - kept), 1).flatten().cumsum(0), (1, 0)).int()
    flat = (x.flatten(0, 1).contiguous() for x in (query, key, value))
    return varlen_attn(*flat, ends, ends, length, length).unflatten(0, (batch, length))
