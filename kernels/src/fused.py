"""What the fused kernels around attention share. Where they cannot run, torch does the same in more passes."""

from __future__ import annotations

from importlib.util import find_spec

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Asked once, here: functions that a compiled model traces may only read the answer.
try:
    HAS_TRITON = find_spec("triton") is not None
except ImportError:
    HAS_TRITON = False


def can_run(*tensors: torch.Tensor) -> bool:
    """All are on a GPU, and of a type that the kernels know."""
    return on_gpu(*tensors) and all(x.dtype in DTYPES for x in tensors)


def on_gpu(*tensors: torch.Tensor) -> bool:
    """All are where Triton runs. So are tensors without memory, which stand for such."""
    return HAS_TRITON and all(x.is_cuda or x.is_meta for x in tensors)


def power_of_two(n: int) -> int:
    """The least that is n or more: lengths of Triton's tiles."""
    return 1 << (n - 1).bit_length()
