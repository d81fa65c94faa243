"""Sparse attention on CPUs: gather the kept keys, then let torch's own flash attention run on them.

Idea: query blocks that keep equally many keys form a batch without padding, so that a few large calls do all the work.
Cost: 4 d flops a kept pair, plus one copy of the kept keys and values of every query block. That copy is why small
blocks gain less: only `block` queries share it.
Limits: none in dtype and head dim; the gain begins at about 1,000 tokens.
"""

from __future__ import annotations

import torch

from . import gather
from .problem import Problem, Rows, Verdict

# Gathered keys and values of one step. Smaller chunks stay in cache but gain nothing for it, and after every step all
# threads wait for the slowest, which costs much as soon as anything else runs on the machine.
CHUNK_BYTES = 32 * 2**20

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def can_run(problem: Problem) -> Verdict:
    """Any float tensor on a CPU."""
    if problem.device.type != "cpu":
        return Verdict(False, f"the tensors are on {problem.device}")
    return Verdict(True)


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: Rows | None,
    scale: float,
    key_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `vidaccel.kernels.attention` for shapes."""
    b, lq, h, _ = q.shape
    if not q.numel() or not k.shape[1]:
        # torch's own kernel divides by these sizes.
        return q.new_zeros(q.shape), q.new_full((b, h, lq), -torch.inf, dtype=torch.float32)
    if rows is None:
        out, lse = _attend(q, k, v, scale, None if key_bias is None else key_bias[:, :, None])
        return out.contiguous(), lse.contiguous()
    out = q.new_zeros(q.shape)
    lse = q.new_full((b, lq, h), -torch.inf, dtype=torch.float32)
    for sample in range(b):
        own, bias = rows, None
        if rows.k_len.ndim == 2:
            own = rows._replace(k_len=rows.k_len[min(sample, rows.k_len.shape[0] - 1)])
        if key_bias is not None:
            bias = key_bias[min(sample, key_bias.shape[0] - 1)].T.expand(-1, h)
        _run_sample(q[sample], k[sample], v[sample], own, scale, bias, out[sample], lse[sample])
    return out, lse.transpose(1, 2).contiguous()


def _run_sample(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: Rows,
    scale: float,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """q, k, v (l, h, d) and bias (lk, h) of one sample; fills out (lq, h, d) and lse (lq, h)."""
    lq, h, d = q.shape
    plan = gather.plan(rows, h, lq, k.shape[0])
    # Heads that share rows travel together as one wide token; otherwise the tokens of each head are gathered apart.
    wide = h if rows.heads == 1 else 1
    bias = None if bias is None else bias.reshape(-1, wide)
    # One copy of keys and values side by side halves the number of gathers.
    pairs = torch.cat([k, v], -1).view(-1, wide, 2 * d)
    chunk = CHUNK_BYTES // (pairs[0].numel() * q.element_size())
    parts = [part for group in plan.groups for part in group.parts(chunk // group.keys.shape[1])]
    # Fresh memory for every part would cost as much as the copy itself, in page faults.
    room = pairs.new_empty(max((part.keys.numel() for part in parts), default=0), wide, 2 * d)
    queries = q.reshape(-1, wide, d).index_select(0, plan.queries).split([part.queries.numel() for part in parts])
    results = []
    for part, part_q in zip(parts, queries, strict=True):
        n, tq = part.queries.shape
        picked = part.keys.flatten()
        part_pairs = torch.index_select(pairs, 0, picked, out=room[: len(picked)])
        part_k, part_v = part_pairs.view(n, -1, wide, 2 * d).split(d, -1)
        logits = None if bias is None else bias[picked].view(n, 1, -1, wide).permute(0, 3, 1, 2)
        if part.full is not None:
            window = gather.window_bias(rows, part, h) if part.window is None else part.window
            logits = window if logits is None else logits + window
        part_out, part_lse = _attend(part_q.view(n, tq, wide, d), part_k, part_v, scale, logits)
        results.append((part_out.reshape(-1, wide, d), part_lse.transpose(1, 2).reshape(-1, wide)))
    if results:
        outs, lses = zip(*results, strict=True)
        out.view(-1, wide, d).index_copy_(0, plan.queries, torch.cat(outs))
        lse.view(-1, wide).index_copy_(0, plan.queries, torch.cat(lses))


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, logits: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention of (b, l, h, d) tensors, with lse (b, h, lq); `logits` is added to the (b, h, lq, lk) logits."""
    if logits is not None:
        # torch takes an fp32 mask for fp64 tensors and reads it wrongly.
        logits = logits.to(torch.promote_types(q.dtype, torch.float32))
    out, lse = _flash(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=logits, scale=scale)
    lse = lse.float()
    if logits is not None:
        # torch reports 0, not -inf, for a query that keeps nothing.
        lse = lse.masked_fill(logits.amax(-1) == -torch.inf, -torch.inf)
    return out.transpose(1, 2), lse
