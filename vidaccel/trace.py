"""What really ran: a record that the front door and the kernels write, and reports read.

While a transformer call is under way its record is `current()`; a kernel adds its name to it, so that a processor that
was displaced, or a fallback that nobody asked for, shows up as a difference between `scheduled` and `kernels`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Hashable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch

from .grid import VideoGrid

_current: ContextVar[CallRecord | None] = ContextVar("vidaccel_call", default=None)


def current() -> CallRecord | None:
    """The transformer call under way in this thread, if a front door watches it."""
    return _current.get()


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """What runs in this block is no part of the call under way, and leaves no mark in its record."""
    token = _current.set(None)
    try:
        yield
    finally:
        _current.reset(token)


class Stopwatch:
    """Time from `start` to `stop` where the work runs: CUDA events on a GPU (read later, no wait), else a clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._start = self._mark()
        self._stop: torch.cuda.Event | float | None = None

    def _mark(self) -> torch.cuda.Event | float:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> None:
        """End of the work (on a GPU: of the work queued so far)."""
        self._stop = self._mark()

    @property
    def ms(self) -> float | None:
        """Milliseconds, or None while running. Waits for a GPU."""
        if self._stop is None:
            return None
        if isinstance(self._start, float) or isinstance(self._stop, float):
            return 1e3 * (float(self._stop) - float(self._start))  # type: ignore[arg-type]
        self._stop.synchronize()
        return float(self._start.elapsed_time(self._stop))


@dataclass
class CallRecord:
    """One call of one transformer.

    Attributes:
        step: index of the denoising step in its trajectory.
        total: steps of the trajectory, where known.
        sigma: noise level in [0, 1].
        branch: "cond", "uncond", another context's name, or None where it cannot be told.
        expert: "high" or "low" noise for models with two experts.
        grid: latent tokens of the call.
        text: text tokens in joint attention.
        scheduled: (site, density) of every layer that must run sparse, in order.
        dense: names of the sites that must run dense.
        kernels: backend of every sparse attention that ran, in order.
        watch: its time.
        failed: the call ended with an exception.
        trajectory: counts the videos of a cached run, from 1.
        forecast: a cache stood in for the blocks; `skipped` names the sites that did not run because of it.
        why: the cache's rule or cap that decided.
        gate_error: the number that it looked at.
        true_error: how far the forecast was off, where it was computed too.
        cache_bytes: bytes that the transformer's cache holds after the call; None without a cache.
        guided: "both" where a second path with full attention ran beside the sparse one, "kept" where what it said at
            an earlier step was used; "alone" or None elsewhere.
        held: names of the sites that used blocks chosen at an earlier step.
        drift: () tensor of each site that chose anew, the share of its blocks that its choice before did not have.
        measured: () tensor of each site whose density depends on q and k, that density.
    """

    step: int
    total: int | None
    sigma: float
    branch: str | None
    expert: str | None
    grid: VideoGrid
    text: int
    scheduled: list[tuple[str, float]] = field(default_factory=list)
    dense: list[str] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)
    watch: Stopwatch | None = None
    failed: bool = False
    trace: Trace | None = None
    trajectory: int = 0
    forecast: bool = False
    skipped: list[str] = field(default_factory=list)
    why: str | None = None
    gate_error: float | None = None
    true_error: float | None = None
    cache_bytes: int | None = None
    guided: str | None = None
    held: list[str] = field(default_factory=list)
    drift: dict[str, torch.Tensor] = field(default_factory=dict)
    measured: dict[str, torch.Tensor] = field(default_factory=dict)

    def densities(self) -> list[float]:
        """Densities of the layers that ran sparse, measured ones where there are any. Waits for a GPU then."""
        return [float(self.measured.get(name, density)) for name, density in self.scheduled]

    def skip(self, block: str) -> None:
        """A cache stands in for a block, such as "blocks.3": its sites need not run."""
        mine = [name for name in (*(name for name, _ in self.scheduled), *self.dense) if name.startswith(f"{block}.")]
        self.skipped += mine
        self.scheduled = [(name, density) for name, density in self.scheduled if name not in mine]
        self.dense = [name for name in self.dense if name not in mine]
        self.held = [name for name in self.held if name not in mine]

    def open(self, device: torch.device) -> None:
        """Make this the current call and start its clock."""
        _current.set(self)
        self.watch = Stopwatch(device)

    def close(self, failed: bool = False) -> None:
        """End of the call."""
        self.failed = failed
        if self.watch is not None:
            self.watch.stop()
        _current.set(None)

    @property
    def site(self) -> str:
        """The layer whose sparse attention runs next."""
        return (
            self.scheduled[len(self.kernels)][0] if len(self.kernels) < len(self.scheduled) else "an unscheduled layer"
        )


MOST_CALLS = 2000
"""Records that a trace keeps, some 20 kB each where blocks are chosen: 20 videos of 50 steps and two branches."""


@dataclass
class Trace:
    """The latest calls of one acceleration, what was decided, and which kernels were checked.

    Attributes:
        calls: one record a transformer call, the last `MOST_CALLS`.
        notes: decisions and warnings, in words, each once.
        checked: kernel and shape of every canary that passed.
    """

    calls: list[CallRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checked: set[Hashable] = field(default_factory=set)

    def add(self, record: CallRecord) -> None:
        """Record a call that has ended; where there are too many, the first ones go, and a note says so."""
        self.calls.append(record)
        if len(self.calls) > MOST_CALLS:
            del self.calls[:-MOST_CALLS]
            self.note(f"only the last {MOST_CALLS} calls of the transformer are recorded; those before are not counted")

    def note(self, text: str) -> bool:
        """Record a decision; True the first time it is said."""
        if text in self.notes:
            return False
        self.notes.append(text)
        return True
