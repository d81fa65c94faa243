"""`vidaccel bench model`: one call of a transformer of real size, accelerated, against the stock one at its fastest.

Weights are random: time does not depend on them. What a layer costs is the difference of two depths, so that embedding
and head are told apart and any model fits; `whole` builds it in full and checks the sum. Every comparison is made of
interleaved calls of one process, a few patterns and dense in turns, on the same inputs and the same dense backend.

The record (schema 1) is {"schema", "what": "model", "versions", "device", "system", "rows"}. A row has
    key, model, size, grid, tokens, text, variant, compiled, commit
    kind                  "dense", "sparse", "peer", "cache" or "trajectory"
    ok, reason            whether there is a figure, and why not
    first_s               seconds of the first call at the largest depth: planning, compiling, checks
    base_ms, layer_ms     a call with one block in each list; what one more block of each list costs
    call_ms, whole_ms     all blocks, as the sum of these; measured in full (`whole`)
    weights_gib, activations_gib     of all blocks; most memory that a call takes beside them
    clock_mhz             of the GPU after the row
and, where it is sparse or a peer,
    against, against_ms, speedup     the dense row that ran side by side, its time in that very run, and the ratio
and, where it is sparse,
    requested, delivered, visited    densities; visited also over text (`visited_pairs`)
    bound_ms, bound, reached         the dense call with its attention scaled by the visited pairs, the speed-up that
                                     would be, and how much of it there is
    split                 {list: {part: ms}} of one block, in a pass with watches; compiled by the time of its ops, and
                          of layer_ms what is left is the rest; dense rows have it too
    watched_layer_ms      eager: one block in that pass: beside layer_ms, what the watches cost
    kernel_ms, kernel_alone_ms       attention in the layer; eager, the same call of it alone
    kernels               which ran
`steps_bench.py` adds cache rows, with full_ms, skipped_ms (by branch), skipped_share (of a full call) and cache_bytes,
and trajectory rows, with steps, computed_steps, calls, cache_bytes, seconds, dense_seconds (steps x calls a step x the
dense call) and speedup.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch

from ..errors import UsageError, VidaccelError
from ..patterns import Pattern
from ..pipelines.zoo import RealModel, build, parameters
from . import pieces, timing
from .estimate import kept_pairs
from .peers import Peer
from .rivals import Context, rivals
from .rows import Rows
from .sides import Planned, Side, Times, shapes, twin

# So many are measured in turns with one dense model, and are rows when all of them are.
TOGETHER = 5


@dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        model: which.
        size: (height, width, frames).
        device: "cuda" or "cpu".
        dtype: of the weights.
        layers: how many layers are timed, beside the first.
        repeats: rounds of interleaved calls; the median counts.
        compiled: measure everything compiled, too.
        whole: also build and time all layers.
        videos: build all layers, for `steps_bench.trajectory`.
        dense: names of the dense backends to try (see `rivals.py`); all that are here without any.
    """

    model: RealModel
    size: tuple[int, int, int]
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    layers: int = 4
    repeats: int = 5
    compiled: bool = False
    whole: bool = False
    videos: bool = False
    dense: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Entry:
    """What is measured beside the fastest dense backend.

    Attributes:
        kind: of its row.
        variant: of its row.
        how: what makes its sides; see `ModelBench.side`.
        figures: what its row says beside times, from its sides, those times, and whether they are compiled.
        reason: why it is not measured.
    """

    kind: str
    variant: str
    how: Mapping[str, Any]
    figures: Callable[[dict[str, Side], dict[str, Any], bool], dict[str, Any]]
    reason: str | None = None


class ModelBench:
    """Measures one model at one size.

    Args:
        job: what to measure.
        rows: where to; what is there already is not measured again.
        say: told of every row.

    Attributes:
        job: what is measured.
        rows: what was measured.
        grid: video tokens.
        device: where.
        depths: how many blocks each list has in the calls that are timed: `shapes`, and "whole" where the job is.
        inputs: of calls, by whether padded text is trimmed.
    """

    def __init__(self, job: Job, rows: Rows, say: Callable[[dict[str, Any]], None] = lambda row: None) -> None:
        self.job = job
        self.rows = rows
        self.grid = job.model.grid(*job.size)
        self._say = say
        self.device = torch.device(job.device)
        self.depths = shapes(job.model, job.layers)
        if job.whole:
            self.depths["whole"] = dict(job.model.layers)
        self._rivals = self._dense_rivals()
        deepest = {name: max(shape[name] for shape in self.depths.values()) for name in job.model.layers}
        self._full = build(job.model if job.videos else job.model.with_layers(deepest), job.device, job.dtype)
        self.inputs = {
            trimmed: job.model.inputs(self.grid, job.device, job.dtype, trimmed=trimmed)
            for trimmed in ((False, True) if job.model.padded else (False,))
        }
        self._weights = parameters(job.model) * job.dtype.itemsize / 2**30

    def run(self, patterns: Sequence[tuple[Pattern, float | None]], peers: Sequence[Peer] = ()) -> None:
        """Measure the dense backends, then every pattern and every peer beside the fastest."""
        kinds = (False, True) if self.job.compiled else (False,)
        if self.job.compiled:
            # Each list of blocks and each pattern is a graph of its own.
            torch._dynamo.config.recompile_limit = 256
        for compiled in kinds:
            self.dense(compiled)
        entries = [self._sparse(pattern, density) for pattern, density in patterns] + [self._peer(one) for one in peers]
        for begin in range(0, len(entries), TOGETHER):
            for compiled in kinds:
                self._together(entries[begin : begin + TOGETHER], compiled)

    def dense(self, compiled: bool) -> None:
        """One row for each dense backend; compiled, for the fastest of them that compiles."""
        names = [row["variant"] for row in self._dense_rows(False)] if compiled else list(self._rivals)
        sides: dict[str, dict[str, Side]] = {}
        started: dict[str, dict[str, Any]] = {}
        for name in names:
            if compiled and (sides or self._dense_rows(True)):
                break
            if self.rows.find(self._key("dense", name, compiled)) is None:
                side = self._sides(name, compiled=compiled)
                started[name] = self._first(side)
                if started[name]["ok"]:
                    sides[name] = side
                else:
                    self._add("dense", name, compiled, started[name])
        times = self._times(sides)
        for name, side in sides.items():
            found = started[name] | _figures(times[name])
            found |= self._split_compiled(side, found["layer_ms"]) if compiled else self._split(side)
            self._add("dense", name, compiled, found)

    def _sparse(self, pattern: Pattern, density: float | None) -> Entry:
        """A pattern beside the fastest dense backend."""
        planned = Planned(pattern)

        def figures(side: dict[str, Side], found: dict[str, Any], compiled: bool) -> dict[str, Any]:
            densities = self._densities(planned)
            calls = [call for one in side.values() if one.run for call in one.run.trace.calls]
            return {
                **densities,
                "kernels": sorted({name for call in calls for name in call.kernels}),
                **self._bound(found["call_ms"], found["against_ms"], densities["visited_pairs"], compiled),
                **(self._split_compiled(side, found["layer_ms"]) if compiled else self._split(side)),
            }

        variant = pattern.name if density is None else f"{pattern.name} {density:g}"
        return Entry("sparse", variant, {"attention": planned, "density": density}, figures)

    def _peer(self, peer: Peer) -> Entry:
        """Another project's attention beside the fastest dense backend."""
        reason = None
        if peer.kind == "cache":
            reason = "it decides from step to step; `vidaccel bench render` shows what it does"
        elif peer.whole:
            reason = "it takes whole pipelines only; `vidaccel bench render` has one"
        return Entry("peer", str(peer), {"peer": peer}, lambda side, found, compiled: {}, reason)

    def _together(self, entries: Sequence[Entry], compiled: bool) -> None:
        """A row for each entry, all of them and the fastest dense backend in turns."""
        entries = [one for one in entries if self.rows.find(self._key(one.kind, one.variant, compiled)) is None]
        found: dict[Entry, dict[str, Any]] = {}
        sides: dict[Entry, dict[str, Side]] = {}
        backends = self._dense_rows(compiled)
        best = backends[0]["variant"] if backends else ""
        for one in entries:
            found[one] = {"ok": False, "reason": one.reason if backends else _NO_DENSE}
            if found[one]["reason"] is None:
                sides[one], found[one] = self._started(best, compiled, one)
        ready = [one for one in entries if found[one]["ok"]]
        try:
            times = self._beside({str(index): sides[one] for index, one in enumerate(ready)}, best, compiled)
        except Exception as error:
            found |= {one: {"ok": False, "reason": _reason(error)} for one in ready}
            ready = []
        for index, one in enumerate(ready):
            mine, other = times[str(index)], times["dense"].call
            found[one] |= _figures(mine) | {"against": best, "against_ms": other, "speedup": other / mine.call}
            try:
                found[one] |= one.figures(sides[one], found[one], compiled)
            except Exception as error:
                found[one] = {"ok": False, "reason": _reason(error)}
        for one in entries:
            self._add(one.kind, one.variant, compiled, found[one])
        sides.clear()
        gc.collect()

    def _beside(self, sides: dict[str, dict[str, Side]], rival: str, compiled: bool) -> dict[str, Times]:
        """Times of these and of a dense backend."""
        if not sides:
            return {}
        dense = self._sides(rival, compiled=compiled)
        for each in dense.values():
            each()
        return self._times({**sides, "dense": dense})

    def _started(self, rival: str, compiled: bool, entry: Entry) -> tuple[dict[str, Side], dict[str, Any]]:
        """The sides of an entry, and what its first calls tell."""
        try:
            side = self._sides(rival, compiled=compiled, **entry.how)
            return side, self._first(side)
        except Exception as error:
            return {}, {"ok": False, "reason": _reason(error)}

    def measure(self, kind: str, variant: str, compiled: bool, measure: Callable[[], dict[str, Any]]) -> None:
        """Add the row that `measure` makes, or one with the reason why there is none."""
        if self.rows.find(self._key(kind, variant, compiled)) is not None:
            return
        if not self._dense_rows(compiled):
            found: dict[str, Any] = {"ok": False, "reason": _NO_DENSE}
        else:
            try:
                found = {"ok": True, "reason": None} | measure()
            except Exception as error:
                found = {"ok": False, "reason": _reason(error)}
        gc.collect()
        self._add(kind, variant, compiled, found)

    def _dense_rivals(self) -> dict[str, tuple[Context, bool]]:
        """Contexts by name, and whether the caller trims padded text."""
        model = self.job.model
        found = {n: (c, False) for n, c in rivals(self.device, self.grid.tokens, model.padded).items()}
        if model.padded:
            trimmed = rivals(self.device, self.grid.tokens, False)
            found |= {f"{name} (text trimmed)": (context, True) for name, context in trimmed.items()}
        asked = self.job.dense or tuple(found)
        if unknown := [name for name in asked if name not in found]:
            raise UsageError(f"dense backend {unknown[0]!r} is not here; here are {', '.join(found)}")
        return {name: found[name] for name in asked}

    @property
    def deepest(self) -> str:
        """The depth with the most layers that is not all of them."""
        return next(name for name in reversed(self.depths) if name != "whole")

    def side(self, rival: str, depth: str | None, peer: Peer | None = None, **how: Any) -> Side:
        """The model on one dense backend, with a peer's attention over it.

        Args:
            rival: the dense backend.
            depth: one of `depths`; None is all layers, which a job of videos has.
            peer: whose attention.
            how: see `Side`.
        """
        context, trimmed = self._rivals[rival]
        if peer is not None:
            context = _over(context, lambda: peer.around(None, self.grid))
        # Accelerated, a model gets what its pipeline passes: the text's padding is ours to deal with.
        accelerated = how.get("attention") is not None or how.get("cache") is not None
        inputs = self.inputs[trimmed and not accelerated]
        shape = self.depths[depth] if depth is not None else self.job.model.layers
        return Side(twin(self._full, shape), self.job.model, inputs, context, **how)

    def _sides(self, rival: str, **how: Any) -> dict[str, Side]:
        return {depth: self.side(rival, depth, **how) for depth in self.depths}

    def _first(self, sides: dict[str, Side]) -> dict[str, Any]:
        """First calls at every depth: whether they work, how long the first of all took, most memory of the last."""
        seconds, held, found = 0.0, 0.0, timing.First(0.0, None, None)
        for side in sides.values():
            held = torch.cuda.memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0
            found = timing.first(side, self.device)
            seconds += found.seconds
            if found.reason is not None:
                break
        return {
            "ok": found.reason is None,
            "reason": found.reason,
            "first_s": seconds,
            "weights_gib": self._weights,
            "activations_gib": None if found.peak_gib is None else found.peak_gib - held,
        }

    def _times(self, sides: Mapping[str, dict[str, Side]]) -> dict[str, Times]:
        calls = {f"{name}\n{depth}": side for name, found in sides.items() for depth, side in found.items()}
        taken = timing.interleaved(calls, self.job.repeats, self.device)
        return {
            name: Times(self.job.model, self.depths, {depth: taken[f"{name}\n{depth}"] for depth in found})
            for name, found in sides.items()
        }

    def _split(self, sides: dict[str, Side]) -> dict[str, Any]:
        """Where the time of one block of each list goes, and the kernel alone."""
        split: dict[str, dict[str, float]] = {}
        blocks: dict[str, float] = {}
        alone = None
        for name in self.job.model.layers:
            side = sides.get(name, sides["base"])
            with pieces.watched(side.transformer, self.grid.tokens) as found:
                side()
            split[name], blocks[name] = found.split(name), found.block_ms(name)
            if found.kernel is not None and alone is None:
                kernel = found.kernel
                with torch.no_grad(), side.context():
                    kernel()
                    alone = timing.interleaved({"kernel": kernel}, self.job.repeats, self.device)["kernel"]
        first = next(iter(split.values()))
        return {
            "split": split,
            "watched_layer_ms": blocks,
            "kernel_ms": first["attention"] or None,
            "kernel_alone_ms": alone,
        }

    def _split_compiled(self, sides: dict[str, Side], layer_ms: dict[str, float]) -> dict[str, Any]:
        """The same of a compiled model: what one block more adds to the time in our ops."""
        in_ops = {depth: pieces.in_ops(sides[depth], self.device, self.grid.tokens) for depth in ("base", *layer_ms)}
        split = {}
        for name, ms in layer_ms.items():
            more = self.depths[name][name] - 1
            parts = {part: (in_ops[name][part] - base) / more for part, base in in_ops["base"].items()}
            split[name] = {**parts, "rest": ms - sum(parts.values())}
        return {"split": split, "kernel_ms": next(iter(split.values()))["attention"]}

    def _densities(self, planned: Planned) -> dict[str, Any]:
        plans = list(planned.plans.values())
        visited = mean(plan.visited for plan in plans) if plans else 1.0
        return {
            "requested": plans[0].requested if plans else None,
            "delivered": mean(plan.delivered for plan in plans) if plans else 1.0,
            "visited": visited,
            "visited_pairs": kept_pairs(self.grid, self.job.model.joint_text, visited),
            "rule": plans[0].rule if plans else "",
        }

    def _bound(self, sparse: float, dense: float, visited: float, compiled: bool) -> dict[str, Any]:
        """The dense call with its attention scaled by the visited pairs, and how near to it the sparse call comes."""
        # Compiled dense rows of older records have no split.
        row = next(row for row in (self.best(compiled), self.best(False)) if "split" in row)
        attention = sum(
            count * (row["split"][name]["attention"] or row.get("kernel_alone_ms") or 0.0)
            for name, count in self.job.model.layers.items()
        )
        bound = dense - attention * (1 - min(1.0, visited))
        return {
            "dense_attention_ms": attention,
            "bound_ms": bound,
            "bound": dense / bound,
            "reached": bound / sparse,
        }

    def _dense_rows(self, compiled: bool) -> list[dict[str, Any]]:
        """Dense rows with a figure, fastest first."""
        found = [self.rows.find(self._key("dense", name, compiled)) for name in self._rivals]
        return sorted((row for row in found if row is not None and row["ok"]), key=lambda row: float(row["call_ms"]))

    def best(self, compiled: bool) -> dict[str, Any]:
        """The row of the fastest dense backend."""
        return self._dense_rows(compiled)[0]

    def _key(self, kind: str, variant: str, compiled: bool) -> str:
        job = self.job
        how = f"{'compiled' if compiled else 'eager'}, {job.layers} layers{', whole' if job.whole else ''}"
        height, width, frames = job.size
        size = f"{job.model.name}, {height}x{width}, {frames} frames"
        return f"{size}, {job.device}, {str(job.dtype).removeprefix('torch.')}, {kind} {variant}, {how}"

    def _add(self, kind: str, variant: str, compiled: bool, found: dict[str, Any]) -> None:
        job = self.job
        row = {
            "key": self._key(kind, variant, compiled),
            "model": job.model.name,
            "size": list(job.size),
            "grid": list(self.grid),
            "tokens": self.grid.tokens,
            "text": job.model.joint_text,
            "kind": kind,
            "variant": variant,
            "compiled": compiled,
            **found,
            "clock_mhz": timing.clock_mhz() if self.device.type == "cuda" else None,
        }
        self.rows.add(row)
        self._say(row)


_NO_DENSE = "no dense backend ran, so there is nothing to compare with"


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, VidaccelError) else timing.why(error)


def _figures(times: Times) -> dict[str, Any]:
    return times.row() | {"whole_ms": times.ms.get("whole")}


def _over(context: Context, other: Context) -> Context:
    """Both, the second inside the first."""

    @contextlib.contextmanager
    def both() -> Iterator[None]:
        with context(), other():
            yield

    return both
