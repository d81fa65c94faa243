"""Thresholds found on recorded renders: `cache="auto:2.5x"` and `cache="auto:psnr>=28"`.

A threshold means nothing by itself, and another thing for each model. `vidaccel calibrate` renders a few prompts at
several thresholds and keeps what came out: steps over computed steps, and PSNR against the run without a cache. Between
measured thresholds both are interpolated; beyond them nothing is promised.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..files import replacing
from . import POLICIES
from .goal import Goal

SCHEMA = 1


@dataclass(frozen=True)
class Point:
    """What one threshold gave, on average over prompts.

    Attributes:
        threshold: of the policy.
        speedup: steps over computed steps.
        psnr: dB against the run without a cache.
    """

    threshold: float
    speedup: float
    psnr: float


@dataclass(frozen=True)
class Calibration:
    """What a policy gave on a model.

    Attributes:
        model: `model_key` of the transformer.
        cache: the policy's name.
        steps: denoising steps of the renders.
        prompts: those that were rendered.
        points: by ascending threshold.
    """

    model: str
    cache: str
    steps: int
    prompts: tuple[str, ...]
    points: tuple[Point, ...]

    def save(self) -> Path:
        """Write it where `load` finds it, replacing an older one of the model. Returns the file."""
        path = _path(self.model)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, model: str) -> Calibration:
        """The calibration of a model.

        Raises:
            RecipeError: there is none, or it cannot be read.
        """
        path = _path(model)
        if not path.is_file():
            raise RecipeError(
                f"a cache with a goal was asked for, but this model ({model}) was never calibrated on this machine; "
                "run `vidaccel calibrate --model ...` once, or name a cache such as cg-taylor"
            )
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            points = tuple(
                Point(*(float(each[name]) for name in ("threshold", "speedup", "psnr"))) for each in data["points"]
            )
            return cls(data["model"], data["cache"], int(data["steps"]), tuple(data["prompts"]), points)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecipeError(f"calibration {path} cannot be read ({error}); run `vidaccel calibrate` again") from None

    def threshold_for(self, goal: str) -> float:
        """The threshold that reaches a goal: the lowest for a speed, the highest for a quality.

        Args:
            goal: "auto:2.5x" or "auto:psnr>=28".

        Raises:
            RecipeError: neither of these, or a goal beyond what was measured.
        """
        wanted = Goal.of(goal.removeprefix("auto:"))
        if wanted.what == "ssim":
            raise RecipeError(
                f"cache {goal} was asked for; calibrations hold speed and psnr: auto:2.5x or auto:psnr>=28"
            )
        thresholds = [point.threshold for point in self.points]
        if wanted.what == "speedup":
            fastest = max(point.speedup for point in self.points)
            # A higher threshold is never slower: noise between neighbours is smoothed away.
            speeds = _running(max, [point.speedup for point in self.points])
            if not 1 <= wanted.least <= fastest:
                raise RecipeError(f"cache {goal}: {self.cache} gave 1x to {fastest:.2f}x here; ask for one of these")
            return _crossing(thresholds, speeds, wanted.least)
        best = max(point.psnr for point in self.points)
        losses = _running(max, [-point.psnr for point in self.points])
        if -wanted.least < losses[0]:
            raise RecipeError(f"cache {goal}: {self.cache} gave at most {best:.1f} dB here; ask for less, or no cache")
        return _crossing(thresholds, losses, -wanted.least, last=True)


def model_key(transformer_class: str, config: Mapping[str, Any]) -> str:
    """What calibrations of a transformer are filed under: its class and size."""
    names = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels")
    return "-".join([transformer_class, *(str(config.get(name)) for name in names)])


def calibrated(cache: Any, transformer_class: str, config: Mapping[str, Any]) -> Any:
    """What `cache` means: a goal becomes the policy that reaches it, as plain data; anything else stays as it is.

    Raises:
        RecipeError: see `Calibration`.
    """
    if not (isinstance(cache, str) and cache.startswith("auto:")):
        return cache
    Goal.of(cache.removeprefix("auto:"))  # What is no goal is told before what was never calibrated.
    found = Calibration.load(model_key(transformer_class, config))
    return {"name": found.cache, "threshold": found.threshold_for(cache), "steps": found.steps}


def usual_threshold(cache: str, family: str) -> float | None:
    """The published threshold of a policy, to begin a search with; None where it has none.

    Args:
        cache: the policy's name.
        family: of the model; where nobody published one for it, that of Wan.
    """
    policy = POLICIES[cache]
    if not hasattr(policy, "threshold"):
        return None
    return float(getattr(policy().parts(family, "480p").rule, "threshold"))  # noqa: B009


def _path(model: str) -> Path:
    home = os.environ.get("VIDACCEL_HOME") or Path.home() / ".cache" / "vidaccel"
    return Path(home) / "calibrations" / f"{re.sub('[^A-Za-z0-9.-]', '_', model)}.json"


def _running(best: Any, values: Sequence[float]) -> list[float]:
    found: list[float] = []
    for value in values:
        found.append(best(found[-1], value) if found else value)
    return found


def _crossing(xs: Sequence[float], ys: Sequence[float], wanted: float, last: bool = False) -> float:
    """The first x at which ascending ys reach a value, or the last one at which they have not passed it."""
    if last and ys[-1] <= wanted:
        return xs[-1]
    if not last and ys[0] >= wanted:
        return xs[0]
    for left in range(len(xs) - 1):
        below, above = ys[left], ys[left + 1]
        if below <= wanted < above if last else below < wanted <= above:
            return xs[left] + (wanted - below) / (above - below) * (xs[left + 1] - xs[left])
    raise AssertionError(f"{wanted} does not lie within {ys[0]} to {ys[-1]}")
