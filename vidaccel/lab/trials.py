"""Renders of recipes beside the dense one of the same prompt and seed: each is made once, and its figures are kept.

A row has
    key, kind ("dense", "render"), prompt, hash, ok, reason
    recipe                in the first row of its hash
    work, seconds         PFLOP of the transformer that were counted (`work.py`); seconds of its calls, first-run cost
                          left out: calls of one kind count as often as there are, at their median
    work_speedup, time_speedup       the dense render's over these
    psnr, ssim, motion    against the dense frames: means over frames, and motion as a multiple of the dense one's
    computed_steps, effective_density, broken_frames
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from ..errors import VidaccelError, VidaccelWarning
from ..files import replacing
from ..recipe import Recipe
from ..render import DENSE, ReadyJob, Rendering, render
from ..report import quality
from . import timing
from .rows import Rows
from .work import counted

Row = dict[str, Any]
Say = Callable[[str], None]


class Trials:
    """Measures recipes on one pipeline.

    Args:
        pipe: where they run.
        job: size, steps, seed; prompts and recipes are put in its place.
        rows: what was measured before is not measured again.
        folder: for the frames of dense renders, which every later trial is compared with.
        say: told of each render.

    Attributes:
        job: as given.
        rows: likewise.
    """

    def __init__(self, pipe: Any, job: ReadyJob, rows: Rows, folder: Path, say: Say = lambda text: None) -> None:
        self.job = job
        self.rows = rows
        self._pipe = pipe
        self._folder = folder
        self._say = say
        self._dense: dict[str, quality.Frames] = {}

    @property
    def transformers(self) -> list[Any]:
        """The pipeline's, one or two."""
        found = (getattr(self._pipe, name, None) for name in ("transformer", "transformer_2"))
        return [each for each in found if each is not None]

    def render(self, recipe: Recipe, prompt: str) -> Rendering:
        """Render, and keep nothing."""
        with warnings.catch_warnings():
            # Patterns warn of what they cannot gain at a size; the figures say it.
            warnings.simplefilter("ignore", VidaccelWarning)
            return render(self._pipe, replace(self.job, prompt=prompt, recipe=recipe))

    def dense(self, prompt: str) -> tuple[Row, quality.Frames]:
        """Figures and frames of the dense render."""
        row, path = self.rows.find(_key("dense", prompt)), self._folder / f"dense-{_slot(self.job.seed, prompt)}.npy"
        if prompt not in self._dense and row is not None and path.is_file():
            self._dense[prompt] = np.load(path, allow_pickle=False)
        if row is None or prompt not in self._dense:
            rendering, figures = self._measured(DENSE, prompt)
            self._dense[prompt] = rendering.frames
            with replacing(path) as temporary:
                np.save(temporary, rendering.frames)
            if row is None:
                row = {"key": _key("dense", prompt), "kind": "dense", "prompt": prompt, "ok": True, "reason": None}
                row |= figures
                self.rows.add(row)
            self._say(f"dense: {figures['seconds']:.1f} s, {figures['work']:.3g} PFLOP, {prompt}")
        return row, self._dense[prompt]

    def measure(self, recipe: Recipe, prompt: str) -> Row:
        """Figures of a recipe; a render that fails is a row with the reason."""
        key = _key(recipe.hash, prompt)
        row = self.rows.find(key)
        if row is None:
            base, frames = self.dense(prompt)
            row = {"key": key, "kind": "render", "prompt": prompt, "hash": recipe.hash}
            if not any(other.get("hash") == recipe.hash for other in self.rows.rows):
                # Not what a preset says of itself.
                row["recipe"] = {k: v for k, v in recipe.to_dict().items() if k not in ("about", "evidence")}
            try:
                rendering, figures = self._measured(recipe, prompt)
                row |= {"ok": True, "reason": None, **figures, **_likeness(rendering.frames, frames)}
                row |= {f"{name}_speedup": base[key] / figures[key] for name, key in BY.items()}
            # Out of memory, a density that a pattern cannot give: the next one may run.
            except Exception as error:
                row |= {"ok": False, "reason": str(error) if isinstance(error, VidaccelError) else timing.why(error)}
            self.rows.add(row)
            self._say(_line(recipe, row))
        return row

    def _measured(self, recipe: Recipe, prompt: str) -> tuple[Rendering, Row]:
        with counted(self.transformers) as work:
            rendering = self.render(recipe, prompt)
        summary = rendering.report.summary
        return rendering, {
            "work": work.flops / 1e15,
            "seconds": settled(rendering.report.data["calls"]),
            "computed_steps": summary["computed_steps"],
            "effective_density": summary["effective_density"],
        }


BY = {"work": "work", "time": "seconds"}
"""What speed can be judged by, and the figure that says it."""


def settled(calls: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of a run's calls without what only first ones cost: each at the median of its kind."""
    kinds: dict[tuple[Any, ...], list[float]] = {}
    for call in calls:
        kind = (call["branch"], call["expert"], call.get("forecast"), call["sparse_layers"], call["dense_layers"])
        kinds.setdefault(kind, []).append(call["ms"] or 0.0)
    return sum(len(times) * median(times) for times in kinds.values()) / 1e3


def average(rows: Sequence[Row]) -> Row:
    """Means over prompts, and the worst."""
    names = ("work_speedup", "time_speedup", "psnr", "ssim", "motion", "work", "seconds")
    found: Row = {name: mean(row[name] for row in rows) for name in names if all(row.get(name) for row in rows)}
    return found | {"prompts": len(rows), "psnr_worst": min(row["psnr"] for row in rows)}


def describe(recipe: Recipe) -> str:
    """A recipe in a few words."""
    parts = []
    if recipe.attention is not None and recipe.attention.name != "dense":
        density = "" if recipe.density is None else f" {recipe.density:.3g}"
        schedule = recipe.schedule
        parts.append(f"{recipe.attention.name}{density} (blocks of {recipe.attention.block})")
        kept = {"dense steps": schedule.dense_steps, "dense layers": schedule.dense_layers}
        kept |= {"dense last steps": schedule.dense_last_steps}
        parts += [
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in kept.items()
            if value
        ]
    if recipe.cache is not None:
        knobs = {name: getattr(recipe.cache, name, None) for name in ("threshold", "interval", "warmup")}
        said = ", ".join(f"{name} {value:.3g}" for name, value in knobs.items() if value is not None)
        parts.append(f"{recipe.cache.name} ({said})" if said else recipe.cache.name)
    return ", ".join(parts) or "dense"


def _likeness(frames: quality.Frames, dense: quality.Frames) -> Row:
    found = quality.measure(frames, dense)
    means = found["mean"]
    return {
        "psnr": means["psnr_db"],
        "ssim": means["ssim"],
        "motion": means["motion_ratio"],
        "broken_frames": len(found["broken_frames"]),
    }


def _key(name: str, prompt: str) -> str:
    return f"{name}, {prompt}"


def _slot(seed: int, prompt: str) -> str:
    import hashlib

    return hashlib.sha256(f"{seed} {prompt}".encode()).hexdigest()[:12]


def _line(recipe: Recipe, row: Row) -> str:
    if not row["ok"]:
        return f"{describe(recipe)}: {row['reason']}"
    speed = f"{row['work_speedup']:.2f}x less work, {row['time_speedup']:.2f}x faster"
    return f"{describe(recipe)}: {speed}, {row['psnr']:.1f} dB, SSIM {row['ssim']:.3f}"
