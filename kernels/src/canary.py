"""A kernel's first result of each shape is checked on 64 rows, before anyone sees it.

The budget is not a tolerance that somebody picked: it is twice the error that a dense attention in the same precision
makes on the same rows, against fp64, plus the rounding of the result itself.
Source: the tests of FlashAttention use the same rule.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..errors import BackendError
from . import reference
from .problem import Rows

ROWS = 64
HEADS = 4


def possible(device: torch.device) -> bool:
    """The check reads its verdict back, which a CUDA graph under capture cannot do; a later call makes up for it."""
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


class Comparison(NamedTuple):
    """One tensor of a result against the reference.

    Attributes:
        name: "out" or "lse".
        error: largest absolute difference on the sampled rows; NaN if the result has NaN.
        budget: what is allowed; NaN if the input has NaN.
    """

    name: str
    error: float
    budget: float

    @property
    def ok(self) -> bool:
        """Within the budget."""
        return self.error <= self.budget


def compare(
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: Rows | None,
    scale: float,
    key_bias: torch.Tensor | None,
) -> list[Comparison]:
    """Compare a result (out, lse) with the reference on sampled rows of the problem it claims to solve.

    Waits for the device. Shapes as in `vidaccel.kernels.attention`; the sample is the same in every run.
    """
    generator = torch.Generator().manual_seed(0)
    # Somebody's default may be another device than the generator's.
    with torch.device(generator.device):
        sample = int(torch.randint(q.shape[0], (), generator=generator))
        heads = torch.randperm(q.shape[2], generator=generator)[:HEADS].to(q.device)
        slots = torch.randint(q.shape[1], (ROWS // len(heads),), generator=generator).to(q.device)

    q, k, v, out, lse = (x[sample : sample + 1] for x in (q, k, v, out, lse))
    if rows is not None and rows.k_len.ndim == 2 and rows.k_len.shape[0] > 1:
        rows = rows._replace(k_len=rows.k_len[sample])
    if key_bias is not None and key_bias.shape[0] > 1:
        key_bias = key_bias[sample : sample + 1]
    exact = reference.sampled(q, k, v, rows, scale, key_bias, slots, heads, torch.float64)
    near = reference.sampled(q, k, v, rows, scale, key_bias, slots, heads, q.dtype)
    out, lse = out[:, slots][:, :, heads], lse[:, heads][:, :, slots]
    return [
        Comparison("out", largest_error(out, exact[0]), error_budget(exact[0], near[0], out.dtype)),
        Comparison("lse", largest_error(lse, exact[1]), error_budget(exact[1], near[1], lse.dtype, least=1.0)),
    ]


def check(comparisons: list[Comparison], what: str) -> None:
    """Raise if a result is wrong.

    Args:
        comparisons: from `compare`.
        what: kernel, layer and shape, for the message.

    Raises:
        BackendError: NaN in the input, or a result beyond its budget.
    """
    if any(math.isnan(x.budget) for x in comparisons):
        raise BackendError(
            f"the input of {what} has NaN: an earlier layer, the weights or the latents went wrong, not this kernel. "
            "Run the pipeline without acceleration to find where NaN begins; fp16 overflow is the usual cause, try bf16"
        )
    for x in comparisons:
        if not x.ok:
            raise BackendError(
                f"{what} is wrong: {x.name} is off by {x.error:.2g} where {x.budget:.2g} is allowed on {ROWS} sampled "
                "rows. Choose another backend, and please report this with the output of `vidaccel doctor`"
            )


def largest_error(x: torch.Tensor, true: torch.Tensor) -> float:
    """Largest absolute difference; equal infinities differ by 0, NaN stays NaN."""
    return float(torch.where(x == true, 0, (x.double() - true).abs()).max())


def error_budget(true: torch.Tensor, near: torch.Tensor, dtype: torch.dtype, least: float = 0.0) -> float:
    """What a result in `dtype` may be off by.

    Args:
        true: the result in fp64.
        near: the same computed in low precision.
        dtype: what the result is stored in.
        least: the size below which results are not resolved; 1 for logarithms, whose error does not shrink with them.

    Returns:
        Twice the error of `near`, plus one rounding in `dtype` and a few in fp32, the precision of every accumulator.
    """
    size = max(least, float(torch.where(true.abs() == torch.inf, 0, true.abs()).max()))
    rounding = torch.finfo(dtype).eps + 8 * torch.finfo(torch.float32).eps
    return 2 * largest_error(near, true) + rounding * size
