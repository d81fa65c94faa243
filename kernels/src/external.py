"""What the adapters to other projects' kernels share. They serve comparison, and are chosen only by name.

The sparse ones have `prepare(q, k, rows, scale) -> call(q, k, v) -> (out, lse)`: lists and plans are made in `prepare`,
which may wait for the device, so that a benchmark can time them apart from the kernel. `run` does both.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

from .problem import Problem, Rows, Verdict


def usable(
    problem: Problem, package: str, dtypes: tuple[torch.dtype, ...], head_dims: tuple[int, ...], *, newer: bool = False
) -> Verdict:
    """What all of them need: the package, a Hopper GPU (or with `newer` a later one), a dtype, a head dim, no bias."""
    try:
        version(package)
    except PackageNotFoundError:
        return Verdict(False, f"{package} is not installed; pip install {package}")
    if problem.device.type != "cuda" or torch.version.hip is not None:
        return Verdict(False, f"it needs an NVIDIA GPU, the tensors are on {problem.device}")
    capability = torch.cuda.get_device_capability(problem.device)
    if capability < (9, 0) or (capability != (9, 0) and not newer):
        return Verdict(False, f"it is used on compute capability 9.0, this GPU has {capability[0]}.{capability[1]}")
    if problem.dtype not in dtypes:
        names = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return Verdict(False, f"it computes in {names}, not {problem.dtype}")
    if problem.d not in head_dims:
        return Verdict(False, f"it has head dims {', '.join(map(str, head_dims))}, not {problem.d}")
    if problem.bias:
        return Verdict(False, "it adds no bias to keys")
    if problem.partial:
        return Verdict(False, "it keeps whole blocks, and this mask has blocks that are decided token by token")
    return Verdict(True)


def kept_blocks(rows: Rows) -> torch.Tensor:
    """(mask heads, q_blocks, k_blocks) bool."""
    every = torch.arange(rows.n_full.shape[0], device=rows.ptr.device)
    return rows.kinds(every).view(rows.heads, rows.q_blocks, rows.k_blocks) > 0


def filled(lengths: torch.Tensor, block: int, slots: int) -> torch.Tensor:
    """(..., slots) bool, which slots hold tokens, for lengths (..., blocks)."""
    slot = torch.arange(slots, device=lengths.device)
    return slot % block < lengths[..., slot // block]
