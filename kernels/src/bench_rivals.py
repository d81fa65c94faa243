"""What `bench` compares: this package's kernels, torch's, and other projects' where they are installed.

What a kernel needs once for a mask (lists, plans, compilation, the order of its tensors) is made in its first call,
which is the check; what is timed is the kernel.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple, cast

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..blocks import BlockMask
from . import fa4, fastvideo, flashinfer, flex
from .attention import attention, backends
from .problem import Problem, Rows

# This package's sparse backends that are timed.
OURS = ("cpu", "gluon", "tma", "portable")
# Other projects' kernels, by the name of their row.
PACKAGES = {
    "dense flash3": "fa3-fwd",
    "fa4": "flash-attn-4",
    "flashinfer": "flashinfer-python",
    "fastvideo": "fastvideo-kernel",
}

# What a wheel for another torch or CUDA raises when its library is loaded.
LOADING = (ImportError, OSError, RuntimeError)

Call = Callable[[], tuple[torch.Tensor, torch.Tensor | None]]


class Rival(NamedTuple):
    """A kernel and the problem that it solves.

    Attributes:
        name: as printed; those that compute every pair, and only those, begin with "dense".
        call: gives (out, lse); lse is None where the kernel has none.
        problem: q, k, v and rows, for the check; dense ones have no rows.
    """

    name: str
    call: Call
    problem: tuple[torch.Tensor, torch.Tensor, torch.Tensor, Rows | None]


def absent() -> dict[str, str]:
    """Other projects' kernels that will have no row, and what to do about it."""
    found = {}
    for name, package in PACKAGES.items():
        try:
            version(package)
        except PackageNotFoundError:
            found[name] = f"{package} is not installed; pip install {package}"
    if "dense flash3" not in found:
        try:
            _flash3()
        except LOADING as problem:
            found["dense flash3"] = f"{PACKAGES['dense flash3']} does not load here: {problem}"
    return found


def rivals(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask) -> list[Rival]:
    """Every kernel that can run a problem: q, k, v (1, slots, h, d), whose holes hold numbers, and its mask."""
    rows = Rows.of(mask)
    # Dense kernels see the tokens alone, without holes.
    tokens = [mask.layout.to_model(x) for x in (q, k, v)]
    whole = (tokens[0], tokens[1], tokens[2], None)

    def ours(backend: str) -> Rival:
        return Rival(backend, lambda: attention(q, k, v, mask, backend=backend), (q, k, v, rows))

    if q.device.type == "cpu":
        return [Rival("dense", _torch_dense(tokens, None), whole), ours("cpu")]
    problem = Problem.of(q, k, rows, None)
    verdicts = backends(problem)
    found = [
        Rival("dense cudnn", _torch_dense(tokens, SDPBackend.CUDNN_ATTENTION), whole),
        Rival("dense flash2", _torch_dense(tokens, SDPBackend.FLASH_ATTENTION), whole),
        *(ours(name) for name in OURS if verdicts[name].ok),
    ]
    with contextlib.suppress(*LOADING):
        found.insert(0, Rival("dense flash3", _dense(_flash3(), tokens), whole))
    # As holes hold numbers, nobody copies to fill them; what comes out for queries in holes is looked at nowhere.
    filled = rows._replace(q_len=torch.full_like(rows.q_len, rows.block))
    found.append(Rival("flex", _prepared(lambda: _flex(q, k, v, rows)), (q, k, v, filled)))
    # Each gets its tensors in the order it wants, so that it need not copy them.
    if verdicts["fa4"].ok:
        found.append(Rival("fa4", _prepared(lambda: _fa4(q, k, v, filled)), (q, k, v, filled)))
    if verdicts["flashinfer"].ok:
        found.append(Rival("flashinfer", _prepared(lambda: _flashinfer(q, k, v, rows)), (q, k, v, rows)))
    if fastvideo.can_run(problem).ok:
        found.append(Rival("fastvideo", _prepared(lambda: _fastvideo(q, k, v, rows)), (q, k, v, filled)))
    return found


def _prepared(make: Callable[[], Call]) -> Call:
    made = lru_cache(maxsize=1)(make)
    return lambda: made()()


def _fa4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Rows) -> Call:
    attend = fa4.prepare(q, k, rows, q.shape[-1] ** -0.5, finite=True)
    return lambda: attend(q, k, v)


def _heads_apart(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(b, l, h, d), in memory (b, h, l, d)."""
    return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors)


def _flashinfer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Rows) -> Call:
    plan = flashinfer.Plan(q, k, rows, rows.k_len.reshape(-1), q.shape[-1] ** -0.5)
    tokens = [x.contiguous() for x in plan.tokens(q[0], k[0], v[0])]

    def call() -> tuple[torch.Tensor, None]:
        found, _ = plan.attend(*tokens)
        if plan.queries is None:
            return found.transpose(0, 1)[None], None
        # Without holes in its tensors it cannot write with them either.
        out = torch.zeros_like(q)
        plan.place(found, out[0])
        return out, None

    return call


def _fastvideo(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Rows) -> Call:
    attend = fastvideo.prepare(q, k, rows)
    spare = -q.shape[1] % rows.block
    tensors = _heads_apart(*(functional.pad(x, (0, 0, 0, 0, 0, spare)) for x in (q, k, v)))
    return lambda: (attend(*tensors)[:, : q.shape[1]], None)


def _flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Rows) -> Call:
    lists = flex.block_mask(rows, q.shape[1], q.shape[1])
    views = [x.transpose(1, 2) for x in (q, k, v)]

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = flex.compiled()(*views, None, lists, q.shape[-1] ** -0.5)
        return out.transpose(1, 2), lse

    return call


def _torch_dense(tokens: list[torch.Tensor], backend: SDPBackend | None) -> Callable[[], tuple[torch.Tensor, None]]:
    query, key, value = (x.transpose(1, 2) for x in tokens)

    def call() -> tuple[torch.Tensor, None]:
        with sdpa_kernel(backend) if backend else contextlib.nullcontext():
            return functional.scaled_dot_product_attention(query, key, value).transpose(1, 2), None

    return call


def _flash3() -> Callable[..., Any]:
    return cast(Callable[..., Any], importlib.import_module("fa3_fwd_interface").flash_attn_func)


def _dense(flash: Callable[..., Any], tokens: list[torch.Tensor]) -> Callable[[], tuple[torch.Tensor, None]]:
    def call() -> tuple[torch.Tensor, None]:
        out = flash(*tokens)
        return out[0] if isinstance(out, tuple) else out, None

    return call
