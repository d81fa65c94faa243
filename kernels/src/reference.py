"""Masked softmax attention spelled out in fp32: the definition that every backend is tested against.

Math:
    s[i, j] = scale * <q[i], k[j]> + key_bias[j]        for kept pairs (i, j), -inf for all others
    lse[i]  = log sum_j exp(s[i, j])
    out[i]  = sum_j exp(s[i, j] - lse[i]) v[j]
    A query that keeps nothing, and a hole, give out = 0 and lse = -inf.
Cost: 4 lq lk d flops a head whatever the mask keeps, and a (h, block, lk) matrix at a time.
Limits: none; fp64 inputs are computed in fp64. On CUDA it follows torch's own setting for TF32.
"""

from __future__ import annotations

import torch

from ..window import inside
from .problem import Problem, Rows, Verdict


def can_run(problem: Problem) -> Verdict:
    """Everything, slowly."""
    return Verdict(True)


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: Rows | None,
    scale: float,
    key_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All queries, one block at a time. See `vidaccel.kernels.attention` for shapes."""
    block = rows.block if rows else 128
    heads = torch.arange(q.shape[2], device=q.device)
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    for start in range(0, q.shape[1], block):
        slots = torch.arange(start, min(start + block, q.shape[1]), device=q.device)
        block_out, block_lse = sampled(q, k, v, rows, scale, key_bias, slots, heads)
        out[:, slots], lse[:, :, slots] = block_out.to(out.dtype), block_lse.to(lse.dtype)
    return out, lse


def sampled(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: Rows | None,
    scale: float,
    key_bias: torch.Tensor | None,
    slots: torch.Tensor,
    heads: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some queries of some heads, so that a problem of any size can be checked.

    `slots` (n,) and `heads` (m,) say which; the other tensors are the whole problem. `dtype` is the precision of the
    two products: by default fp32, or fp64 for fp64 inputs. A lower one makes the rounding errors of a dense attention
    in that precision, which are the scale of every error budget.

    Returns:
        out (b, n, m, d) and lse (b, m, n), in `dtype`, or in fp32 where that is lower.
    """
    dtype = dtype or torch.promote_types(q.dtype, torch.float32)
    high = torch.promote_types(dtype, torch.float32)
    q, k, v = (x.index_select(2, heads).transpose(1, 2) for x in (q.index_select(1, slots), k, v))
    keep = kept(rows, slots, heads, k.shape[2])
    # Keys that none of these queries keeps may hold anything, and 0 x NaN is NaN.
    unused = ~keep.any(-2)[..., None]
    k, v = (x.masked_fill(unused, 0).to(dtype) for x in (k, v))
    # What the caller lets torch do in 16 bits is not for the definition.
    with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):
        # Scaled first: products may pass the largest number of fp16, in which a kernel adds nothing up.
        scores = ((q.to(dtype) * scale) @ k.transpose(-1, -2)).to(high)
        if key_bias is not None:
            bias = key_bias if key_bias.shape[1] == 1 else key_bias.index_select(1, heads)
            scores = scores + bias[:, :, None].to(high)
        scores = scores.masked_fill(~keep, -torch.inf)
        lse = scores.logsumexp(-1)
        weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
        return (weights.to(dtype) @ v).transpose(1, 2).to(high), lse


def kept(rows: Rows | None, slots: torch.Tensor, heads: torch.Tensor, lk: int) -> torch.Tensor:
    """(b or 1, m or 1, n, lk) bool: the keys that n queries of m heads keep."""
    if rows is None:
        return torch.ones(1, 1, len(slots), lk, dtype=torch.bool, device=slots.device)
    block, key = rows.block, torch.arange(lk, device=slots.device)
    head = heads if rows.heads > 1 else heads[:1] * 0
    row = head[:, None] * rows.q_blocks + slots // block
    kind = rows.kinds(row).repeat_interleave(block, -1)[..., :lk]
    keep = kind == 2
    if rows.lo is not None and rows.pos is not None:
        hi = None if rows.hi is None else rows.hi[slots, None]
        keep = keep | ((kind == 1) & inside(rows.lo[slots, None], hi, rows.pos, rows.guards))
    q_token = slots % block < rows.q_len[slots // block]
    k_token = key % block < rows.k_len[..., key // block]
    return keep & q_token[:, None] & k_token.reshape(-1, 1, 1, lk)
