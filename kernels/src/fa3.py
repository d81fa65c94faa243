"""FlashAttention-3 without a mask, from the wheel `fa3-fwd`: the dense kernel that sparse ones are measured against.

Limits: sm_90, bf16, no mask, no bias. Chosen only by name.
Source: FlashAttention-3 (arXiv 2407.08608).
"""

from __future__ import annotations

from importlib import import_module

import torch

from .external import usable
from .problem import Problem, Rows, Verdict

HEAD_DIMS = (64, 96, 128, 192, 256)


def can_run(problem: Problem) -> Verdict:
    """bf16 on Hopper, every pair."""
    if not (verdict := usable(problem, "fa3-fwd", (torch.bfloat16,), HEAD_DIMS)).ok:
        return verdict
    if problem.block:
        return Verdict(False, "it keeps every pair, and a mask was given")
    return verdict


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Rows | None, scale: float, key_bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `vidaccel.kernels.attention` for shapes; `rows` and `key_bias` are None."""
    if not q.numel() or not k.shape[1]:
        return q.new_zeros(q.shape), q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=torch.float32)
    with torch.cuda.device_of(q):
        attend = import_module("fa3_fwd_interface").flash_attn_func
        out, lse = attend(q, k, v, softmax_scale=scale, return_attn_probs=True)
    return out.contiguous(), lse.contiguous()
