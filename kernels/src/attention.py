"""`attention(q, k, v, mask) -> (out, lse)`: the one primitive that everything else is built on.

It is a `torch.library` op of tensors, small ints and a backend's name, so that a compiled model sees one opaque call:
the backend is chosen, recorded and checked inside the op, at run time, whatever graph it stands in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Protocol, cast

import torch

from .. import trace
from ..blocks import BlockMask
from ..errors import BackendError, MaskError
from . import canary, portable
from .problem import Problem, Rows, Verdict

logger = logging.getLogger(__name__)

BACKENDS = {
    "cpu": ".cpu",
    "fa3": ".fa3",
    "fa4": ".fa4",
    "flashinfer": ".flashinfer",
    "flex": ".flex",
    "gluon": ".gluon",
    "portable": ".portable",
    "reference": ".reference",
    "tma": ".tma",
}
# What `auto` tries, in this order. The reference runs anything and comes last.
PREFERRED = {"cpu": ("cpu", "reference"), "cuda": ("gluon", "portable", "reference")}


class Backend(Protocol):
    """A module that can compute attention."""

    def can_run(self, problem: Problem) -> Verdict:
        """Whether it can, decided without touching the GPU."""

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rows: Rows | None,
        scale: float,
        key_bias: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute it. Shapes as in `attention`; the result must be contiguous."""


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask | None = None,
    *,
    scale: float | None = None,
    key_bias: torch.Tensor | None = None,
    backend: str = "auto",
    counted: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the pairs that a block mask keeps.

    Args:
        q: (b, lq, h, d) in kernel order: block i holds slots [i * block, (i + 1) * block), of which the first
            `q_len[i]` are tokens. Holes may hold anything. Any strides.
        k: (b, lk, h, d), likewise, with `k_len`.
        v: (b, lk, h, d).
        mask: the kept blocks, with 1 head or h; None keeps every pair of the tokens given.
        scale: of the logits, above 0; default 1 / sqrt(d).
        key_bias: (b or 1, h or 1, lk) fp32, added to the logits of each key; -inf drops it.
        backend: one of `BACKENDS`, or "auto". A named backend runs or raises; it is never replaced.
        counted: the trace has this call as a layer's; it has one of each, and some layers make more.

    Returns:
        out (b, lq, h, d) in the dtype of q, and lse (b, h, lq), the fp32 natural logarithm of the sum of exponents.
        A query that keeps nothing, and a hole, gives 0 and -inf.

    Raises:
        MaskError: the mask does not fit q, k and v.
        BackendError: the backend cannot run this problem, or its result was wrong.
    """
    _check(q, k, v, key_bias, backend)
    rows = None
    if mask is not None:
        rows = Rows.of(mask)
        _check_rows(q, k, rows)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not scale > 0:
        raise BackendError(f"scale={scale} was asked for; it must be above 0, the usual one is 1 / sqrt(d)")
    # Without a graph to be seen by, the op would only cost: the dispatcher takes longer than the launch.
    traced = torch.compiler.is_compiling() or type(q) is not torch.Tensor
    run: Callable[..., tuple[torch.Tensor, torch.Tensor]] = torch.ops.vidaccel.attention if traced else _attention
    out, lse = run(q, k, v, *(rows or (None,) * 8 + (0, 0, 0)), key_bias, scale, backend, counted)
    return out, lse


def backends(problem: Problem) -> dict[str, Verdict]:
    """Which backends can run a problem, and why the others cannot."""
    return {name: _load(name).can_run(problem) for name in BACKENDS}


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ptr: torch.Tensor | None,
    idx: torch.Tensor | None,
    n_full: torch.Tensor | None,
    q_len: torch.Tensor | None,
    k_len: torch.Tensor | None,
    lo: torch.Tensor | None,
    hi: torch.Tensor | None,
    pos: torch.Tensor | None,
    guards: int,
    block: int,
    text: int,
    key_bias: torch.Tensor | None,
    scale: float,
    backend: str,
    counted: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = None
    if ptr is not None and idx is not None and n_full is not None and q_len is not None and k_len is not None:
        rows = Rows(ptr, idx, n_full, q_len, k_len, lo, hi, pos, guards, block, text)
    problem = Problem.of(q, k, rows, key_bias)
    name = choose(problem, backend)
    out, lse = _load(name).run(q, k, v, rows, scale, key_bias)
    record = trace.current()
    if record is not None:
        key = (name, problem)
        if record.trace is not None and out.numel() and key not in record.trace.checked and canary.possible(q.device):
            comparisons = canary.compare(out, lse, q, k, v, rows, scale, key_bias)
            canary.check(comparisons, f"the {name} kernel in {record.site} ({problem})")
            record.trace.checked.add(key)
        if counted:
            record.kernels.append(name)
    return out, lse


_op = torch.library.custom_op(
    "vidaccel::attention",
    _attention,
    mutates_args=(),
    # The guards are a SymInt: another window is no reason to compile anything again.
    schema="(Tensor q, Tensor k, Tensor v, Tensor? ptr, Tensor? idx, Tensor? n_full, Tensor? q_len, Tensor? k_len, "
    "Tensor? lo, Tensor? hi, Tensor? pos, SymInt guards, int block, int text, Tensor? key_bias, float scale, "
    "str backend, bool counted=True) -> (Tensor, Tensor)",
)


@_op.register_fake
def _(q: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
    b, lq, h, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((b, h, lq), dtype=torch.float32)


@lru_cache(maxsize=1024)
def choose(problem: Problem, backend: str = "auto") -> str:
    """The name of the backend that runs a problem.

    Raises:
        BackendError: a named backend cannot.
    """
    if backend != "auto":
        if not (verdict := _load(backend).can_run(problem)).ok:
            raise BackendError(
                f"backend={backend!r} was asked for, but it cannot run {problem}: {verdict.reason}. "
                f"Use backend='auto', or one of {', '.join(n for n, v in backends(problem).items() if v.ok)}"
            )
        return backend
    reasons = []
    for name in PREFERRED.get(problem.device.type, ("reference",)):
        if (verdict := _load(name).can_run(problem)).ok:
            break
        reasons.append(f"not {name}: {verdict.reason}")
    # Only the reference is so slow that the speed which was asked for is gone.
    log: Callable[..., None] = logger.warning if reasons and name == "reference" else logger.info
    log("%s runs %s%s", name, problem, "".join(f"; {reason}" for reason in reasons))
    return name


def prepare(d: int, block: int, dtype: torch.dtype, device: torch.device) -> None:
    """Tune the kernel that `auto` takes, where it has never run on such a GPU: seconds, once (see `tune.py`).

    Args:
        d: channels of a head.
        block: slots in a block.
        dtype: of q, k and v.
        device: where they will be.
    """
    for window in (False, True):
        problem = Problem(1, 1, block, block, d, dtype, device, block=block, partial=window)
        able = (name for name in PREFERRED.get(device.type, ()) if _load(name).can_run(problem).ok)
        if next(able, None) == "portable":
            portable.config(d, block, dtype, window, device)


def _load(name: str) -> Backend:
    return cast(Backend, import_module(BACKENDS[name], __package__))


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_bias: torch.Tensor | None, backend: str) -> None:
    if backend != "auto" and backend not in BACKENDS:
        raise BackendError(f"backend={backend!r} was asked for; there are auto, {', '.join(BACKENDS)}")
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise BackendError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} were given; "
            "they must be (b, lq, h, d), (b, lk, h, d), (b, lk, h, d) with equal b, h and d"
        )
    if not (q.dtype == k.dtype == v.dtype and q.dtype.is_floating_point):
        raise BackendError(f"q, k, v of {q.dtype}, {k.dtype}, {v.dtype} were given; give one float dtype for all three")
    if not q.device == k.device == v.device:
        raise BackendError(f"q, k, v are on {q.device}, {k.device}, {v.device}; move them to one device")
    given = (q, k, v) if key_bias is None else (q, k, v, key_bias)
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        raise BackendError("gradients were asked for, but these kernels only infer; call them under torch.no_grad()")
    if key_bias is not None:
        shape, wanted = tuple(key_bias.shape), (q.shape[0], q.shape[2], k.shape[1])
        if len(shape) != 3 or shape[2] != wanted[2] or shape[0] not in (1, wanted[0]) or shape[1] not in (1, wanted[1]):
            raise BackendError(f"key_bias {shape} was given; it must be (b or 1, h or 1, lk) of b, h, lk = {wanted}")
        if key_bias.dtype != torch.float32 or key_bias.device != q.device:
            raise BackendError(
                f"key_bias is {key_bias.dtype} on {key_bias.device}; it must be torch.float32 on {q.device}"
            )


def _check_rows(q: torch.Tensor, k: torch.Tensor, rows: Rows) -> None:
    for name, each in zip(rows._fields[:8], rows[:8], strict=True):
        if each is not None and (each.device != q.device or each.dtype != torch.int32):
            raise MaskError(
                f"the mask's {name} is {each.dtype} on {each.device}, q is on {q.device}; make it torch.int32, and "
                "move the mask with mask.to(q.device). vidaccel.checked.checked(mask) looks at all that a kernel trusts"
            )
    if rows.ptr.ndim != 1 or rows.n_full.ndim != 1 or rows.ptr.shape[0] != rows.n_full.shape[0] + 1:
        raise MaskError(
            f"{tuple(rows.ptr.shape)} starts of rows (ptr) were given for {tuple(rows.n_full.shape)} rows (n_full); "
            "give one for each row of each head, and one more, where the last one ends"
        )
    if rows.n_full.shape[0] not in (rows.q_blocks, q.shape[2] * rows.q_blocks):
        raise MaskError(
            f"a mask of {rows.n_full.shape[0]} rows, {rows.q_blocks} a head, was given for {q.shape[2]} heads; "
            "give 1 or as many"
        )
    for name, length, blocks in (("q", q.shape[1], rows.q_blocks), ("k", k.shape[1], rows.k_blocks)):
        if -(-length // rows.block) != blocks:
            raise MaskError(
                f"{name} has {length} slots, but the mask has {blocks} blocks of {rows.block}; "
                "bring tensors into kernel order with layout.to_kernel(), and build the mask on that layout"
            )
    if rows.k_len.ndim == 2 and rows.k_len.shape[0] not in (1, q.shape[0]):
        raise MaskError(
            f"key lengths of {rows.k_len.shape[0]} samples were given for a batch of {q.shape[0]}; "
            "call layout.with_valid_text() with one number a sample"
        )
    for name, words, slots in (("lo", rows.lo, q.shape[1]), ("hi", rows.hi, q.shape[1]), ("pos", rows.pos, k.shape[1])):
        if words is not None:
            if words.shape[0] != slots:
                raise MaskError(
                    f"a window's {name} has {words.shape[0]} slots, and {'k' if name == 'pos' else 'q'} has {slots}; "
                    "build it from layout.positions, in kernel order"
                )
            if words.ndim != 1:
                raise MaskError(
                    f"a window's {name} {tuple(words.shape)} was given; it must be one torch.int32 a slot, as "
                    "Window.of() packs them"
                )
