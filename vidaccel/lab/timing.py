"""Times of interleaved calls, cost of the first call, peak memory: how everything in the lab is measured."""

from __future__ import annotations

import gc
import random
import subprocess
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import NamedTuple

import torch

from ..trace import Stopwatch

Call = Callable[[], object]


class First(NamedTuple):
    """The first call of something: compilation, planning, memory of the allocator, all that later calls do not pay.

    Attributes:
        seconds: wall-clock time until the device is done.
        peak_gib: most memory that was allocated during a second call, weights included; None on a CPU.
        reason: why it failed; None where it did not.
    """

    seconds: float
    peak_gib: float | None
    reason: str | None


def first(call: Call, device: torch.device) -> First:
    """Make the first two calls. A failure is a result, not an exception."""
    start = time.perf_counter()
    try:
        call()
        synchronize(device)
        seconds = time.perf_counter() - start
        if device.type != "cuda":
            return First(seconds, None, None)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        return First(seconds, torch.cuda.max_memory_allocated(device) / 2**30, None)
    # Out of memory, no kernel for a mask, a compiler's error: whatever it is, it is what is to be reported.
    except Exception as error:
        reason = why(error)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return First(time.perf_counter() - start, None, reason)


def interleaved(calls: Mapping[str, Call], repeats: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each call; one of each in turn, so that whatever else happens falls on all alike.

    The order changes from round to round: what ran just before decides how hot a GPU is.

    Args:
        calls: by name; each has run before.
        repeats: rounds.
        device: where they run.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for _ in range(repeats):
        for name in order.sample(list(calls), len(calls)):
            synchronize(device)
            watch = Stopwatch(device)
            calls[name]()
            watch.stop()
            taken[name].append(watch.ms or 0.0)
    return {name: median(times) for name, times in taken.items()}


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def why(error: BaseException) -> str:
    """An exception in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()[:300] if lines else ''}"


def clock_mhz() -> int | None:
    """The GPU's clock at this moment; None where nobody tells. A chip that is too hot or too hungry runs slower."""
    command = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        return int(done.stdout.split()[0])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return None
