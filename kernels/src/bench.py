"""Time the backends against torch's own dense attention, in one run, after checking each result.

A figure exists only for a kernel whose check was green. Times are medians of interleaved repeats, so that whatever else
the machine does falls on all of them alike.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..blocks import BlockMask
from ..env import environment
from ..grid import TokenLayout, VideoGrid
from . import canary, flex
from .attention import attention
from .problem import Rows

REPEATS = 9


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
        density: fraction of key blocks that each row keeps, drawn at random for each head.
        dtype: name of a torch dtype.
    """

    name: str
    grid: tuple[int, int, int]
    text: int
    heads: int
    d: int
    block: int
    density: float
    dtype: str

    def tensors(self, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, BlockMask]:
        """q, k, v (1, tokens, heads, d) of normal noise, and a mask; the same in every run."""
        layout = TokenLayout.of(VideoGrid(*self.grid), self.text, self.block)
        generator = torch.Generator().manual_seed(0)
        keep = torch.rand(self.heads, layout.blocks, layout.blocks, generator=generator).argsort(-1)
        mask = BlockMask.of(keep < max(1, round(self.density * layout.blocks)), layout).to(device)
        shape = (1, layout.slots, self.heads, self.d)
        noise = (torch.randn(shape, generator=generator) for _ in range(3))
        q, k, v = (x.to(device, getattr(torch, self.dtype)) for x in noise)
        return q, k, v, mask


def cases(device: str) -> list[Case]:
    """What `vidaccel bench kernels` runs on a device."""
    if device == "cpu":
        video = [Case("4,608 tokens", (8, 24, 24), 0, 8, 64, 128, density, "float32") for density in (0.25, 0.5, 1.0)]
        sample = [Case("sample model", (9, 16, 16), 0, 3, 64, block, 0.35, "float32") for block in (128, 64, 32, 16)]
        return video + sample
    wan = [Case("Wan 480p", (21, 30, 52), 0, 8, 128, 128, density, "bfloat16") for density in (1.0, 0.25, 0.1)]
    cog = [Case("CogVideoX", (13, 30, 45), 226, 8, 64, 128, density, "bfloat16") for density in (1.0, 0.25, 0.1)]
    return wan + cog


@dataclass(frozen=True)
class Rival:
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


def run(device: str, chosen: list[Case] | None = None, repeats: int = REPEATS) -> Iterator[dict[str, Any]]:
    """Measure case by case.

    Args:
        device: "cpu" or "cuda".
        chosen: the cases; default `cases(device)`.
        repeats: how often each kernel runs.

    Yields:
        One row for each kernel of each case: the case's fields, `kernel`, and `ok`, `error`, `budget` and `reason` of
        its check. Where that is green also `ms` (median), `ms_best`, `ratio` (times faster than the fastest dense
        kernel of the case) and `tflops` (of the kept pairs).
    """
    for case in cases(device) if chosen is None else chosen:
        q, k, v, mask = case.tensors(device)
        rivals = _rivals(q, k, v, mask)
        checks = {rival.name: _check(rival) for rival in rivals}
        sound = [rival for rival in rivals if checks[rival.name]["ok"]]
        times = _times(sound, repeats, device)
        median = {name: sorted(taken)[len(taken) // 2] for name, taken in times.items()}
        dense = min((median[rival.name] for rival in sound if rival.is_dense), default=None)
        length = mask.layout.q_len.double()
        kept = float((mask.block_map().double() @ length @ length).sum()) / 2
        every = case.heads * mask.layout.tokens**2
        for rival in rivals:
            row = {**asdict(case), "tokens": mask.layout.tokens, "kernel": rival.name, **checks[rival.name]}
            if rival.name in median:
                ms = median[rival.name]
                flops = 4 * case.d * (every if rival.is_dense else kept)
                row |= {"ms": ms, "ms_best": min(times[rival.name]), "ratio": dense and dense / ms}
                row |= {"tflops": flops / ms / 1e9}
            yield row


def about() -> dict[str, Any]:
    """Hardware, versions and commit, to stand beside the rows."""
    command, here = ["git", "rev-parse", "HEAD"], Path(__file__).resolve().parent
    try:
        commit = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # No git on this machine.
        commit = ""
    return {**environment(), "commit": commit or None}


def _rivals(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask) -> list[Rival]:
    rows, slots = Rows.of(mask), q.shape[1]
    # Dense kernels see the tokens alone, without holes.
    tokens = [mask.layout.to_model(x) for x in (q, k, v)]
    first, second, third = (x.transpose(1, 2) for x in tokens)

    def dense(backend: SDPBackend | None) -> Callable[[], tuple[torch.Tensor, None]]:
        def call() -> tuple[torch.Tensor, None]:
            if backend is None:
                out = functional.scaled_dot_product_attention(first, second, third)
            else:
                with sdpa_kernel(backend):
                    out = functional.scaled_dot_product_attention(first, second, third)
            return out.transpose(1, 2), None

        return call

    def sparse(backend: str) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        return lambda: attention(q, k, v, mask, backend=backend)

    whole = (tokens[0], tokens[1], tokens[2], None)
    if q.device.type == "cpu":
        return [Rival("dense", dense(None), whole), Rival("cpu", sparse("cpu"), (q, k, v, rows))]
    # The lists are made once here: what is compared are kernels.
    lists = flex.block_mask(rows, slots, slots)

    def flexed() -> tuple[torch.Tensor, torch.Tensor]:
        views = [x.transpose(1, 2) for x in (q, k, v)]
        out, lse = flex.compiled()(*views, None, lists, q.shape[-1] ** -0.5)
        return out.transpose(1, 2), lse

    # Holes of the noise hold numbers, so flex needs no copy; what it gives for queries in holes is not looked at.
    return [
        Rival("dense cudnn", dense(SDPBackend.CUDNN_ATTENTION), whole),
        Rival("dense flash", dense(SDPBackend.FLASH_ATTENTION), whole),
        Rival("portable", sparse("portable"), (q, k, v, rows)),
        Rival("flex", flexed, (q, k, v, rows._replace(q_len=torch.full_like(rows.q_len, rows.block)))),
    ]


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
    for _ in range(repeats):
        for rival in rivals:
            if device == "cpu":
                start = time.perf_counter()
                rival.call()
                times[rival.name].append(1e3 * (time.perf_counter() - start))
                continue
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            rival.call()
            end.record()
            end.synchronize()
            times[rival.name].append(begin.elapsed_time(end))
    return times
