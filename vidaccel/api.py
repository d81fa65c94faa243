"""The front of the library: `accelerate`, `attn_processors` and `remove`."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from .caching import Cache, CachePolicy
from .caching.cache import Trajectories
from .caching.calibration import calibrated
from .choices import Choices
from .errors import InstallError, VidaccelWarning
from .family import unwrap
from .frontdoor import Clock, FrontDoor
from .install import Installation
from .patterns import Pattern
from .recipe import Recipe, pattern_from, policy_from
from .report import Report
from .report.quality import frames_of, measure
from .schedule import DENSE, Schedule
from .trace import Trace

# A quarter of the steps and the first layer dense: the authors' rule of thumb for radial attention (its issue 46: steps
# // 4; scripts: one dense layer on Wan).
DEFAULT_SCHEDULE = Schedule(dense_steps=0.25, dense_layers=1)


class Acceleration:
    """An accelerated pipeline: leave its `with` block, or call `remove`, and the pipeline is what it was.

    Attributes:
        recipe: what runs.
        trace: what ran so far.
    """

    def __init__(
        self, pipe: Any, recipe: Recipe, installations: list[Installation], caches: list[Cache], trace: Trace
    ) -> None:
        self.recipe = recipe
        self.trace = trace
        self._pipeline = type(pipe).__name__
        self._installations = installations
        self._caches = caches
        self._active = True

    def report(self, frames: Any = None, *, against: Any = None, fps: float = 16) -> Report:
        """What ran so far: densities, kernels, forecast steps and times of every call, settings, environment.

        Args:
            frames: the video that was made: (f, h, w, 3) in [0, 1], bytes, a tensor (f, 3, h, w), or a list of images.
            against: the same prompt and seed without acceleration; both together add what was lost, and the page shows
                both videos side by side.
            fps: frames in a second, of the players.

        Raises:
            VideoError: one of the two is missing, or their sizes differ.
        """
        plans = [plan for installation in self._installations for plan in installation.plans.values()]
        sites = [site.name for installation in self._installations[:1] for site in installation.sites]
        lost = None if frames is None and against is None else measure(frames, against)
        videos = {} if lost is None else {"reference": frames_of(against), "accelerated": frames_of(frames)}
        return Report.of(self.trace, self.recipe, plans, self._pipeline, lost, sites=sites, videos=videos, fps=fps)

    def remove(self) -> None:
        """Give the pipeline its own processors back. A second call does nothing."""
        if not self._active:
            return
        self._active = False
        for cache in self._caches:
            cache.remove()
        for installation in self._installations:
            _remove(installation)

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def accelerate(
    pipe: Any,
    attention: str | Pattern | None = None,
    *,
    density: float | None = None,
    cache: str | CachePolicy | None = None,
    schedule: Schedule | None = None,
    recipe: Recipe | str | Path | None = None,
) -> Acceleration:
    """Make a diffusers video pipeline sparse, cached or both, until the returned handle is removed.

    Args:
        pipe: a pipeline whose `transformer` (and `transformer_2`) is of a known family: stock classes, any weights;
            LoRA, offload or compile enabled before or after.
        attention: a pattern's name ("radial") or a pattern.
        density: fraction of video-video pairs that sparse layers keep, in (0, 1].
        cache: what is kept from step to step: a policy's name ("cg-taylor"), a policy (`vidaccel.caching`), or a goal
            ("auto:2.5x", "auto:psnr>=28") that `vidaccel calibrate` has measured on this model.
        schedule: which steps and layers stay dense. Without one, and without a recipe, the first quarter of the steps
            and the first layer do.
        recipe: a preset's name, a file, or a `Recipe`; the arguments above replace its values.

    Returns:
        A handle with `.report()` and `.remove()`, also a context manager.

    Raises:
        InstallError: the pipeline has no transformer of a known family, is accelerated already, or nothing was asked.
        PatternError: a density outside (0, 1], one that the pattern cannot give, or none for one that needs it.
        RecipeError: an unknown pattern, cache, preset or setting, or a schedule that is none.

    Example:
        >>> with vidaccel.accelerate(pipe, "radial", density=0.25, cache="cg-taylor") as run:
        ...     video = pipe("a cat playing piano", num_frames=81).frames[0]
        >>> run.report().save("out/")
    """
    base = (
        recipe if isinstance(recipe, Recipe) else Recipe.load(recipe) if recipe else Recipe(schedule=DEFAULT_SCHEDULE)
    )
    pattern, policy = pattern_from(attention), _policy(pipe, cache)
    whole = base.merge(attention=pattern, density=density, schedule=schedule, cache=policy)
    if whole.attention is None and whole.cache is None:
        raise InstallError(
            "nothing to do was given: name an attention pattern (such as 'radial'), a cache (such as 'cg-taylor') or a "
            "recipe"
        )
    if whole.attention is None and whole.density is not None:
        raise InstallError(f"density {whole.density} was asked for without an attention pattern; name one as well")
    if whole.attention is None and schedule is not None:
        warnings.warn(
            "a schedule was given without an attention pattern, and has no effect: a cache has its own warmup= and "
            "last=; name a pattern as well, or drop it",
            VidaccelWarning,
            stacklevel=2,
        )
    transformers = {name: getattr(pipe, name, None) for name in ("transformer", "transformer_2")}
    found = {name: module for name, module in transformers.items() if isinstance(module, nn.Module)}
    if not found:
        raise InstallError(f"{type(pipe).__name__} has no transformer; a diffusers video pipeline is needed")
    for module in found.values():
        if FrontDoor.open_door(module) is not None:
            raise InstallError(
                f"this {type(module).__name__} is accelerated already; call .remove() on that acceleration, or "
                "vidaccel.remove(transformer), first. Attention and cache are given in one call"
            )
    clock, trace = Clock(lambda: getattr(pipe, "_num_timesteps", None)), Trace()
    installations: list[Installation] = []
    caches: list[Cache] = []
    trajectories, choices = Trajectories(), Choices()
    try:
        for name, module in found.items():
            expert = {"transformer": "high", "transformer_2": "low"}[name] if len(found) == 2 else None
            if whole.attention is not None:
                installations.append(
                    Installation.of(
                        module,
                        whole.attention,
                        density=DENSE if whole.attention.name == "dense" else whole.density,
                        schedule=whole.schedule,
                        clock=clock,
                        trace=trace,
                        expert=expert,
                        choices=choices,
                    )
                )
                installations[-1].place()
            if whole.cache is not None:
                caches.append(
                    Cache.of(module, whole.cache, clock=clock, trace=trace, expert=expert, trajectories=trajectories)
                )
    except BaseException:
        for started in caches:
            started.remove()
        for installation in installations:
            installation.remove()
        raise
    return Acceleration(pipe, whole, installations, caches, trace)


def attn_processors(
    transformer: nn.Module,
    attention: str | Pattern,
    *,
    density: float | None = None,
    schedule: Schedule | None = None,
    num_inference_steps: int | None = None,
) -> dict[str, Any]:
    """Processors for `transformer.set_attn_processor`: a complete dict, one object for every attention layer.

    Layers that are no video self-attention keep the very object that stands there. `vidaccel.remove(transformer)` gives
    the others theirs back.

    Args:
        transformer: a transformer of a known family.
        attention: a pattern's name or a pattern.
        density: fraction of video-video pairs kept, in (0, 1].
        schedule: which steps and layers stay dense; all are sparse without one.
        num_inference_steps: needed by schedules with fractions or dense last steps.

    Raises:
        InstallError: an unknown transformer, or one that is accelerated already.
    """
    pattern = pattern_from(attention)
    if pattern is None:
        raise InstallError("no attention pattern was given; name one, such as 'radial'")
    return Installation.of(
        transformer,
        pattern,
        density=DENSE if pattern.name == "dense" else density,
        schedule=schedule or Schedule(),
        num_inference_steps=num_inference_steps,
    ).complete()


def _policy(pipe: Any, cache: Any) -> CachePolicy | None:
    """A policy from its name, from itself, or from a goal that was calibrated for the pipeline's transformer."""
    transformer = getattr(pipe, "transformer", None)
    if isinstance(transformer, nn.Module):
        module: Any = unwrap(transformer)
        experts = 2 if isinstance(getattr(pipe, "transformer_2", None), nn.Module) else 1
        cache = calibrated(cache, type(module).__name__, getattr(module, "config", {}), experts)
    return policy_from(cache)


def remove(transformer: nn.Module) -> None:
    """Give a transformer its own processors back, however ours came there, and end its cache.

    Raises:
        InstallError: nothing of ours is on it.
    """
    installation, cache = Installation.on(transformer), Cache.on(transformer)
    if installation is None and cache is None:
        raise InstallError(f"this {type(transformer).__name__} is not accelerated; there is nothing to remove")
    if cache is not None:
        cache.remove()
    if installation is not None:
        _remove(installation)


def _remove(installation: Installation) -> None:
    if changed := installation.remove():
        warnings.warn(
            f"{len(changed)} attention layers hold a processor that was set after vidaccel's (first: {changed[0]}); "
            "they were left as they are",
            VidaccelWarning,
            stacklevel=3,
        )
