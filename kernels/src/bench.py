"""Time the backends against torch's own dense attention, in one run, after checking each result.

A figure exists only for a kernel whose check was green. Times are medians of interleaved repeats, so that whatever else
the machine does falls on all of them alike.
"""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..blocks import BlockMask
from ..env import environment
from ..grid import TokenLayout, VideoGrid
from . import canary
from .bench_rivals import Rival, rivals

# Of the record: a row is a case, with all its kernels.
SCHEMA = 2
REPEATS = 25
# Milliseconds of calls in each measurement on a GPU. Calls queue up as in a model: Python is ahead, and the clock is
# what the power limit allows a GPU that does not rest. That clock goes up and down by a fifth, about twice a second, so
# that short turns of every kernel, many times, are the way to a ratio that holds.
TURN_MS = 15
# A kernel that was measured for so many seconds, three times at least, is not measured again.
ENOUGH_S = 1.5


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

    @property
    def title(self) -> str:
        """What sets it apart: shape, pattern, density and blocks."""
        return f"{self.name}, {self.pattern} {self.density:g}, blocks of {self.block}"

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


def run(
    device: str, chosen: Iterable[tuple[Case, BlockMask | None]], repeats: int = REPEATS
) -> Iterator[dict[str, Any]]:
    """Measure case by case.

    Args:
        device: "cpu" or "cuda".
        chosen: cases, each with its mask; None draws a random one.
        repeats: how often each kernel runs, at most; slow ones run less often, at least three times.

    Yields:
        One row for each case: `key` (its title), its fields, `tokens`, `visited` (blocks touched x their area, over all
        pairs: holes count), `touched` (the share of pairs of tokens in them), and `kernels`: by name, `error`
        (over what the check allows) and either `ms` (median) or, where the check is red, the `reason`. One that raised
        has its `reason` alone. What follows from these is not in it: `lab.kernel_figures.by_kernel`.
    """
    for case, given in chosen:
        q, k, v, mask = case.tensors(device, given)
        found = rivals(q, k, v, mask)
        kernels = {rival.name: _check(rival) for rival in found}
        sound = [rival for rival in found if "reason" not in kernels[rival.name]]
        for name, taken in interleaved(sound, repeats, device).items():
            kernels[name]["ms"] = sorted(taken)[len(taken) // 2]
        area, pairs = _pairs(mask, case.heads)
        every = case.heads * mask.layout.tokens**2
        row = {"key": case.title, **asdict(case), "tokens": mask.layout.tokens}
        yield row | {"visited": area / every, "touched": pairs / every, "kernels": kernels}


def about() -> dict[str, Any]:
    """Hardware, versions and commit, to stand beside the rows."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parent, capture_output=True, text=True, check=False)
    return {**environment(), "commit": done.stdout.strip() or None}


def _pairs(mask: BlockMask, heads: int) -> tuple[float, float]:
    """Area of the blocks that are touched, and pairs of tokens in them, over all heads."""
    touched = (mask.block_map() > 0).double()
    pairs = touched @ mask.lengths.double() @ mask.layout.q_len.double()
    each = heads / mask.heads
    return float(touched.sum()) * mask.layout.block**2 * each, float(pairs.sum()) * each


def _check(rival: Rival) -> dict[str, Any]:
    """`error` of the worst result over its budget, and a `reason` if it is above 1; of what raised only the reason."""
    q, k, v, rows = rival.problem
    try:
        out, lse = rival.call()
        given = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32) if lse is None else lse
        found = canary.compare(out, given, q, k, v, rows, q.shape[-1] ** -0.5, None)
    except Exception as problem:
        # Whatever another project raises, the other kernels are measured.
        return {"reason": next(iter(str(problem).strip().splitlines()), "") or type(problem).__name__}
    if lse is None:
        found = found[:1]
    worst = max(found, key=lambda x: x.error / x.budget)
    said = {"error": worst.error / worst.budget}
    return said if all(x.ok for x in found) else said | {"reason": f"{worst.name} is wrong"}


class Timed(Protocol):
    """Something to time."""

    @property
    def name(self) -> str:
        """As printed."""

    @property
    def call(self) -> Callable[[], object]:
        """Does it."""


def interleaved(things: Sequence[Timed], repeats: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of each repeat, by name. Everything has run once already, in its check."""
    times: dict[str, list[float]] = {thing.name: [] for thing in things}
    spent = dict.fromkeys(times, 0.0)
    # What ran just before decides how hot a GPU is, so the order changes.
    order = random.Random(0)
    for turn in range(repeats):
        for thing in order.sample(things, len(things)):
            if turn >= 3 and spent[thing.name] > ENOUGH_S:
                continue
            start = time.perf_counter()
            if device == "cuda":
                last = times[thing.name][-1:]
                times[thing.name].append(_gpu_ms(thing, max(1, round(TURN_MS / last[0])) if last else 1))
            else:
                thing.call()
                times[thing.name].append(1e3 * (time.perf_counter() - start))
            spent[thing.name] += time.perf_counter() - start
    return times


def _gpu_ms(thing: Timed, calls: int) -> float:
    """Mean of `calls` calls that follow one another and one more, which fills the queue."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    thing.call()
    begin.record()
    for _ in range(calls):
        thing.call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / calls
