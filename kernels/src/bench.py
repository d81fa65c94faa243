"""Time the backends against torch's own dense attention, in one run, after checking each result.

A figure exists only for a kernel whose check was green. Times are medians of interleaved repeats, so that whatever else
the machine does falls on all of them alike.
"""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..blocks import BlockMask
from ..env import environment
from ..grid import TokenLayout, VideoGrid
from . import canary, flex
from .attention import attention, backends
from .problem import Problem, Rows

REPEATS = 9
# Sparse backends that are timed on a GPU, besides FlexAttention.
SPARSE = ("gluon", "tma", "portable")
# The GPU idles for so many cycles before each measurement, over 2 ms: time for Python to launch what is measured, so
# that none of it counts. In a model kernels queue up, and Python is ahead.
HEAD_START = 5_000_000
# A kernel that has run for so long in all runs no more, if it has run three times.
ENOUGH_MS = 400.0


@dataclass(frozen=True)
class Case:
    """One shape at one density.

    Attributes:
        name: what the shape is taken from.
        grid: video tokens (t, y, x).
        text: text tokens beside them.
        heads: attention heads.
        d: channels of a head.
        block: slots in a block.
        density: fraction of key blocks that each row keeps.
        dtype: name of a torch dtype.
        pattern: "random", which draws them for each head, or the name of a pattern.
    """

    name: str
    grid: tuple[int, int, int]
    text: int
    heads: int
    d: int
    block: int
    density: float
    dtype: str
    pattern: str = "random"

    def tensors(
        self, device: str, mask: BlockMask | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, BlockMask]:
        """q, k, v (1, slots, heads, d) of normal noise, and a mask: the one given, or a random one.

        The same on a device in every run.
        """
        generator = torch.Generator(device).manual_seed(0)
        if mask is None:
            layout = TokenLayout.of(VideoGrid(*self.grid), self.text, self.block).to(device)
            blocks, kept = layout.blocks, max(1, round(self.density * layout.blocks))
            chosen = torch.rand(self.heads, blocks, blocks, generator=generator, device=device).topk(kept).indices
            keep = torch.zeros(self.heads, blocks, blocks, dtype=torch.bool, device=device).scatter_(2, chosen, True)
            text = layout.text_blocks
            keep[:, blocks - text :] = True
            keep[..., blocks - text :] = True
            mask = BlockMask.of(keep, layout)
        shape, dtype = (1, mask.layout.slots, self.heads, self.d), getattr(torch, self.dtype)
        q, k, v = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3))
        return q, k, v, mask.to(device)


class Rival(NamedTuple):
    """A kernel and the problem that it solves.

    Attributes:
        name: as printed; dense ones begin with "dense".
        call: gives (out, lse); lse is None where the kernel has none.
        problem: q, k, v and rows, for the check.
    """

    name: str
    call: Callable[[], tuple[torch.Tensor, torch.Tensor | None]]
    problem: tuple[torch.Tensor, torch.Tensor, torch.Tensor, Rows | None]

    @property
    def is_dense(self) -> bool:
        """It computes every pair."""
        return self.problem[3] is None


def run(
    device: str, chosen: Iterable[tuple[Case, BlockMask | None]], repeats: int = REPEATS
) -> Iterator[dict[str, Any]]:
    """Measure case by case.

    Args:
        device: "cpu" or "cuda".
        chosen: cases, each with its mask; None draws a random one.
        repeats: how often each kernel runs, at most; slow ones run less often, at least three times.

    Yields:
        One row for each kernel of each case: the case's fields, `tokens`, `visited` (the share of pairs in blocks that
        are touched), `kernel`, and `ok`, `error`, `budget` and `reason` of its check. Where that is green also `ms`
        (median), `ms_best`, `tflops` (of those pairs), `ratio` (times faster than the fastest dense kernel of the case)
        and `of_dense` (its TFLOP/s over that dense kernel's).
    """
    for case, given in chosen:
        q, k, v, mask = case.tensors(device, given)
        rivals = _rivals(q, k, v, mask)
        checks = {rival.name: _check(rival) for rival in rivals}
        sound = [rival for rival in rivals if checks[rival.name]["ok"]]
        times = _times(sound, repeats, device)
        median = {name: sorted(taken)[len(taken) // 2] for name, taken in times.items()}
        dense = min((median[rival.name] for rival in sound if rival.is_dense), default=None)
        visited, every = _pairs(mask, case.heads), case.heads * mask.layout.tokens**2
        for rival in rivals:
            row = {**asdict(case), "tokens": mask.layout.tokens, "visited": visited / every, "kernel": rival.name}
            row |= checks[rival.name]
            if rival.name in median:
                ms, pairs = median[rival.name], every if rival.is_dense else visited
                row |= {"ms": ms, "ms_best": min(times[rival.name]), "tflops": 4 * case.d * pairs / ms / 1e9}
                if dense is not None:
                    row |= {"ratio": dense / ms, "of_dense": pairs / every * dense / ms}
            yield row


def about() -> dict[str, Any]:
    """Hardware, versions and commit, to stand beside the rows."""
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).resolve().parent, capture_output=True, text=True, check=False
    )
    return {**environment(), "commit": done.stdout.strip() or None}


def _pairs(mask: BlockMask, heads: int) -> float:
    """Pairs of tokens in the blocks that are touched, over all heads."""
    touched = (mask.block_map() > 0).double()
    pairs = touched @ mask.lengths.double() @ mask.layout.q_len.double()
    return float(pairs.sum()) * heads / mask.heads


def _rivals(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask) -> list[Rival]:
    rows = Rows.of(mask)
    # Dense kernels see the tokens alone, without holes.
    tokens = [mask.layout.to_model(x) for x in (q, k, v)]
    whole = (tokens[0], tokens[1], tokens[2], None)

    def sparse(backend: str) -> Rival:
        return Rival(backend, lambda: attention(q, k, v, mask, backend=backend), (q, k, v, rows))

    if q.device.type == "cpu":
        return [Rival("dense", _torch_dense(tokens, None), whole), sparse("cpu")]
    verdicts = backends(Problem.of(q, k, rows, None))
    found = [
        Rival("dense cudnn", _torch_dense(tokens, SDPBackend.CUDNN_ATTENTION), whole),
        Rival("dense flash2", _torch_dense(tokens, SDPBackend.FLASH_ATTENTION), whole),
        *(sparse(name) for name in SPARSE if verdicts[name].ok),
    ]
    if flash := _flash3(tokens):
        found.insert(0, Rival("dense flash3", flash, whole))
    # The lists are made once here: what is compared are kernels.
    lists = flex.block_mask(rows, q.shape[1], q.shape[1])

    def flexed() -> tuple[torch.Tensor, torch.Tensor]:
        views = [x.transpose(1, 2) for x in (q, k, v)]
        out, lse = flex.compiled()(*views, None, lists, q.shape[-1] ** -0.5)
        return out.transpose(1, 2), lse

    # Holes of the noise hold numbers, so flex needs no copy; what it gives for queries in holes is not looked at.
    filled = rows._replace(q_len=torch.full_like(rows.q_len, rows.block))
    return [*found, Rival("flex", flexed, (q, k, v, filled))]


def _torch_dense(tokens: list[torch.Tensor], backend: SDPBackend | None) -> Callable[[], tuple[torch.Tensor, None]]:
    query, key, value = (x.transpose(1, 2) for x in tokens)

    def call() -> tuple[torch.Tensor, None]:
        with sdpa_kernel(backend) if backend else contextlib.nullcontext():
            return functional.scaled_dot_product_attention(query, key, value).transpose(1, 2), None

    return call


def _flash3(tokens: list[torch.Tensor]) -> Callable[[], tuple[torch.Tensor, None]] | None:
    # A wheel for another torch or CUDA fails when its library is loaded.
    with contextlib.suppress(ImportError, OSError, RuntimeError):
        flash = importlib.import_module("fa3_fwd_interface").flash_attn_func

        def call() -> tuple[torch.Tensor, None]:
            out = flash(*tokens)
            return out[0] if isinstance(out, tuple) else out, None

        return call
    return None


def _check(rival: Rival) -> dict[str, Any]:
    q, k, v, rows = rival.problem
    try:
        out, lse = rival.call()
        given = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32) if lse is None else lse
        found = canary.compare(out, given, q, k, v, rows, q.shape[-1] ** -0.5, None)
    except RuntimeError as problem:
        return {"ok": False, "error": None, "budget": None, "reason": str(problem).splitlines()[0]}
    if lse is None:
        found = found[:1]
    worst = max(found, key=lambda x: x.error / x.budget)
    ok = all(x.ok for x in found)
    reason = "" if ok else f"{worst.name} is wrong"
    return {"ok": ok, "error": worst.error, "budget": worst.budget, "reason": reason}


def _times(rivals: list[Rival], repeats: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of each repeat. Every kernel has run once already, in its check."""
    times: dict[str, list[float]] = {rival.name: [] for rival in rivals}
    for turn in range(repeats):
        for rival in rivals:
            taken = times[rival.name]
            if turn >= 3 and sum(taken) > ENOUGH_MS:
                continue
            if device == "cpu":
                start = time.perf_counter()
                rival.call()
                taken.append(1e3 * (time.perf_counter() - start))
                continue
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(HEAD_START)
            begin.record()
            rival.call()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end))
    return times
