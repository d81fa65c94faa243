"""Joint attention of two streams, video and text, as HunyuanVideo, CogVideoX and Mochi have it.

Each stream is projected, split into heads and normalised head by head; RoPE turns the video tokens alone; then both
attend as one sequence. Models differ in where text stands, whose projections it takes, and how RoPE's tables look.
"""

from __future__ import annotations

from typing import Any

import torch

from ..exchange import Exchange
from ..family import Call
from ..grid import TokenLayout
from ..kernels import elementwise
from .arrange import Projected, to_kernel, to_model
from .dense import DenseOnRanks

Heads = elementwise.Heads


class JointFamily(DenseOnRanks):
    """What families of joint attention share.

    diffusers has no plan for them on several ranks: attention of one family builds a mask of the tokens that it sees,
    another's calls torch itself.
    """

    def is_video(self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None) -> bool:
        """Joint attention gets both streams; a refiner gets the text alone."""
        return encoder_hidden_states is not None

    def layout(self, call: Call, block: int) -> TokenLayout:
        """Both streams."""
        return TokenLayout.of(call.grid, call.text, block, text_first=self.text_first)

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
        """q, k, v in kernel order. The mask says which text is padding; the layout's key lengths say the same."""
        tables = None if rotary_emb is None else self.tables(*rotary_emb)
        return to_kernel(layout, of_video(attn, hidden_states), of_text(attn, encoder_hidden_states), tables, exchange)

    def streams(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> Heads:
        """q, k, v (b, tokens, h, d) in model order: split, normalised, video rotated, both streams side by side."""
        tables = None if rotary_emb is None else self.tables(*rotary_emb)
        video, text = of_video(attn, hidden_states), of_text(attn, encoder_hidden_states)
        return to_model(video, text, tables, self.text_first)

    def tables(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """RoPE's tables in a shape that broadcasts with (b, l, h, d); here they come as (l, d), every value twice."""
        return cos[:, None], sin[:, None]

    def output(
        self, attn: Any, out: torch.Tensor, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(b, tokens, h, d) -> video and text, (b, l, width) each, in whatever way the layer projects them."""
        video, text = self.split(out.flatten(2, 3).type_as(hidden_states), encoder_hidden_states.shape[1])
        for module in attn.to_out or ():  # None where the block does it later, for both
            video = module(video)
            text = text if has_text_projections(attn) else module(text)
        to_text = getattr(attn, "to_add_out", None)  # None where nobody needs the text any more
        return video, text if to_text is None else to_text(text)

    def split(self, x: torch.Tensor, text: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(b, tokens, ...) in model order -> video, text."""
        if self.text_first:
            return x[:, text:], x[:, :text]
        return x[:, : x.shape[1] - text], x[:, x.shape[1] - text :]


def has_text_projections(attn: Any) -> bool:
    """The layer projects text by weights of its own, rather than by the video's."""
    return getattr(attn, "add_q_proj", None) is not None


def of_video(attn: Any, hidden_states: torch.Tensor) -> Projected:
    """The video tokens (b, l, width)."""
    return Projected(hidden_states, (attn.to_q, attn.to_k, attn.to_v), attn.heads, (attn.norm_q, attn.norm_k))


def of_text(attn: Any, encoder_hidden_states: torch.Tensor) -> Projected:
    """The text tokens (b, l, width), by the text's own projections where the layer has any."""
    if not has_text_projections(attn):
        return of_video(attn, encoder_hidden_states)
    linears = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    return Projected(encoder_hidden_states, linears, attn.heads, (attn.norm_added_q, attn.norm_added_k))


def valid_text(*masks: torch.Tensor) -> tuple[int, ...]:
    """Valid tokens of each sample of padding masks (b, text), all masks together. Waits for the device.

    One number where all samples have as many; also where none is padding, so that compiled layers see one case.
    """
    counts = torch.stack([mask.sum(1, dtype=torch.int64) for mask in masks]).sum(0).tolist()
    return tuple(counts) if len(set(counts)) > 1 else (counts[0],)
