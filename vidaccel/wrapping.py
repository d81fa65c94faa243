"""The attention processor that wraps a layer's own one."""

from __future__ import annotations

from typing import Any

import torch

from .family import Family
from .kernels.attention import attention
from .patterns import Plan


def attend(plan: Plan, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention as a plan says.

    Args:
        plan: a mask, or what chooses one.
        query: (b, slots, h, d) in the plan's token order.
        key: (b, slots, h, d), likewise.
        value: (b, slots, h, d), likewise.

    Returns:
        (b, slots, h, d).
    """
    out: torch.Tensor
    if plan.select is None:
        out, _ = attention(query, key, value, plan.mask)
        return out
    batch = query.shape[0]
    # Every sample chooses for itself, so its heads become heads of one sample; for one sample nothing is copied.
    query, key, value = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key, value))
    chosen = plan.select(query, key, value)
    order = None if chosen.order is None else chosen.order[..., None].expand(query.shape)
    moved = query if order is None else query.gather(1, order)
    out, _ = attention(moved, chosen.k, chosen.v, chosen.mask, key_bias=chosen.key_bias)
    if order is not None:
        out = torch.zeros_like(out).scatter(1, order, out)
    out = out[0].unflatten(1, (batch, -1))
    return out.transpose(0, 1)


class SparseAttnProcessor:
    """Stands in one attention layer and holds the processor that stood there before.

    Without a plan it hands the call to that processor, on the user's own attention backend. With a plan, the front
    door's for this call, it attends sparsely. Nothing that changes from layer to layer or from step to step is read
    here but the plan's tensors, so torch.compile needs one graph for dense layers and one for sparse ones.

    Attributes:
        wrapped: the processor that stood here.
        plan: set before each call of the transformer, None after it.
    """

    def __init__(self, wrapped: Any, family: Family) -> None:
        self.wrapped = wrapped
        self.family = family
        self.plan: Plan | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: Any = None,
        image_rotary_emb: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Attend. Every parameter is named because diffusers' Attention passes only those that a signature names."""
        inputs = (
            hidden_states,
            encoder_hidden_states,
            attention_mask,
            rotary_emb if rotary_emb is not None else image_rotary_emb,
        )
        plan = self.plan
        if plan is None:
            return self.wrapped(attn, *inputs, **kwargs)
        query, key, value = self.family.project(attn, plan.layout, *inputs)
        out = attend(plan, query, key, value)
        return self.family.output(attn, plan.layout.to_model(out), *inputs)

    @property
    def _attention_backend(self) -> Any:
        return self.wrapped._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.wrapped._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return self.wrapped._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.wrapped._parallel_config = config
