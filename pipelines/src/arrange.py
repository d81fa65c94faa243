"""The way of q, k and v from a layer's projections to its attention: normalised, video rotated, put in order.

On CUDA one kernel does it all (`kernels/src/elementwise.py`), reading the norms' weights. Norms that it does not know,
that are hooked or whose weights are elsewhere (offloaded) are called, as the model does. On a CPU every step is the
model's own, bit for bit.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from diffusers.models.normalization import RMSNorm
from torch import nn

from ..grid import TokenLayout
from ..kernels import elementwise
from ..kernels.elementwise import Heads, Norm, Stream, Tables
from ..kernels.fused import DTYPES
from .rotary import rotate_pairs

# Modules whose formula the kernel has.
_KINDS: dict[type, Literal["rms", "layer"]] = {nn.RMSNorm: "rms", RMSNorm: "rms", nn.LayerNorm: "layer"}


class Projected(NamedTuple):
    """One kind of token as a layer has projected it.

    Attributes:
        query, key, value: (b, l, h, d).
        norm_q, norm_k: the layer's norms of query and key.
        across: the norms take all heads together, (b, l, h * d), rather than each alone.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    norm_q: nn.Module
    norm_k: nn.Module
    across: bool = False

    def normalised(self) -> Heads:
        """By the model's own modules."""
        query, key, value, norm_q, norm_k, across = self
        if across:
            heads = query.shape[2:]
            query, key = (norm(x.flatten(2)).unflatten(2, heads) for norm, x in ((norm_q, query), (norm_k, key)))
        else:
            query, key = norm_q(query), norm_k(key)
        return query, key, value

    def norm(self) -> Norm | None:
        """What the kernel must know of the norms; None where they must be called."""
        first, second = _readable(self.norm_q, self.query, self.across), _readable(self.norm_k, self.key, self.across)
        if first is None or second is None or first[:2] != second[:2]:
            return None
        kind, eps, weight, bias = first
        biases = None if bias is None or second[3] is None else (bias, second[3])
        return Norm(kind, eps, (weight, second[2]), biases)


def to_kernel(
    layout: TokenLayout, video: Projected, text: Projected | None = None, tables: Tables | None = None
) -> Heads:
    """q, k, v (b, slots, h, d) in kernel order.

    Args:
        layout: the order.
        video: the grid's tokens.
        text: tokens beside them.
        tables: RoPE's cos and sin for the video, every value twice, in a shape that broadcasts with (b, l, h, d).
    """
    _, tokens, _, d = video.query.shape
    # Of several ranks, the last may hold no text.
    text = text if text is not None and text.query.shape[1] else None
    one_dtype = video.query.dtype == video.key.dtype == video.value.dtype
    shared = tables is None or tables[0].numel() == tables[1].numel() == tokens * d
    if not (elementwise.can_run(video.query) and one_dtype and shared):
        query, key, value = to_model(video, text, tables, layout.text_first)
        return layout.to_kernel(query), layout.to_kernel(key), layout.to_kernel(value)
    norm, norm_text = video.norm(), None if text is None else text.norm()
    if norm is None or (text is not None and (norm_text is None or norm[:2] != norm_text[:2])):
        streams = [Stream(*_typed(x.normalised())) for x in (video, text) if x is not None]
    else:
        streams = [Stream(video.query, video.key, video.value, norm)]
        streams += [] if text is None else [Stream(text.query, text.key, text.value, norm_text)]
    return elementwise.to_kernel(layout, streams[0], streams[1] if text is not None else None, tables)


def to_model(video: Projected, text: Projected | None, tables: Tables | None, text_first: bool) -> Heads:
    """q, k, v (b, tokens, h, d) in model order, by the model's own steps."""
    query, key, value = video.normalised()
    if tables is not None:
        query, key = rotate_pairs(query, *tables), rotate_pairs(key, *tables)
    if text is None:
        return _typed((query, key, value))
    pairs = zip((query, key, value), text.normalised(), strict=True)
    query, key, value = (torch.cat(pair[::-1] if text_first else pair, 1) for pair in pairs)
    return _typed((query, key, value))


def _typed(heads: Heads) -> Heads:
    """Under autocast the norms compute in fp32; torch's own attention casts back by itself, ours takes one dtype."""
    query, key, value = heads
    return query.type_as(value), key.type_as(value), value


def _readable(
    norm: Any, x: torch.Tensor, across: bool
) -> tuple[Literal["rms", "layer"], float, torch.Tensor, torch.Tensor | None] | None:
    """Kind, eps, weight and bias of a module that does no more than its formula, here and now."""
    kind = _KINDS.get(type(norm))
    if kind is None or norm._forward_hooks or norm._forward_pre_hooks or "forward" in norm.__dict__:
        return None
    weight, bias = norm.weight, getattr(norm, "bias", None)
    size = x.shape[2] * x.shape[3] if across else x.shape[3]
    # Quantised and sharded weights are of other classes, offloaded ones elsewhere, and some are stored in 8 bits.
    plain = all(
        type(given) is nn.Parameter and given.device == x.device and given.dtype in DTYPES and given.numel() == size
        for given in ((weight, bias) if kind == "layer" else (weight,))
    )
    if not plain or norm.eps is None or (kind == "layer") != (bias is not None) or (kind == "layer" and across):
        return None
    return kind, norm.eps, weight, bias
