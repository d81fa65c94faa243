"""Plots over the denoising steps of runs: where time went, how densely layers ran, what the gate of a cache saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from markupsafe import Markup

from . import plots

Calls = Sequence[Mapping[str, Any]]


def over_steps(runs: Mapping[str, Mapping[str, Any]]) -> list[Markup]:
    """Every plot for which there is a value.

    Args:
        runs: `report.json` of each run, by name.
    """
    calls: dict[str, Calls] = {name: run["calls"] for name, run in runs.items() if run["calls"]}
    lines = {"Time of the transformer, ms": _ms, "Share of layers that ran sparse": _sparse}
    lines["Error that the cache's gate saw"] = _gate
    drawn = [
        plots.bars("Time, seconds", {name: split(run) for name, run in runs.items() if run["calls"]}),
        *(
            plots.lines(title, {name: of(each) for name, each in calls.items()}, "step", zero=True)
            for title, of in lines.items()
        ),
    ]
    for name, each in calls.items():
        title = "Density of each layer (dark: 1; grey: not run, a cache stood in)" + (f", {name}" if name else "")
        drawn.append(plots.heat(title, _density(each), "step", "layer"))
    return [plot for plot in drawn if plot]


def split(run: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a run by what they went to; what lies outside the transformer only where the run was timed whole."""
    found = dict.fromkeys(("dense steps", "sparse steps", "forecast steps"), 0.0)
    for call in run["calls"]:
        kind = "forecast" if call.get("forecast") else "sparse" if call["sparse_layers"] else "dense"
        found[f"{kind} steps"] += (call["ms"] or 0.0) / 1e3
    if (seconds := run.get("seconds")) is not None:
        inside = sum(found.values())
        found["rest of denoising"] = max(0.0, seconds["denoise"] - inside)
        found["decoding"] = seconds["decode"]
        found["text and the rest"] = max(0.0, seconds["total"] - seconds["decode"] - max(seconds["denoise"], inside))
    return found


def _by_step(calls: Calls) -> list[list[Mapping[str, Any]]]:
    found: list[list[Mapping[str, Any]]] = [[] for _ in range(1 + max(call["step"] for call in calls))]
    for call in calls:
        found[call["step"]].append(call)
    return found


def _ms(calls: Calls) -> list[float | None]:
    times = [[call["ms"] for call in step if call["ms"] is not None] for step in _by_step(calls)]
    return [sum(each) if each else None for each in times]


def _sparse(calls: Calls) -> list[float | None]:
    found: list[float | None] = []
    for step in _by_step(calls):
        layers = sum(call["sparse_layers"] + call["dense_layers"] for call in step)
        found.append(sum(call["sparse_layers"] for call in step) / layers if layers else None)
    return found


def _gate(calls: Calls) -> list[float | None]:
    seen = [[e for call in step if (e := call.get("gate_error")) is not None] for step in _by_step(calls)]
    return [max(each) if each else None for each in seen]


def _density(calls: Calls) -> list[list[float | None]]:
    """Of each layer, then each step, the mean over its calls; None where nothing ran."""
    steps = _by_step(calls)
    layers = max(len(call.get("layer_density", ())) for call in calls)
    table: list[list[float | None]] = []
    for layer in range(layers):
        ran = [[x for c in step if (x := c["layer_density"][layer]) is not None] for step in steps]
        table.append([fmean(each) if each else None for each in ran])
    return table
