"""`vidaccel bench parallel`: one video on several GPUs, against one GPU of the same kind in the same run.

Every rank runs this; rank 0 keeps the rows. The link is measured first and alone: the two all-to-alls of a layer. Then
one call of a transformer of real size, on this GPU alone (all GPUs do that at the same time) and on all together,
interleaved, each call begun by all ranks at once, after half a second of the same call. What a layer costs is the
difference of two depths, as in `bench model`. A call takes as long as on the slowest rank. Dense attention on one GPU
is the stock model's; on several its layers go the way of sparse ones, norm and RoPE in one kernel, so that it may be
more than that many times faster.

The record (schema 1) is {"schema", "what": "parallel", "ranks", "versions", "device", "system", "rows"}. A row has
    key, model, size, grid, tokens, text, heads, ranks, kind, variant, compiled, commit, clock_mhz
and, of kind "link",
    sent_bytes            that leave a rank in a layer: q, k, v before attention, the output after it
    all_to_all_ms, gb_s   two collectives of as many bytes, before attention and after it, and sent_bytes in that time
    latency_ms            of one collective of a few bytes
    exchange_ms           with what puts tokens in order: all that a layer does more than on one GPU, nothing beside it
of kind "call",
    one, all, alone       {"base_ms", "layer_ms", "call_ms", "activations_gib", "weights_gib"} on one GPU while the
                          others do the same, on all together, and on one GPU while the others rest
    against               the dense backend of torch or FlashAttention 3 that dense attention ran on
    apart                 relative distance of the two results, which must be small for a row to be ok
    speedup, efficiency   one call_ms / all call_ms, and that over the ranks
    videos_speedup        of a video on each GPU, who take the next when they are done: the sum of their rates over the
                          rate of rank 0's while the others rest
    exchange_share        exchange_ms of all layers over all call_ms; a part of it is hidden behind the projections
    delivered, visited    densities
    predicted             {ranks: {"call_ms", "speedup", "efficiency"}}: no measurement, see `predict`
of kind "cache",
    skipped_ms            a forecast step on all GPUs, by guidance branch
    step_ms, step_speedup mean of a video of which `computed` of `steps` are computed, and one GPU's dense step over it
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..caching import CGTaylor
from ..errors import VidaccelError
from ..parallel import enable_parallelism
from ..patterns import Dense, Pattern
from ..pipelines.zoo import RealModel, build, parameters
from ..trace import Stopwatch
from . import timing
from .link import Link, measure_link, predict
from .rivals import rivals
from .rows import Rows
from .sides import Planned, Side, Times, compile_blocks, shapes, twin

# In bf16 two orders of summation differ by this much over a few layers of random weights; a wrong token by all of it.
_MOST_APART = 0.05
_NEVER = 1e30
# A GPU at its power limit has lowered its clock by then.
_STEADY_MS = 500.0


@dataclass(frozen=True)
class ParallelJob:
    """What to measure.

    Attributes:
        model: which.
        size: (height, width, frames).
        device: of this rank, such as "cuda:1".
        dtype: of the weights.
        layers: how many layers are timed, beside the first.
        repeats: rounds of interleaved calls; the median counts.
        compiled: compile the blocks.
    """

    model: RealModel
    size: tuple[int, int, int]
    device: str
    dtype: torch.dtype = torch.bfloat16
    layers: int = 4
    repeats: int = 5
    compiled: bool = False


class _Unmasked(TorchFunctionMode):
    """Leaves out masks that hide nothing: they cost time, and on several GPUs none is built."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            kwargs = {name: value for name, value in kwargs.items() if name != "attn_mask"}
        return func(*args, **kwargs)


class ParallelBench:
    """Measures one model at one size. Every rank makes one, and calls the same methods in the same order.

    Args:
        job: what to measure.
        rows: where to; only rank 0's are kept.
        say: told of every row.
    """

    def __init__(self, job: ParallelJob, rows: Rows, say: Callable[[dict[str, Any]], None] = lambda row: None) -> None:
        self.job = job
        self.rows = rows
        self.grid = job.model.grid(*job.size)
        self._say = say
        self._ranks = torch.distributed.get_world_size()
        self._device = torch.device(job.device)
        self._depths = shapes(job.model, job.layers)
        deepest = {name: max(shape[name] for shape in self._depths.values()) for name in job.model.layers}
        self._full = build(job.model.with_layers(deepest), self._device, job.dtype)
        self._inputs = job.model.inputs(self.grid, self._device, job.dtype)
        parts = (self.grid.tokens, job.model.joint_text, job.model.text * (not job.model.cross), job.model.heads)
        self._uneven = any(many % self._ranks for many in parts)
        self._rivals = rivals(self._device, self.grid.tokens, job.model.padded)
        self._rival = next(iter(self._rivals))
        self._link: Link | None = None
        self._mesh: Any = None

    def run(self, patterns: list[tuple[Pattern, float | None]], *, cache: bool = False, steps: int = 50) -> None:
        """Measure the link, dense attention, every pattern, and with `cache` CG-Taylor on the last of them."""
        self.link()
        self._rival = self._fastest()
        for pattern, density in [(Dense(), None), *patterns]:
            self.call(pattern, density)
        if cache:
            self.cached(*(patterns or [(Dense(), None)])[-1], steps)

    def link(self) -> None:
        """One row: the exchange of one layer, alone."""

        def measure() -> dict[str, Any]:
            side = self._side("base", Dense(), together=True)
            self._link = found = measure_link(
                side.transformer,
                self.job.model,
                self.grid,
                self.job.dtype,
                self._device,
                lambda calls: self._times(calls, max(9, self.job.repeats)),
            )
            side.close()
            return {
                "sent_bytes": found.sent,
                "all_to_all_ms": found.all_to_all,
                "gb_s": found.sent / found.all_to_all / 1e6,
                "latency_ms": found.latency,
                "exchange_ms": found.exchange,
            }

        self._measure("link", "all-to-all", measure)

    def call(self, pattern: Pattern, density: float | None) -> None:
        """One row: a call on one GPU and on all."""

        def measure() -> dict[str, Any]:
            assert self._link is not None
            planned = Planned(pattern) if density is not None else pattern
            made = {
                name: {depth: self._side(depth, planned, density, together=name == "all") for depth in self._depths}
                for name in ("one", "all")
            }
            memory = {name: self._first(sides) for name, sides in made.items()}
            apart = self._apart(made["one"]["base"], made["all"]["base"])
            calls: dict[str, Callable[[], object]] = {}
            for depth in self._depths:
                calls |= {f"{name} {depth}": sides[depth] for name, sides in made.items()}
                # While the other GPUs rest: GPUs of one host share power and cooling.
                calls[f"alone {depth}"] = made["one"][depth] if torch.distributed.get_rank() == 0 else lambda: None
            ranks = self._on_ranks(calls, self.job.repeats)
            slowest = {name: max(each) for name, each in ranks.items()}
            memory["alone"] = memory["one"]
            weights = parameters(self.job.model) * self.job.dtype.itemsize / 2**30
            found: dict[str, Any] = {
                name: self._of_all(name, slowest).row() | {"activations_gib": gib, "weights_gib": weights}
                for name, gib in memory.items()
            }
            alone = found["alone"]["call_ms"]
            each = [self._of_all("one", {name: ms[rank] for name, ms in ranks.items()}) for rank in range(self._ranks)]
            for sides in made.values():
                for side in sides.values():
                    side.close()
            one, together, layers = (
                found["one"]["call_ms"],
                found["all"]["call_ms"],
                sum(self.job.model.layers.values()),
            )
            plans = list(planned.plans.values()) if isinstance(planned, Planned) else []
            return found | {
                "ok": apart <= _MOST_APART,
                "reason": None if apart <= _MOST_APART else f"one GPU and all differ by {apart:.3g}",
                "against": self._rival,
                "apart": apart,
                "speedup": one / together,
                "efficiency": one / together / self._ranks,
                "videos_speedup": sum(alone / rank.call for rank in each),
                "exchange_share": layers * self._link.exchange / together,
                "delivered": plans[0].delivered if plans else 1.0,
                "visited": plans[0].visited if plans else 1.0,
                "predicted": {n: predict(one, together, layers, self._link, n) for n in (2, 4, 8)},
            }

        self._measure("call", _variant(pattern, density), measure)

    def cached(self, pattern: Pattern, density: float | None, steps: int) -> None:
        """One row: CG-Taylor on all GPUs. Thresholds are lifted, so that every step after the warm-up is forecast."""

        def measure() -> dict[str, Any]:
            model, tried = self.job.model, 12
            policy = replace(CGTaylor(), threshold=_NEVER, max_error=_NEVER)
            depth = next(reversed(self._depths))
            side = self._side(depth, pattern, density, together=True, cache=policy, steps=tried)
            for step in range(tried):
                for name in model.contexts:
                    side(name, timestep=torch.full_like(self._inputs["timestep"], 1000.0 * (1 - step / tried)))
            timing.synchronize(self._device)
            calls = side.run.trace.calls if side.run else []
            skipped = {
                # The first forecast of a branch compiles its kernel.
                name: median([c.watch.ms or 0.0 for c in calls if c.forecast and c.branch == branch and c.watch][1:])
                for name in model.contexts
                for branch in [name.removeprefix("pred_")]
            }
            side.close()
            dense, sparse = (
                self.rows.find(self._key("call", _variant(*each))) for each in ((Dense(), None), (pattern, density))
            )
            if dense is None or sparse is None:
                return {"skipped_ms": skipped}
            computed, branches = steps * 12 // 50, len(model.contexts)
            full = branches * sparse["all"]["call_ms"]
            mean = (computed * full + (steps - computed) * sum(skipped.values())) / steps
            return {
                "skipped_ms": skipped,
                "steps": steps,
                "computed": computed,
                "step_ms": mean,
                "step_speedup": branches * dense["one"]["call_ms"] / mean,
            }

        self._measure("cache", f"cg-taylor, {_variant(pattern, density)}", measure)

    def _side(self, depth: str, pattern: Any, density: float | None = None, *, together: bool, **how: Any) -> Side:
        transformer = twin(self._full, self._depths[depth])
        if together:
            enable_parallelism(transformer, uneven=self._uneven, mesh=self._mesh)
            self._mesh = transformer._parallel_config.context_parallel_config.mesh
        side = Side(transformer, self.job.model, self._inputs, self._context, attention=pattern, density=density, **how)
        if self.job.compiled:
            # diffusers' hooks, which split tokens, look their arguments up in a first call that cannot be compiled.
            side()
            compile_blocks(transformer, self.job.model.layers)
        return side

    def _context(self) -> AbstractContextManager[Any]:
        around = ExitStack()
        around.enter_context(self._rivals[self._rival]())
        if not self.job.model.padded:
            around.enter_context(_Unmasked())
        return around

    def _fastest(self) -> str:
        """The dense backend that is fastest on one GPU; rank 0 decides for all."""
        taken: dict[str, float] = {}
        for name in self._rivals:
            self._rival = name
            side = self._side("base", Dense(), together=False)
            if timing.first(side, self._device).reason is None:
                taken[name] = timing.interleaved({name: side}, 3, self._device)[name]
            side.close()
        chosen = [min(taken, key=lambda name: taken[name], default="torch's choice")]
        torch.distributed.broadcast_object_list(chosen, device=self._device)
        return chosen[0]

    def _first(self, sides: Mapping[str, Side]) -> float | None:
        """First calls of all depths. Returns the most memory, GiB, that the deepest takes beside what was held."""
        peak = None
        for side in sides.values():
            held = torch.cuda.memory_allocated(self._device) / 2**30 if self._device.type == "cuda" else 0.0
            found = timing.first(side, self._device)
            if found.reason is not None:
                # Here and not later: the other ranks wait in the exchange.
                raise RuntimeError(found.reason)
            peak = None if found.peak_gib is None else found.peak_gib - held
        return peak

    def _apart(self, one: Side, together: Side) -> float:
        alone, shared = (side()[0].float() for side in (one, together))
        return float((alone - shared).norm() / alone.norm())

    def _times(self, calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
        """Median milliseconds of each call on the slowest rank."""
        return {name: max(ranks) for name, ranks in self._on_ranks(calls, repeats).items()}

    def _on_ranks(self, calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
        """Median milliseconds of each call on each rank; all ranks begin each call together.

        A GPU that has rested is faster for a fifth of a second than its power lets it go on. So a timed call follows
        the same call, repeated without a pause for `_STEADY_MS`, as in a video.
        """
        before = dict.fromkeys(calls, 0)
        if self._device.type == "cuda":
            once = self._rounds(calls, 1, before)
            before = {name: math.ceil(_STEADY_MS / max(*ranks, 1.0)) for name, ranks in once.items()}
        return self._rounds(calls, repeats, before)

    def _rounds(
        self, calls: Mapping[str, Callable[[], object]], repeats: int, before: Mapping[str, int]
    ) -> dict[str, list[float]]:
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                timing.synchronize(self._device)
                torch.distributed.barrier()
                for _ in range(before[name]):
                    call()
                watch = Stopwatch(self._device)
                call()
                watch.stop()
                taken[name].append(watch.ms or 0.0)
        mine = torch.tensor([median(each) for each in taken.values()], dtype=torch.float64, device=self._device)
        ranks = [torch.empty_like(mine) for _ in range(self._ranks)]
        torch.distributed.all_gather(ranks, mine)
        return dict(zip(taken, torch.stack(ranks, 1).tolist(), strict=True))

    def _of_all(self, name: str, taken: Mapping[str, float]) -> Times:
        return Times(self.job.model, self._depths, {depth: taken[f"{name} {depth}"] for depth in self._depths})

    def _measure(self, kind: str, variant: str, measure: Callable[[], dict[str, Any]]) -> None:
        found: dict[str, Any]
        try:
            found = {"ok": True, "reason": None} | measure()
        except VidaccelError as error:  # all ranks are told the same
            found = {"ok": False, "reason": str(error)}
        gc.collect()
        model = self.job.model
        row = {
            "key": self._key(kind, variant),
            "model": model.name,
            "size": list(self.job.size),
            "grid": list(self.grid),
            "tokens": self.grid.tokens,
            "text": model.joint_text,
            "heads": model.heads,
            "ranks": self._ranks,
            "kind": kind,
            "variant": variant,
            "compiled": self.job.compiled,
            **found,
            "clock_mhz": timing.clock_mhz() if self._device.type == "cuda" else None,
        }
        self.rows.add(row)
        self._say(row)

    def _key(self, kind: str, variant: str) -> str:
        job = self.job
        size = "x".join(map(str, job.size))
        how = f"{'compiled' if job.compiled else 'eager'}, {job.layers} layers, {self._ranks} ranks"
        return f"{job.model.name}, {size}, {str(job.dtype).removeprefix('torch.')}, {kind} {variant}, {how}"


def _variant(pattern: Pattern, density: float | None) -> str:
    return pattern.name if density is None else f"{pattern.name} {density:g}"
