"""FastVideo's block-sparse kernel (`fastvideo-kernel`), for the benchmark only.

Idea: lists of key blocks for each row, and how many keys of each block are tokens. On Hopper it is written in
    ThunderKittens where the package's library loads, in Triton elsewhere; the package chooses.
Cost: the lists are dense, (b, h, q_blocks, k_blocks) int32; tensors are copied unless they are contiguous as
    (b, h, l, d) and as long as their blocks.
Limits: sm_90 and up; bf16; head dim 64, 128; blocks of 64; logits scaled by 1 / sqrt(d); every row keeps a block; the
    same lengths for all samples; no windows, no bias. Its LSE has another base in each of its kernels, and is not used.
    For these it is no backend of `attention`.
Source: Video Sparse Attention (arXiv 2505.13389), `fastvideo-kernel` 0.3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch

from .external import kept_blocks, usable
from .problem import Problem, Rows, Verdict

HEAD_DIMS = (64, 128)
BLOCK = 64


def can_run(problem: Problem) -> Verdict:
    """bf16, whole blocks of 64, one mask for all samples."""
    if not (verdict := usable(problem, "fastvideo-kernel", (torch.bfloat16,), HEAD_DIMS, newer=True)).ok:
        return verdict
    if problem.block != BLOCK:
        return Verdict(False, f"it has blocks of {BLOCK}, not {problem.block or 'none'}")
    if problem.per_sample:
        return Verdict(False, "it has the same lengths for all samples")
    return verdict


def prepare(
    q: torch.Tensor, k: torch.Tensor, rows: Rows
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Make the lists of a mask, for tensors like q and k. Holes must hold numbers.

    Returns:
        A function of q (b, lq, h, d), k and v (b, lk, h, d) that gives out (b, lq, h, d).
    """
    attend = import_module("fastvideo_kernel").block_sparse_attn_from_indices
    batch, lq, heads, _ = q.shape
    kept = kept_blocks(rows).expand(heads, -1, -1)
    count = kept.sum(-1).int().expand(batch, -1, -1).contiguous()
    index = (~kept).byte().argsort(dim=-1, stable=True).int().expand(batch, -1, -1, -1).contiguous()
    lengths = rows.k_len.reshape(-1).int()

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with torch.cuda.device_of(q):
            out: torch.Tensor = attend(*(_whole(x) for x in (q, k, v)), index, count, lengths)[0]
        return out.transpose(1, 2)[:, :lq]

    return call


def _whole(x: torch.Tensor) -> torch.Tensor:
    """(b, l, h, d) -> (b, h, l, d) of whole blocks, contiguous; zeros follow."""
    if spare := -x.shape[1] % BLOCK:
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, spare))
    return x.transpose(1, 2).contiguous()
