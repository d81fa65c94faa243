"""Caches found on recorded renders: `cache="auto:2.5x"` and `cache="auto:psnr>=28"`.

A threshold means nothing by itself, and another thing for each model; and which policy is the best depends on the model
and on the goal. `vidaccel calibrate` renders a few prompts with several policies, each turned from careful to bold, and
keeps what came out: steps over computed steps, and PSNR against the run without a cache. A goal is met by the policy
that loses least at this speed, or that is fastest at this quality. Between measured points all is interpolated; beyond
them nothing is promised.
"""

from __future__ import annotations

import itertools
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

SCHEMA = 3


@dataclass(frozen=True)
class Point:
    """What one setting gave, on average over prompts.

    Attributes:
        value: of the policy's knob.
        speedup: steps over computed steps.
        psnr: dB against the run without a cache.
    """

    value: float
    speedup: float
    psnr: float


@dataclass(frozen=True)
class Curve:
    """What a policy gave.

    Attributes:
        cache: the policy's name.
        points: from careful to bold.
    """

    cache: str
    points: tuple[Point, ...]

    def reaching(self, goal: Goal) -> Point | None:
        """The most careful point that is as fast, or the boldest one that is as good; None beyond what was measured."""
        # A bolder one is never slower, and never better: noise between neighbours is smoothed away.
        if goal.what == "speedup":
            ys, wanted = _running([point.speedup for point in self.points]), goal.least
            if ys[-1] < wanted:
                return None
        else:
            ys, wanted = _running([-point.psnr for point in self.points]), -goal.least
            if wanted < ys[0]:
                return None
        left, share = _crossing(ys, wanted, last=goal.what == "psnr")
        before, after = self.points[left], self.points[min(left + 1, len(ys) - 1)]
        bold = [_turned(self.cache, point.value) for point in (before, after)]
        return Point(
            _turned(self.cache, bold[0] + share * (bold[1] - bold[0])),
            before.speedup + share * (after.speedup - before.speedup),
            before.psnr + share * (after.psnr - before.psnr),
        )


@dataclass(frozen=True)
class Calibration:
    """What policies gave on a model.

    Attributes:
        model: `model_key` of the transformer.
        steps: denoising steps of the renders.
        prompts: those that were rendered.
        curves: of the policies.
    """

    model: str
    steps: int
    prompts: tuple[str, ...]
    curves: tuple[Curve, ...]

    def save(self) -> Path:
        """Write it where `load` finds it, replacing an older one of the model. Returns the file."""
        path = _path(self.model)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, model: str, called: str = "") -> Calibration:
        """The calibration of a model, by its `model_key`; `called` is what the user calls it.

        Raises:
            RecipeError: there is none, or it cannot be read.
        """
        path = _path(model)
        if not path.is_file():
            raise RecipeError(
                f"a cache with a goal was asked for, but {called or 'this model'} was never calibrated on this machine "
                f"(there is no {path}); run `vidaccel calibrate --model {called or '...'}` once, or name a cache such "
                "as cg-taylor"
            )
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["schema"] != SCHEMA:
                # Before 3, models of one size shared a file, whatever the number of their experts.
                raise RecipeError(
                    f"calibration {path} was made by an older vidaccel, which took models of one size for each other; "
                    f"run `vidaccel calibrate --model {called or '...'}` again"
                )
            curves = tuple(Curve(each["cache"], tuple(map(_point, each["points"]))) for each in data["curves"])
            return cls(data["model"], int(data["steps"]), tuple(data["prompts"]), curves)
        except RecipeError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecipeError(f"calibration {path} cannot be read ({error}); run `vidaccel calibrate` again") from None

    def policy_for(self, goal: str) -> dict[str, Any]:
        """The policy that reaches a goal best, as plain data.

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
        names = " and ".join(curve.cache for curve in self.curves)
        found = {curve.cache: point for curve in self.curves if (point := curve.reaching(wanted)) is not None}
        points = [point for curve in self.curves for point in curve.points]
        if wanted.what == "speedup":
            if not found or wanted.least < 1:
                fastest = max(point.speedup for point in points)
                raise RecipeError(f"cache {goal}: {names} gave 1x to {fastest:.2f}x here; ask for one of these")
            name = max(found, key=lambda name: found[name].psnr)
        else:
            if not found:
                best = max(point.psnr for point in points)
                raise RecipeError(f"cache {goal}: {names} gave at most {best:.1f} dB here; ask for less, or no cache")
            name = max(found, key=lambda name: found[name].speedup)
        return {"name": name, str(knob(name)): found[name].value, "steps": self.steps}


def knob(cache: str) -> str | None:
    """What makes a policy bolder: a higher threshold, or a lower share of steps to compute; None where neither is."""
    return next((name for name in ("threshold", "share") if hasattr(POLICIES[cache], name)), None)


def model_key(transformer_class: str, config: Mapping[str, Any], experts: int) -> str:
    """What calibrations of a pipeline are filed under: its transformer's class and size, and how many of them it has.

    Wan 2.1 14B and Wan 2.2 A14B differ in their number alone.
    """
    names = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels")
    several = [f"{experts}-experts"] if experts > 1 else []
    return "-".join([transformer_class, *(str(config.get(name)) for name in names), *several])


def calibrated(
    cache: Any, transformer_class: str, config: Mapping[str, Any], experts: int = 1, called: str = ""
) -> Any:
    """What `cache` means: a goal becomes the policy that reaches it, as plain data; anything else stays as it is.

    Args:
        cache: a goal, or anything else.
        transformer_class: name of the transformer's class.
        config: of the transformer.
        experts: how many transformers the pipeline has.
        called: what the user calls the model, for errors.

    Raises:
        RecipeError: see `Calibration`.
    """
    if not (isinstance(cache, str) and cache.startswith("auto:")):
        return cache
    Goal.of(cache.removeprefix("auto:"))  # What is no goal is told before what was never calibrated.
    return Calibration.load(model_key(transformer_class, config, experts), called).policy_for(cache)


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


def _point(data: Mapping[str, Any]) -> Point:
    return Point(*(float(data[name]) for name in ("value", "speedup", "psnr")))


def _turned(cache: str, value: float) -> float:
    """A knob's value as what grows evenly with boldness, and back: shares of computed steps are turned over."""
    return 1 / value if knob(cache) == "share" else value


def _running(values: Sequence[float]) -> list[float]:
    return list(itertools.accumulate(values, max))


def _crossing(ys: Sequence[float], wanted: float, last: bool) -> tuple[int, float]:
    """Where ascending ys first reach a value, or last have not passed it: the place to the left, and how far beyond."""
    if last and ys[-1] <= wanted:
        return len(ys) - 1, 0.0
    if not last and ys[0] >= wanted:
        return 0, 0.0
    for left, (below, above) in enumerate(itertools.pairwise(ys)):
        if below <= wanted < above if last else below < wanted <= above:
            return left, (wanted - below) / (above - below)
    raise AssertionError(f"{wanted} does not lie within {ys[0]} to {ys[-1]}")
