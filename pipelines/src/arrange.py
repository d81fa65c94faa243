"""The way of q, k and v from a layer's projections to its attention: normalised, video rotated, put in order.

On CUDA one kernel does it all (`kernels/src/elementwise.py`), reading the norms' weights. Norms that it does not know,
that are hooked or whose weights are elsewhere (offloaded) are called, as the model does. On a CPU every step is the
model's own, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from diffusers.models.normalization import RMSNorm
from torch import nn

from ..exchange import Exchange
from ..grid import TokenLayout
from ..kernels import elementwise
from ..kernels.elementwise import NO_NORM, Heads, Norm, OneNorm, Stream, Tables
from ..kernels.fused import DTYPES
from .rotary import rotate_pairs

# Modules whose formula the kernel has.
_KINDS: dict[type, Literal["rms", "layer"]] = {nn.RMSNorm: "rms", RMSNorm: "rms", nn.LayerNorm: "layer"}


class Projected(NamedTuple):
    """One kind of token, and how a layer projects it: each of q (0), k (1) and v (2) when it is asked for.

    Attributes:
        hidden_states: (b, l, width).
        linears: of q, k and v, to (b, l, h * d) each.
        heads: how many.
        norms: the layer's, of q and k.
        across: the norms take all heads together, (b, l, h * d), rather than each alone.
    """

    hidden_states: torch.Tensor
    linears: Sequence[Callable[[torch.Tensor], torch.Tensor]]
    heads: int
    norms: tuple[Any, Any]
    across: bool = False

    def linear(self, which: int) -> torch.Tensor:
        """(b, l, h, d)."""
        x: torch.Tensor = self.linears[which](self.hidden_states).unflatten(2, (self.heads, -1))
        return x

    def all(self) -> Heads:
        """q, k and v, (b, l, h, d) each."""
        return self.linear(0), self.linear(1), self.linear(2)

    def normalised(self, which: int, x: torch.Tensor) -> torch.Tensor:
        """What `linear` gave, (b, l, h, d), through the model's own norm of q (0), k (1) or v (2, none)."""
        if which == 2:
            return x
        found: torch.Tensor = self.norms[which](x.flatten(2) if self.across else x)
        return found.unflatten(2, x.shape[2:]) if self.across else found

    def readable(self, which: int, x: torch.Tensor) -> OneNorm | None:
        """What a kernel must know of a norm; None where it must be called."""
        return NO_NORM if which == 2 else _readable(self.norms[which], x, self.across)


def to_kernel(
    layout: TokenLayout,
    video: Projected,
    text: Projected | None = None,
    tables: Tables | None = None,
    exchange: Exchange | None = None,
) -> Heads:
    """q, k, v (b, slots, h, d) in kernel order.

    Args:
        layout: the order.
        video: the grid's tokens.
        text: tokens beside them.
        tables: RoPE's cos and sin for the video, every value twice, in a shape that broadcasts with (b, l, h, d).
        exchange: with other ranks. What is given is this rank's own tokens then, the result all tokens of its own
            heads.
    """
    streams = [video] if text is None else [video, text]
    if exchange is not None:
        return _with_others(layout, streams, tables, exchange)
    given = [stream.all() for stream in streams]
    query, key, value = given[0]
    if not (query.dtype == key.dtype == value.dtype and _can_run(query, tables)):
        query, key, value = _by_modules(streams, given, tables, layout.text_first)
        return layout.to_kernel(query), layout.to_kernel(key), layout.to_kernel(value)
    norms = [_both(stream, *heads[:2]) for stream, heads in zip(streams, given, strict=True)]
    if norms[0] is None or norms[-1] is None or norms[0][:2] != norms[-1][:2]:
        given = [_typed(_normalised(stream, heads)) for stream, heads in zip(streams, given, strict=True)]
        norms = [None, None]
    found = [Stream(*heads, norm) for heads, norm in zip(given, norms, strict=False)]
    return elementwise.to_kernel(layout, found[0], None if text is None else found[1], tables)


def to_model(video: Projected, text: Projected, tables: Tables | None, text_first: bool) -> Heads:
    """q, k, v (b, tokens, h, d) in model order, by the model's own steps."""
    return _by_modules([video, text], [video.all(), text.all()], tables, text_first)


def _by_modules(streams: Sequence[Projected], given: Sequence[Heads], tables: Tables | None, text_first: bool) -> Heads:
    moved = [_normalised(stream, heads) for stream, heads in zip(streams, given, strict=True)]
    if tables is not None:
        query, key, value = moved[0]
        moved[0] = rotate_pairs(query, *tables), rotate_pairs(key, *tables), value
    if len(moved) == 1:
        return _typed(moved[0])
    query, key, value = (torch.cat(pair, 1) for pair in zip(*(moved[::-1] if text_first else moved), strict=True))
    return _typed((query, key, value))


def _with_others(layout: TokenLayout, streams: Sequence[Projected], tables: Tables | None, exchange: Exchange) -> Heads:
    """What takes least to make leaves first: each tensor travels while the next one is made."""
    # Of several ranks, the last may hold no text.
    streams = [stream for stream in streams if stream.hidden_states.shape[1]]
    first = exchange.send(_packed(streams, 2, None, exchange))
    others = [exchange.send(_packed(streams, which, tables, exchange, first.moving.dtype)) for which in (1, 0)]
    order = None if layout.is_identity else layout.order
    value, key, query = exchange.receive([first, *others], exchange.ranks.heads(streams[0].heads), order)
    return query, key, value


def _packed(
    streams: Sequence[Projected],
    which: int,
    tables: Tables | None,
    exchange: Exchange,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """q, k or v as `Exchange.packed` gives it."""
    given = [stream.linear(which) for stream in streams]
    if not (_can_run(given[0], tables) and given[0].dtype == (dtype or given[0].dtype)):
        x = [stream.normalised(which, x) for stream, x in zip(streams, given, strict=True)]
        x[0] = x[0] if tables is None else rotate_pairs(x[0], *tables)
        return exchange.packed(torch.cat([part.to(dtype or part.dtype) for part in x], 1))
    read = [stream.readable(which, x) for stream, x in zip(streams, given, strict=True)]
    norms = [norm for norm in read if norm is not None and norm[:2] == (read[0] or norm)[:2]]
    if len(norms) < len(given):
        given = [stream.normalised(which, x).type_as(x) for stream, x in zip(streams, given, strict=True)]
        norms = [NO_NORM] * len(given)
    ranks = exchange.ranks
    return elementwise.to_ranks(given, norms, tables, ranks.count, ranks.heads(streams[0].heads).each)


def _can_run(x: torch.Tensor, tables: Tables | None) -> bool:
    """A kernel does it all for (b, l, h, d) like these, on CUDA and with tables that all samples share."""
    size = x.shape[1] * x.shape[3]
    return elementwise.can_run(x) and (tables is None or tables[0].numel() == tables[1].numel() == size)


def _normalised(stream: Projected, heads: Heads) -> Heads:
    """By the model's own modules."""
    query, key, value = heads
    return stream.normalised(0, query), stream.normalised(1, key), value


def _typed(heads: Heads) -> Heads:
    """Under autocast the norms compute in fp32; torch's own attention casts back by itself, ours takes one dtype."""
    query, key, value = heads
    return query.type_as(value), key.type_as(value), value


def _both(stream: Projected, query: torch.Tensor, key: torch.Tensor) -> Norm | None:
    """What the kernel must know of the norms; None where they must be called."""
    first, second = stream.readable(0, query), stream.readable(1, key)
    if first is None or second is None or first[:2] != second[:2]:
        return None
    assert first.kind != "none"
    assert first.weight is not None
    assert second.weight is not None
    biases = None if first.bias is None or second.bias is None else (first.bias, second.bias)
    return Norm(first.kind, first.eps, (first.weight, second.weight), biases)


def _readable(norm: Any, x: torch.Tensor, across: bool) -> OneNorm | None:
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
    return OneNorm(kind, norm.eps, weight, bias)
