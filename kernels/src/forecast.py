"""Weighted sums of a few large tensors, and how far such a sum is from the truth: each in one pass over memory.

Idea: a forecast of features is a handful of multiply-adds an element, so that its cost is reading the terms and writing
    the result once; torch would also write and read fp32 in between.
Math: out = sum_i w_i t_i;  errors: sum |sum_i w_i t_i - actual| and sum |reference| of each sample.
Cost: terms + 1 tensors cross memory. Errors are summed in fp32 over 64 Ki elements, and these sums in fp64: parts and
    order depend on sizes alone, so that equal inputs give equal bits on any GPU.
Limits: fp16, bf16, fp32, contiguous terms, at most five. `can_run` tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from . import fused

MOST_TERMS = 5
_TILE = 2048
_TILES = 32


def can_run(terms: Sequence[torch.Tensor], *others: torch.Tensor) -> bool:
    """The kernels serve such terms, and others beside them; elsewhere torch does the same."""
    same = all(x.dtype == terms[0].dtype and x.is_contiguous() for x in terms)
    return same and len(terms) <= MOST_TERMS and fused.can_run(*terms, *others)


def weighted_sum(terms: Sequence[torch.Tensor], weights: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """The weighted sum of equally shaped tensors, in `dtype`, added up in fp32."""
    out = torch.empty_like(terms[0], dtype=dtype)
    size = out.numel()
    if size:
        with torch.cuda.device_of(out):
            _kernels().weighted_sum[(-(-size // _TILE),)](
                *_padded(terms, weights), out, size, TERMS=len(terms), TILE=_TILE, num_warps=8
            )
    return out


def error_sums(
    terms: Sequence[torch.Tensor], weights: Sequence[float], actual: torch.Tensor, reference: torch.Tensor | None
) -> torch.Tensor:
    """(2, b) fp64: sums of |weighted sum - actual| and |reference| of each sample; no reference is the actual.

    All tensors are (b, ...) of one shape; `actual` and `reference` may have any strides.
    """
    samples = actual.shape[0]
    size = actual.numel() // max(1, samples)
    parts = -(-size // (_TILE * _TILES))
    sums = actual.new_zeros((samples, parts, 2), dtype=torch.float32)
    if size:
        actual = actual.contiguous()
        with torch.cuda.device_of(actual):
            _kernels().error_sums[parts, samples](
                *_padded(terms, weights),
                actual,
                actual if reference is None else reference.contiguous(),
                sums,
                size,
                TERMS=len(terms),
                TILE=_TILE,
                TILES=_TILES,
                SAME=reference is None,
                num_warps=8,
            )
    return sums.sum(1, dtype=torch.float64).T


def _padded(terms: Sequence[torch.Tensor], weights: Sequence[float]) -> list[Any]:
    """Arguments of a kernel, which has a fixed number of terms; those beyond ours are not read."""
    spare = MOST_TERMS - len(terms)
    return [*terms, *[terms[0]] * spare, *map(float, weights), *[0.0] * spare]


@lru_cache(maxsize=1)
def _kernels() -> Any:
    from . import forecast_kernel

    return forecast_kernel
