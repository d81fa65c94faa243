"""What stands in the attention layers of a causal Wan: self-attention with memory, cross-attention to a kept prompt."""

from __future__ import annotations

from typing import Any

import torch

from ..exchange import Exchange
from ..grid import TokenLayout
from ..reuse import LayerMemory, remembered
from ..reuse.cross import Prompt, PromptChoice, attend_merged
from ..reuse.in_place import in_place
from .wan import WAN


class PromptMemory:
    """Keys and values of one prompt in one layer, projected at the first call and kept where they are.

    Args:
        choice: of its tokens; None attends to all.
    """

    def __init__(self, choice: PromptChoice | None) -> None:
        self.choice = choice
        self.kept: tuple[torch.Tensor, ...] | None = None
        self.is_hashed = False
        self.note = ""
        self.stale = True

    def of(self, attn: Any, text: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Keys and values of text states (b, text, width), as `reuse.cross.Prompt` has them."""
        if self.stale or self.kept is None:
            if attn.fused_projections:
                key, value = attn.to_kv(text).chunk(2, dim=-1)
            else:
                key, value = attn.to_k(text), attn.to_v(text)
            key, value = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_k(key), value))
            made = Prompt((key, value)) if self.choice is None else self.choice.prepare(text, key, value)
            before = self.kept if self.kept is not None and len(self.kept) == len(made.tensors) else None
            self.kept, self.is_hashed, self.note = in_place(before, *made.tensors), made.is_hashed, made.note
            self.stale = False
        return self.kept


class CausalAttnProcessor:
    """Self-attention of an open chunk, with `memory` for what it sees.

    On several ranks each remembers its own heads, of all tokens.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, layout: TokenLayout, exchange: Exchange | None) -> None:
        self.layout = layout
        self.exchange = exchange
        self.memory: LayerMemory | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attend; the arguments are those of diffusers' Wan processor."""
        assert self.memory is not None
        query, key, value = WAN.project(
            attn, self.layout, hidden_states, None, attention_mask, rotary_emb, self.exchange
        )
        out: torch.Tensor = remembered(query, key, value, self.memory.ticket)
        if self.exchange is None:
            out = self.layout.to_model(out)
        else:
            out = self.exchange.leave(out, attn.heads, self.layout.slot_of)
        return WAN.output(attn, out, hidden_states)


class PromptAttnProcessor:
    """Cross-attention to a prompt whose keys and values are kept."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, stock: Any) -> None:
        self.stock = stock
        self.memory: PromptMemory | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attend; the arguments are those of diffusers' Wan processor."""
        assert self.memory is not None
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        kept = self.memory.of(attn, encoder_hidden_states)
        if self.memory.is_hashed:
            assert self.memory.choice is not None
            kept = self.memory.choice(query, *kept)
        out = dense(query, *kept, stock=self.stock) if len(kept) == 2 else attend_merged(query, *kept)
        return WAN.output(attn, out, hidden_states)


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, stock: Any) -> torch.Tensor:
    """Attention of (b, l, h, d) to all keys, on the backend that the user has chosen in diffusers."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    out: torch.Tensor = dispatch_attention_fn(query, key, value, backend=stock._attention_backend)
    return out.type_as(query)
