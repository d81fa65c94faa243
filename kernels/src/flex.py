"""FlexAttention, compiled: torch's own block-sparse kernel, for comparison and where Triton kernels cannot go.

Idea: the block lists become a `BlockMask`, and the same rule is given once more as a `mask_mod`, so that the result is
right even where the lists are ignored, as uncompiled FlexAttention does.
Cost: compiling takes some 20 s for each shape; the lists are dense, (h, blocks, blocks) int32. Keys and values are
copied once, because holes must hold numbers here.
Limits: CUDA only, as compiled for CPUs it returns no LSE; blocks of 64 and 128; short and partial blocks evaluate the
rule for each pair. Chosen only by name.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention import flex_attention as flex

from ..window import inside
from .problem import Problem, Rows, Verdict

MOST_GRAPHS = 256


def can_run(problem: Problem) -> Verdict:
    """CUDA, in blocks that its templates can tile."""
    if problem.device.type == "cpu":
        return Verdict(False, "compiled for CPUs, FlexAttention returns no LSE")
    if problem.device.type != "cuda":
        return Verdict(False, f"it needs a GPU, the tensors are on {problem.device}")
    if problem.block and problem.block < 64:
        return Verdict(False, f"its tiles need blocks of 64 or more, not {problem.block}")
    if problem.dtype == torch.float64:
        return Verdict(False, "its templates have no float64")
    if problem.d < 16 or problem.d & (problem.d - 1):
        return Verdict(False, f"it needs a head dim that is a power of two and at least 16, not {problem.d}")
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
    lk = k.shape[1]
    lists = None
    if rows is not None:
        slots = torch.arange(lk, device=k.device)
        token = slots % rows.block < rows.k_len[..., slots // rows.block]
        hole = ~token.reshape(-1, lk, 1, 1)
        k, v = k.masked_fill(hole, 0), v.masked_fill(hole, 0)
        lists = block_mask(rows, lq, lk)
    score_mod = None
    if key_bias is not None:
        bias = key_bias.expand(b, h, lk)

        def score_mod(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
            return score + bias[b, h, k]

    out, lse = compiled()(*(x.transpose(1, 2) for x in (q, k, v)), score_mod, lists, scale)
    out = out.transpose(1, 2)
    if rows is not None:
        slots = torch.arange(lq, device=q.device)
        hole = slots % rows.block >= rows.q_len[slots // rows.block]
        out, lse = out.masked_fill(hole[:, None, None], 0), lse.masked_fill(hole, -torch.inf)
    return out.contiguous(), lse.contiguous()


@lru_cache(maxsize=1)
def compiled() -> Any:
    """FlexAttention with LSE, compiled once for each shape: (q, k, v, score_mod, block_mask, scale) in (b, h, l, d)."""

    def call(q: Any, k: Any, v: Any, score_mod: Any, block_mask: Any, scale: float) -> Any:
        options: Any = None
        if q.is_cuda and block_mask is not None and min(block_mask.BLOCK_SIZE) < 128:
            # Its own choice of tiles does not divide smaller blocks on every GPU.
            options = {"BLOCK_M": block_mask.BLOCK_SIZE[0], "BLOCK_N": block_mask.BLOCK_SIZE[1]}
        return flex.flex_attention(
            q, k, v, score_mod=score_mod, block_mask=block_mask, scale=scale, return_lse=True, kernel_options=options
        )

    # With fullgraph torch raises where it would otherwise give up compiling, and compute every pair in eager mode. Each
    # shape and window is a graph of its own.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    return torch.compile(call, dynamic=False, fullgraph=True)


def block_mask(rows: Rows, lq: int, lk: int) -> flex.BlockMask:
    """The block lists of a mask, and the rule that decides pairs of short and partial blocks."""
    block, heads, k_blocks = rows.block, rows.heads, rows.k_blocks
    device = rows.ptr.device
    kinds = rows.kinds(torch.arange(rows.n_full.shape[0], device=device)).view(heads, rows.q_blocks, k_blocks)
    k_len = rows.k_len.reshape(-1, k_blocks)
    samples = k_len.shape[0]
    lo, hi, pos, guards = rows.lo, rows.hi, rows.pos, rows.guards

    def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        kind = kinds[h if heads > 1 else 0, q // block, k // block]
        keep = kind == 2
        if lo is not None and pos is not None:
            keep = keep | ((kind == 1) & inside(lo[q], None if hi is None else hi[q], pos[k], guards))
        return keep & (k % block < k_len[b if samples > 1 else 0, k // block])

    # The full list skips the rule, so short blocks stay out of it; compiled for CPUs, flex fails to build with one.
    full_num = full_idx = None
    ruled = kinds > 0
    if device.type == "cuda":
        end = (torch.arange(k_blocks, device=device) + 1) * block
        full = (kinds == 2) & (k_len.amin(0) == block) & (end <= lk)
        ruled = ruled & ~full
        full_num, full_idx = _lists(full)
    num, idx = _lists(ruled)
    return flex.BlockMask.from_kv_blocks(
        num, idx, full_num, full_idx, BLOCK_SIZE=block, mask_mod=mask_mod, seq_lengths=(lq, lk)
    )


def _lists(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(h, q_blocks, k_blocks) bool -> how many blocks each row keeps, and which, both with an axis for the batch."""
    order = (~keep).byte().argsort(dim=-1, stable=True)
    return keep.sum(-1).int()[None], order.int()[None]
