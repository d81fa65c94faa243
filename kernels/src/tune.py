"""Launch parameters for GPUs that no shipped table was measured on: a few are timed once, and remembered.

Idea: a kernel's own table serves the GPUs that it was measured on. On others the first use of each (kernel, head dim,
    block, dtype, windows or not, GPU, Triton) times some candidates on random numbers, outside of CUDA graphs, and the
    winner is kept in a file; `attention.prepare` does that before a pipeline's first step. The mask of a call plays no
    part, so that what runs never depends on what was asked. Processes that work together under torch.distributed all
    take what the first of them to choose took.
Cost: a few seconds once, most of them for compiling.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from ..window import Window
from .canary import possible
from .problem import Rows

logger = logging.getLogger(__name__)

# The problem that candidates are timed on: every pair of these many tokens and heads.
TOKENS, HEADS = 4096, 8
ROUNDS = 7


class Key(NamedTuple):
    """What a choice depends on."""

    kernel: str
    d: int
    block: int
    dtype: str
    window: bool
    gpu: str
    triton: str

    @classmethod
    def of(cls, kernel: str, d: int, block: int, dtype: torch.dtype, window: bool, device: torch.device) -> Key:
        """Describe a kernel on a GPU."""
        import triton

        name = torch.cuda.get_device_name(device)
        return cls(kernel, d, block, str(dtype).removeprefix("torch."), window, name, triton.__version__)


C = TypeVar("C", bound=tuple[int, ...])
_known: dict[Key, tuple[int, ...]] = {}


def config(candidates: Sequence[C], run: Callable[..., object], key: Key, device: torch.device) -> C:
    """The fastest launch parameters of a kernel on a GPU.

    Args:
        candidates: what to choose from, the usual one first. That one serves while a CUDA graph is captured.
        run: the kernel, called as `run(q, k, v, rows, scale, None, candidate)`.
        key: what the choice is for.
        device: the GPU.
    """
    if key not in _known and not possible(device):
        return candidates[0]
    return fastest(candidates, key, partial(measure, run, key, device))


def fastest(candidates: Sequence[C], key: Key, milliseconds: Callable[[Sequence[C]], list[float]]) -> C:
    """The candidate that is remembered, or else the one that takes least time now.

    Args:
        candidates: what to choose from, the usual one first.
        key: what the choice is for.
        milliseconds: times each of them; infinity where one cannot run.

    Returns:
        One of the candidates; the first where none can run.
    """
    plain = [tuple(candidate) for candidate in candidates]
    if _known.get(key) not in plain:
        before = chosen = stored().get(key, ())
        # What an earlier version of this package stored may be no candidate any more.
        if chosen not in plain:
            times = milliseconds(candidates)
            best = min(times)
            if best == math.inf:
                return candidates[0]
            chosen = plain[times.index(best)]
            logger.info("%s: %s takes %.3g ms, the best of %s", key, chosen, best, times)
        _known[key] = _agreed(key, chosen)
        if _known[key] != before:
            _store(key, _known[key])
    return candidates[plain.index(_known[key])]


def file() -> Path:
    """Where choices are kept."""
    try:
        place = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # In containers users may have no home.
        place = Path(tempfile.gettempdir())
    return place / "vidaccel" / "tuned.json"


def stored() -> dict[Key, tuple[int, ...]]:
    """What the file holds; nothing, and a warning, if it cannot be read."""
    try:
        entries = json.loads(file().read_text(encoding="utf-8"))
        return {Key(**entry["for"]): tuple(int(n) for n in entry["chosen"]) for entry in entries}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as problem:
        logger.warning("%s cannot be read (%s): kernels are tuned again; delete it if this comes back", file(), problem)
        return {}


def _store(key: Key, chosen: tuple[int, ...]) -> None:
    """Add a choice to the file, which other processes may be reading or writing."""
    entries = [{"for": k._asdict(), "chosen": list(c)} for k, c in (stored() | {key: chosen}).items()]
    try:
        file().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file().parent, delete=False, encoding="utf-8") as new:
            json.dump(entries, new, indent=1)
        os.replace(new.name, file())
    except OSError as problem:
        logger.warning("%s cannot be written (%s): kernels are tuned again in the next run", file(), problem)


def _agreed(key: Key, chosen: tuple[int, ...]) -> tuple[int, ...]:
    """The choice of the first process to get here, which all take: none waits for one that may never come."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return chosen
    store = distributed.distributed_c10d._get_default_store()
    name = f"vidaccel {tuple(key)}"
    if store.add(f"{name} begun", 1) == 1:
        store.set(name, json.dumps(chosen))
    return tuple(json.loads(store.get(name)))


def measure(
    run: Callable[..., object], key: Key, device: torch.device, candidates: Sequence[tuple[int, ...]]
) -> list[float]:
    """Median milliseconds of each candidate on a GPU, on numbers and a mask of its own."""
    from triton.runtime.errors import TritonError

    generator = torch.Generator(device).manual_seed(0)
    shape, dtype = (1, TOKENS, HEADS, key.d), getattr(torch, key.dtype)
    q, k, v = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3))
    rows = Rows.dense(TOKENS, TOKENS, key.block, device)
    if key.window:
        here = torch.zeros(TOKENS, 1, dtype=torch.int32)
        window = Window.of(here, here + 1, here, [1]).to(device)
        rows = rows._replace(
            n_full=torch.zeros_like(rows.n_full), lo=window.lo, hi=window.hi, pos=window.pos, guards=window.guards
        )
    taken = []
    for candidate in candidates:
        times = []
        # A candidate that asks for more than the GPU has cannot run.
        with contextlib.suppress(TritonError), torch.cuda.device(device):
            for _ in range(1 + ROUNDS):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                run(q, k, v, rows, key.d**-0.5, None, candidate)
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end))
        # The first call compiles.
        taken.append(statistics.median(times[1:]) if len(times) > 1 else math.inf)
    return taken
