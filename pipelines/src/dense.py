"""Dense attention on the backend that the user has chosen in diffusers, where diffusers' own processors do not do it.

They cannot where padded text should fall away without a mask. On several ranks they can for video without text, but ask
each other for sizes in each layer, which torch.compile cannot trace, and project while nothing travels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn

from ..exchange import Exchange
from ..family import Family


class DenseOnRanks(Family):
    """A family whose dense layers share their heads among ranks as its sparse ones do."""

    def dense(
        self,
        attn: Any,
        processor: Any,
        valid: tuple[torch.Tensor, ...] | None,
        exchange: Exchange | None,
        *inputs: Any,
        **kwargs: Any,
    ) -> Any:
        """See `Family.dense`; on several ranks, the attention of diffusers on the user's own backend."""
        if exchange is None:
            return super().dense(attn, processor, valid, exchange, *inputs, **kwargs)
        heads = self.project(attn, exchange.whole, *inputs, exchange)
        out = exchange.leave(attend_to_valid(heads, exchange.text, valid, processor), attn.heads)
        return self.output(attn, out, *inputs)


def attend_to_valid(
    streams: Sequence[torch.Tensor], text: int, valid: tuple[torch.Tensor, ...] | None, processor: Any
) -> torch.Tensor:
    """Dense attention on a processor's backend, without padded text and so without a mask.

    Args:
        streams: q, k, v (b, tokens, h, d), in model order.
        text: how many of the tokens are text.
        valid: numbers of the valid text tokens of each sample, or of all samples; None where all is valid.
        processor: diffusers' own, which may name a backend.

    Returns:
        (b, tokens, h, d); padded text attends to nothing, so zeros are its output.
    """
    outs = []
    # Samples whose texts differ in length attend one by one.
    for n, own in enumerate(valid or (None,)):
        padding = 0 if own is None else text - len(own)
        sample = slice(n, n + 1) if valid and len(valid) > 1 else slice(None)
        query, key, value = (x[sample, : x.shape[1] - padding] for x in streams)
        out = dispatch_attention_fn(query, key, value, backend=getattr(processor, "_attention_backend", None))
        outs.append(torch.nn.functional.pad(out, (0, 0, 0, 0, 0, padding)))
    return torch.cat(outs)
