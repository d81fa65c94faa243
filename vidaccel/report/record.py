"""The report as data: what was asked, what ran, how long it took, and where."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

from ..env import environment
from ..files import replacing
from ..patterns import Plan
from ..recipe import Recipe
from ..trace import CallRecord, Trace
from . import pages
from .quality import Frames

# Of `report.schema.json`, which says what each key holds. A key more keeps it, any other change raises it.
SCHEMA = 1


@dataclass(frozen=True)
class Report:
    """A finished run.

    Attributes:
        data: plain data, what `report.json` holds; `schema` in it names its version.
        videos: (f, h, w, 3) bytes by name, the reference first; the page shows them.
        fps: frames in a second of these.
    """

    data: dict[str, Any]
    videos: Mapping[str, Frames] = field(default_factory=dict, repr=False, compare=False)
    fps: float = 16

    @classmethod
    def of(
        cls,
        trace: Trace,
        recipe: Recipe,
        plans: Iterable[Plan],
        pipeline: str,
        quality: dict[str, Any] | None = None,
        *,
        sites: Sequence[str] = (),
        videos: Mapping[str, Frames] | None = None,
        fps: float = 16,
    ) -> Report:
        """Collect a report from a trace. Waits for a GPU's timers.

        Args:
            trace: what ran.
            recipe: what was asked for.
            plans: the masks.
            pipeline: its class.
            quality: from `quality.measure`, where there is a reference.
            sites: names of the layers that can run sparse, in the order of execution.
            videos: see `Report`.
            fps: see `Report`.
        """
        calls = [call for call in trace.calls if not call.failed]
        cached = any(call.cache_bytes is not None for call in calls)
        return cls(
            {
                "schema": SCHEMA,
                "pipeline": pipeline,
                "recipe": recipe.to_dict(),
                "recipe_hash": recipe.hash,
                "summary": _summary(calls),
                "plans": [_plan(plan) for plan in plans],
                "sites": list(sites),
                "calls": [_call(call, calls, cached, sites) for call in calls],
                "failed_calls": len(trace.calls) - len(calls),
                "notes": list(trace.notes),
                "quality": quality,
                "seconds": None,
                "environment": environment(),
            },
            videos or {},
            fps,
        )

    @property
    def summary(self) -> dict[str, Any]:
        """Densities and times of the whole run."""
        return dict(self.data["summary"])

    def with_seconds(self, seconds: Mapping[str, float]) -> Report:
        """The same with the times of the whole render: "denoise", "decode" and "total", in seconds."""
        return replace(self, data={**self.data, "seconds": dict(seconds)})

    def to_json(self) -> str:
        """`report.json`."""
        return json.dumps(self.data, indent=1) + "\n"

    def to_markdown(self) -> str:
        """A page that pastes into a pull request or a model card."""
        return pages.markdown(self.data)

    def to_html(self) -> str:
        """One self-contained page, its videos in it."""
        return pages.html(self.data, self.videos, self.fps)

    def save(self, folder: str | Path) -> Path:
        """Write report.json, report.md and report.html, each whole or not at all. Returns the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (
            ("report.json", self.to_json()),
            ("report.md", self.to_markdown()),
            ("report.html", self.to_html()),
        ):
            with replacing(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return folder


def _summary(calls: list[CallRecord]) -> dict[str, Any]:
    times = [call.watch.ms for call in calls if call.watch is not None]
    sparse = [density for call in calls for density in call.densities()]
    drift = [float(share) for call in calls for share in call.drift.values()]
    kernels: dict[str, int] = {}
    for name in (name for call in calls for name in call.kernels):
        kernels[name] = kernels.get(name, 0) + 1
    return {
        "calls": len(calls),
        "steps": len({(call.step, call.expert) for call in calls}),
        "sparse_layer_calls": len(sparse),
        "dense_layer_calls": sum(len(call.dense) for call in calls),
        "delivered_density": sum(sparse) / len(sparse) if sparse else None,
        "effective_density": _effective(calls),
        # Of the blocks chosen at one step, how many were not among those chosen before; None where no choice is kept.
        "selection_drift": sum(drift) / len(drift) if drift else None,
        "kernels": kernels,
        "transformer_ms": sum(ms for ms in times if ms is not None),
        **_cache_summary(calls),
    }


def _cache_summary(calls: list[CallRecord]) -> dict[str, Any]:
    """Which steps were computed and what that saved; None everywhere without a cache."""
    cached = [call for call in calls if call.cache_bytes is not None]
    computed = {(call.trajectory, call.step) for call in cached if not call.forecast}
    forecast = {(call.trajectory, call.step) for call in cached if call.forecast} - computed
    return {
        "computed_steps": len(computed) if cached else None,
        "forecast_steps": len(forecast) if cached else None,
        "cache_bytes": max((call.cache_bytes or 0 for call in cached), default=None),
        "saved_ms": _saved(calls) if cached else None,
    }


def _saved(calls: list[CallRecord]) -> float:
    """Milliseconds: each forecast call against the median computed call of its kind, an estimate."""
    usual: dict[tuple[Any, ...], list[float]] = {}
    saved = 0.0
    for call in calls:
        if call.watch is not None and call.watch.ms is not None and not call.forecast:
            usual.setdefault((call.branch, call.expert, call.grid), []).append(call.watch.ms)
    for call in calls:
        whole = usual.get((call.branch, call.expert, call.grid))
        if call.forecast and whole and call.watch is not None:
            saved += median(whole) - (call.watch.ms or 0.0)
    return saved


def _effective(calls: list[CallRecord]) -> float | None:
    """Kept pairs over all pairs of the whole run: text, dense layers and dense steps included."""
    kept = total = 0.0
    for call in calls:
        video, text = call.grid.tokens, call.text
        around = 2 * video * text + text**2
        kept += sum(density * video**2 + around for density in call.densities())
        if call.guided == "both":
            kept += len(call.scheduled) * (video + text) ** 2
        kept += len(call.dense) * (video + text) ** 2
        total += (len(call.scheduled) + len(call.dense)) * (video + text) ** 2
    return kept / total if total else None


def _plan(plan: Plan) -> dict[str, Any]:
    layout = plan.layout
    return {
        "grid": str(layout.grid),
        "text": layout.text,
        "block": layout.block,
        "tile": layout.tile,
        "rule": plan.rule,
        "requested": plan.requested,
        "delivered": plan.delivered,
        "visited": plan.visited,
        "notes": list(plan.notes),
    }


def _call(call: CallRecord, calls: list[CallRecord], cached: bool, sites: Sequence[str]) -> dict[str, Any]:
    ran = dict.fromkeys(call.dense, 1.0) | dict(
        zip((name for name, _ in call.scheduled), call.densities(), strict=True)
    )
    return {
        "step": call.step,
        "total": call.total,
        "sigma": call.sigma,
        "branch": call.branch,
        "expert": call.expert,
        "grid": str(call.grid),
        "sparse_layers": len(call.scheduled),
        "dense_layers": len(call.dense),
        "kernels": sorted(set(call.kernels)),
        "kernels_ran": len(call.kernels),
        "ms": call.watch.ms if call.watch else None,
        # One a site, None where a cache stood in for it.
        "layer_density": [None if (share := ran.get(name)) is None else round(share, 4) for name in sites],
        **_chosen_call(call, calls),
        **(_cached_call(call) if cached else {}),
    }


def _chosen_call(call: CallRecord, calls: list[CallRecord]) -> dict[str, Any]:
    """What patterns that choose blocks did: the same columns for all calls, those that any of them fills."""
    found: dict[str, Any] = {}
    if any(each.held or each.drift for each in calls):
        drift = [float(share) for share in call.drift.values()]
        found |= {"held_layers": len(call.held), "drift": sum(drift) / len(drift) if drift else None}
    if any(each.measured for each in calls):
        kept = [float(share) for share in call.measured.values()]
        found["measured_density"] = sum(kept) / len(kept) if kept else None
    if any(each.guided for each in calls):
        found["guided"] = call.guided
    return found


def _cached_call(call: CallRecord) -> dict[str, Any]:
    return {
        "trajectory": call.trajectory,
        "forecast": call.forecast,
        "why": call.why,
        # JSON has no NaN; `why` says it.
        "gate_error": call.gate_error if call.gate_error is not None and isfinite(call.gate_error) else None,
        "true_error": call.true_error,
        "cache_bytes": call.cache_bytes,
    }
