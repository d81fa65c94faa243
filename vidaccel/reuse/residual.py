"""Attention to what a choice of blocks leaves out: computed with everything, and used again at later steps.

Math: see `patterns.flashblock`; everything is computed with the mask of all blocks, so that holes and padding stay out.
"""

from __future__ import annotations

import torch

from ..blocks import BlockMask
from ..grid import TokenLayout
from ..kernels.attention import attention
from ..kernels.merge import merge
from ..patterns.plan import Choice, Plan
from .flashblock import late_error
from .selection import only_heads, rectangle

# A part's share of attention below which rounding would be all that is left of it.
_LEAST = 1e-4

Part = tuple[torch.Tensor, torch.Tensor]


def completed(
    plan: Plan,
    choice: Choice,
    is_held: bool,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    kept: Part,
    *,
    scale: float,
    key_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, Choice]:
    """Attention to everything, of which the part outside of a choice may be an earlier step's.

    Args:
        plan: with a `residual`.
        choice: what was chosen, now or at an earlier step.
        is_held: at an earlier step; its rest serves heads whose error is small.
        qkv: each (1, slots, h, d), batches folded into heads.
        kept: attention to the choice now, (1, slots, h, d) and (1, h, slots).
        scale: of the logits.
        key_bias: as in `attention`.

    Returns:
        (1, slots, h, d), and the choice with its rest. What is held is written in place.
    """
    residual = plan.residual
    assert residual is not None
    q, k, v = qkv
    out, lse = kept
    whole = _everything(plan.layout, plan.layout)
    if not is_held or choice.rest is None:
        full = attention(q, k, v, whole, scale=scale, key_bias=key_bias, counted=False)
        spent = torch.ones((), device=q.device)
        return full[0], choice._replace(rest=rest(full, kept), spent=spent)
    rows = residual.rows
    everything = _everything(residual.few, plan.layout)
    now, _ = attention(q[:, rows], k, v, everything, scale=scale, key_bias=key_bias, counted=False)
    late, _ = merge(out[:, rows], lse[:, :, rows], choice.rest[0][:, rows], choice.rest[1][:, :, rows])
    wanted = late_error(now, late)[0] >= residual.threshold
    full = attention(q, k, v, only_heads(whole, wanted), scale=scale, key_bias=key_bias, counted=False)
    new, there = rest(full, kept), wanted[:, None]
    choice.rest[0].copy_(torch.where(there, new[0], choice.rest[0]))
    choice.rest[1].copy_(torch.where(there, new[1], choice.rest[1]))
    spent = residual.kept + (1 - residual.kept) * wanted.float().mean()
    return merge(out, lse, *choice.rest)[0], choice._replace(spent=spent)


def rest(everything: Part, kept: Part) -> Part:
    """Attention to what `kept` leaves out of `everything`: out (b, l, h, d); lse (b, h, l), -inf where that is nothing.

    Rows that `everything` did not compute (-inf) give nothing.
    """
    share = torch.exp(kept[1] - everything[1]).nan_to_num(1.0).clamp(max=1.0)
    left = 1 - share
    is_none = left < _LEAST
    lse = torch.where(is_none, -torch.inf, everything[1] + torch.log(left.clamp(min=_LEAST)))
    weight, less = (x.transpose(1, 2)[..., None] for x in (share, left.clamp(min=_LEAST)))
    out = (everything[0].float() - weight * kept[0].float()) / less
    out = torch.where(is_none.transpose(1, 2)[..., None], 0, out)
    return out.to(everything[0].dtype), lse


def _everything(queries: TokenLayout, keys: TokenLayout) -> BlockMask:
    """Every block of keys for every block of queries."""
    every = torch.arange(keys.blocks, device=keys.device)
    return rectangle(every.expand(1, queries.blocks, -1), queries, keys.k_len)
