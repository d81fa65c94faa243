"""FlashAttention-4's block-sparse entry (`flash-attn-4`, CuTe): the strongest rival on Hopper. Chosen only by name.

Idea: it takes two lists of key blocks for each row: whole ones, and ones that a rule decides pair by pair. Short blocks
    go into the second list, under the rule that a key must be a token; where only the tensor's end cuts a block, the
    second list is empty. Where there are holes, v is copied without what they held.
Cost: the lists are dense, (h, q_blocks, k_blocks) int32 each. The first call of each form compiles, some 10 s or more.
Limits: sm_90; fp16, bf16; head dim 64, 128; blocks of 64, 128; no windows, no bias.
Source: FlashAttention-4 (Dao-AILab, `flash_attn.cute`), version 4.0.0b36.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch

from .external import filled, kept_blocks, usable
from .problem import Problem, Rows, Verdict

HEAD_DIMS = (64, 128)
BLOCKS = (64, 128)


def can_run(problem: Problem) -> Verdict:
    """16-bit floats on Hopper, whole blocks of 64 and 128."""
    if not (verdict := usable(problem, "flash-attn-4", (torch.float16, torch.bfloat16), HEAD_DIMS)).ok:
        return verdict
    if problem.block not in (0, *BLOCKS):
        return Verdict(False, f"it has blocks of {', '.join(map(str, BLOCKS))}, not {problem.block}")
    return verdict


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Rows | None, scale: float, key_bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `vidaccel.kernels.attention` for shapes; `key_bias` is None."""
    if not q.numel() or not k.shape[1]:
        return q.new_zeros(q.shape), q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=torch.float32)
    return prepare(q, k, rows, scale)(q, k, v)


def prepare(
    q: torch.Tensor, k: torch.Tensor, rows: Rows | None, scale: float, *, finite: bool = False
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Make the lists of a mask, for tensors like q and k. Waits for the device once.

    With `finite` the holes of v hold numbers, and it need not be copied to fill them.
    """
    options: dict[str, Any] = {"softmax_scale": scale, "return_lse": True}
    token = query = None
    if rows is not None:
        whole, ruled, token = lists(rows, k.shape[1])
        query = filled(rows.q_len, rows.block, q.shape[1])
        query = None if bool(query.all()) else query
        tensors = import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
        options["block_sparse_tensors"] = tensors(*ruled, *whole, block_size=(rows.block, rows.block))
        if token is not None:
            options |= {"mask_mod": _rule(), "aux_tensors": [token.int().expand(q.shape[0], -1).contiguous()]}

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if token is not None and not finite:
            v = v.masked_fill(~token[:, :, None, None], 0)
        with torch.cuda.device_of(q):
            out, lse = import_module("flash_attn.cute").flash_attn_func(q, k, v, **options)
        if query is not None:
            out, lse = out.masked_fill(~query[:, None, None], 0), lse.masked_fill(~query, -torch.inf)
        return out.contiguous(), lse.contiguous()

    return call


Lists = tuple[torch.Tensor, torch.Tensor]


def lists(rows: Rows, lk: int) -> tuple[Lists, Lists, torch.Tensor | None]:
    """Whole and ruled key blocks of each row, and which keys (1 or b, lk) are tokens; None where all are.

    Lists are counts (1, h, q_blocks) and ascending block numbers (1, h, q_blocks, k_blocks), both int32.
    """
    token = filled(rows.k_len.reshape(-1, rows.k_blocks), rows.block, lk)
    kept = kept_blocks(rows)
    if bool(token.all()):
        # An empty list still has a column.
        none = kept.new_zeros(1, *kept.shape[:2], dtype=torch.int32)
        return _list(kept), (none, none[..., None]), None
    end = (torch.arange(rows.k_blocks, device=kept.device) + 1) * rows.block
    whole = (rows.k_len.reshape(-1, rows.k_blocks).amin(0) == rows.block) & (end <= lk)
    return _list(kept & whole), _list(kept & ~whole), token


def _list(kept: torch.Tensor) -> Lists:
    order = (~kept).byte().argsort(dim=-1, stable=True)
    return kept.sum(-1).int()[None], order.int()[None]


@lru_cache(maxsize=1)
def _rule() -> Any:
    """Keep a pair whose key is a token."""
    cutlass, utils = import_module("cutlass"), import_module("flash_attn.cute.utils")

    @import_module("cutlass.cute").jit
    def rule(b, h, q, k, lengths, tensors):  # type: ignore[no-untyped-def]
        token = tensors[0]
        return utils.scalar_to_ssa(token[b[0], k[0]], cutlass.Int32) > utils.scalar_to_ssa(0, cutlass.Int32)

    return rule
