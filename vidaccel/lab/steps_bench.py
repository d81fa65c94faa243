"""What `vidaccel bench model` measures over steps: a forecast step, and whole videos with some steps forecast."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields, replace
from statistics import mean, median
from typing import Any

import torch

from ..api import DEFAULT_SCHEDULE
from ..caching import CachePolicy, Replay
from ..patterns import Pattern
from ..schedule import Schedule
from ..trace import CallRecord
from . import timing
from .model_bench import ModelBench
from .sides import Planned, Side

_NEVER = 1e30
_STEPS = 16
_SPARSE = Schedule(dense_layers=1)


def cache(bench: ModelBench, policy: CachePolicy) -> None:
    """One row: what a forecast step costs. Thresholds are lifted, so that every step after the warm-up is one.

    Args:
        bench: whose dense row a full step is taken from.
        policy: what is cached when.
    """

    def measure() -> dict[str, Any]:
        lifted: dict[str, Any] = {f.name: _NEVER for f in fields(policy) if f.name in ("threshold", "max_error")}
        if isinstance(policy, Replay):
            lifted = {"computed": tuple(range(6)), "total": None}
        best = bench.best(False)
        # What a forecast costs does not depend on how many layers it leaves out.
        side = bench.side(best["variant"], bench.deepest, cache=replace(policy, **lifted), steps=_STEPS)
        _video(bench, side, _STEPS)
        calls = side.run.trace.calls if side.run else []
        branches = dict.fromkeys(call.branch or "" for call in calls if call.forecast)
        # The first forecast of a branch compiles its kernel.
        skipped = {
            name: _median([call for call in calls if call.forecast and call.branch == name][1:]) for name in branches
        }
        if not skipped or None in skipped.values():
            return {"ok": False, "reason": f"of {_STEPS} steps none was forecast, thresholds lifted"}
        return {
            "full_ms": best["call_ms"],
            "skipped_ms": skipped,
            "skipped_share": mean(ms for ms in skipped.values() if ms is not None) / best["call_ms"],
            "cache_bytes": max(call.cache_bytes or 0 for call in calls),
        }

    bench.measure("cache", policy.name, False, measure)


def trajectory(
    bench: ModelBench,
    steps: int,
    computed: Sequence[int],
    pattern: Pattern | None = None,
    density: float | None = None,
) -> None:
    """One row: all steps of a video at full depth, some of them forecast; the dense video is steps x calls x the call.

    Args:
        bench: of a job of videos.
        steps: denoising steps.
        computed: those that are computed; `spread` makes such lists.
        pattern: also sparse, by the default schedule.
        density: of the pattern.
    """

    def measure() -> dict[str, Any]:
        best, attention = bench.best(False), None if pattern is None else Planned(pattern)
        how: dict[str, Any] = {"attention": attention, "density": density}
        # Planning, compiling and checks come first and are not counted: a few layers, two full steps and a forecast.
        few = bench.side(
            best["variant"], bench.deepest, schedule=_SPARSE, cache=Replay(computed=(0, 1)), steps=3, **how
        )
        _video(bench, few, 3)
        few.close()
        policy = Replay(computed=tuple(computed), total=steps)
        side = bench.side(best["variant"], None, schedule=DEFAULT_SCHEDULE, cache=policy, steps=steps, **how)
        timing.synchronize(bench.device)
        start = time.perf_counter()
        _video(bench, side, steps)
        seconds = time.perf_counter() - start
        dense = steps * len(bench.job.model.contexts) * (best["whole_ms"] or best["call_ms"]) / 1e3
        calls = side.run.trace.calls if side.run else []
        return {
            "steps": steps,
            "computed_steps": len({call.step for call in calls if not call.forecast}),
            "calls": len(calls),
            "cache_bytes": max(call.cache_bytes or 0 for call in calls),
            "seconds": seconds,
            "dense_seconds": dense,
            "speedup": dense / seconds,
        }

    how = "" if pattern is None else f", {pattern.name} {density:g}" if density else f", {pattern.name}"
    model = bench.job.model
    alone = ", without guidance" if model.guidance == "two calls" and len(model.contexts) == 1 else ""
    bench.measure("trajectory", f"{len(computed)} of {steps} steps{how}{alone}", False, measure)


def _video(bench: ModelBench, side: Side, steps: int) -> None:
    """All calls of a video."""
    for step in range(steps):
        for name in bench.job.model.contexts:
            side(name, timestep=_timestep(bench, 1000.0 * (1 - step / steps)))
    timing.synchronize(bench.device)


def _timestep(bench: ModelBench, value: float) -> torch.Tensor:
    return torch.full_like(bench.inputs[False]["timestep"], value)


def _median(calls: Sequence[CallRecord]) -> float | None:
    taken = [call.watch.ms for call in calls if call.watch is not None and call.watch.ms is not None]
    return median(taken) if taken else None
