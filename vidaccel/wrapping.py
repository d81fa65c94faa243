"""The attention processor that wraps a layer's own one."""

from __future__ import annotations

from typing import Any

import torch

from .exchange import Exchange
from .family import Family
from .kernels.attention import attention
from .kernels.elementwise import to_model
from .kernels.select import put_back, taken
from .patterns import Choice, Plan
from .reuse.residual import completed


def attend(
    plan: Plan, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, held: Choice | None = None
) -> tuple[torch.Tensor, Choice | None]:
    """Attention as a plan says.

    Args:
        plan: a mask, or what chooses one.
        query: (b, slots, h, d) in the plan's token order.
        key: (b, slots, h, d), likewise.
        value: (b, slots, h, d), likewise.
        held: what was chosen at an earlier step, to serve again.

    Returns:
        (b, slots, h, d), and what was chosen; None where a mask says it all.
    """
    out: torch.Tensor
    scale = plan.scale * query.shape[-1] ** -0.5
    if plan.select is None:
        out, _ = attention(query, key, value, plan.mask, scale=scale)
        return out, None
    batch = query.shape[0]
    # Every sample chooses for itself, so its heads become heads of one sample; for one sample nothing is copied.
    query, key, value = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key, value))
    choice = plan.select.choose(query, key, value) if held is None else held
    chosen = plan.select.apply(choice, key, value)
    moved = query if chosen.order is None else taken(query, chosen.order)
    bias = chosen.key_bias
    if plan.text_bias is not None:
        text = plan.text_bias.repeat_interleave(query.shape[2] // batch, 0)[None]
        # Text ends the keys that were given; merged ones may follow it.
        given = key.shape[1]
        text = torch.nn.functional.pad(text, (given - text.shape[2], chosen.k.shape[1] - given))
        bias = text if bias is None else bias + text
    out, lse = attention(moved, chosen.k, chosen.v, chosen.mask, scale=scale, key_bias=bias)
    if plan.residual is not None:
        is_held = held is not None
        out, choice = completed(plan, choice, is_held, (query, key, value), (out, lse), scale=scale, key_bias=bias)
    if chosen.order is not None:
        out = put_back(out, chosen.order)
    out = out[0].unflatten(1, (batch, -1))
    return out.transpose(0, 1), choice


def attend_to_all(plan: Plan, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention without the plan's mask, by torch's own kernels, for q, k, v (b, slots, h, d) in the plan's order.

    Returns:
        (b, slots, h, d), likewise.
    """
    query, key, value = (plan.layout.to_model(x).transpose(1, 2) for x in (query, key, value))
    scale = plan.scale * query.shape[-1] ** -0.5
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale)
    return plan.layout.to_kernel(out.transpose(1, 2))


class SparseAttnProcessor:
    """Stands in one attention layer and holds the processor that stood there before.

    Without a plan it hands the call to that processor, on the user's own attention backend. With a plan, the front
    door's for this call, it attends sparsely. Nothing that changes from layer to layer or from step to step is read
    here but the plan's tensors, so torch.compile needs one graph for dense layers and one for sparse ones.

    Attributes:
        wrapped: the processor that stood here.
        plan: set before each call of the transformer, None after it.
        valid: numbers (n,) of the valid text tokens of each sample of the call, where some are padding; set likewise.
            Tensors, so that torch.compile takes their lengths for variables.
        held: what an earlier step chose, where it serves this one; set likewise.
        chosen: what this call chose or held, where a later step or the trace will look at it.
        exchange: what ranks swap around attention, where they share the video; set likewise.
        full_rows: how many rows, the last ones, see everything: the second path of `guide.py`.
        same_rows: how many rows, the first ones, come once more behind themselves: copies of `guide.py` that nothing
            has told apart yet, whose projections are computed once.
    """

    def __init__(self, wrapped: Any, family: Family) -> None:
        self.wrapped = wrapped
        self.family = family
        self.plan: Plan | None = None
        self.valid: tuple[torch.Tensor, ...] | None = None
        self.held: Choice | None = None
        self.chosen: Choice | None = None
        self.exchange: Exchange | None = None
        self.full_rows = self.same_rows = 0

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
        plan, exchange = self.plan, self.exchange
        if plan is None:
            return self.family.dense(attn, self.wrapped, self.valid, exchange, *inputs, **kwargs)
        if once := self.same_rows:
            inputs = (hidden_states[:once], encoder_hidden_states, attention_mask, inputs[3])
        query, key, value = self.family.project(attn, plan.layout, *inputs, exchange)
        first = second = (query, key, value)
        if self.full_rows and not once:
            first, second = zip(*(x.tensor_split((-self.full_rows,)) for x in first), strict=True)
        out, choice = attend(plan, *first, self.held)
        if plan.is_watched:
            self.chosen = choice
        if self.full_rows:
            out = torch.cat([out, attend_to_all(plan, *second)])
        if exchange is None:
            return self.family.output(attn, to_model(plan.layout, out), *inputs)
        return self.family.output(attn, exchange.leave(out, attn.heads, plan.layout.slot_of), *inputs)

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
