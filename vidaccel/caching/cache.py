"""A caching policy at work on one or two transformers of a pipeline."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import InstallError, VidaccelWarning
from ..family import Call, attn_processors_of, unwrap
from ..frontdoor import Clock, FrontDoor
from ..grid import VideoGrid
from ..schedule import Step
from ..trace import CallRecord, Trace
from .indicator import Sizes
from .layer_swap import LayerSwap, Place
from .policy import CachePolicy, Parts
from .session import Session

logger = logging.getLogger(__name__)

FEW_STEPS = 8
"""Up to here caching has nothing to gain: neighbouring steps of a distilled model differ too much."""


class Trajectories:
    """Counts trajectories; two experts share one counter, and only the one at work remembers anything."""

    def __init__(self) -> None:
        self.count = 0
        self.active: Cache | None = None


class Cache:
    """One policy on one transformer. Build it with `Cache.of`; it works until `remove`.

    Attributes:
        policy: the policy.
        door: the transformer's front door.
    """

    def __init__(self, door: FrontDoor, policy: CachePolicy, trajectories: Trajectories) -> None:
        self.policy = policy
        self.door = door
        self._trajectories = trajectories
        self._stack = door.family.stack(door.transformer)
        self._swap = LayerSwap(door.transformer, self._stack, self._visit)
        _refuse_sharded(type(door.transformer).__name__, self._swap.blocks)
        self._parts: dict[str, Parts] = {}
        self._session: Session | None = None
        self._key: tuple[Any, ...] | None = None
        self._worked = self._idle = False
        self._unsubscribe = door.subscribe(self)
        # Before all other hooks, while the call is still under way: caches that work on the transformer's own output.
        self._hook = door.transformer.register_forward_hook(torch.compiler.disable(self._output), prepend=True)

    @classmethod
    def of(
        cls,
        transformer: nn.Module,
        policy: CachePolicy,
        *,
        clock: Clock | None = None,
        trace: Trace | None = None,
        expert: str | None = None,
        trajectories: Trajectories | None = None,
    ) -> Cache:
        """Cache the features of a transformer from its next call on.

        Args:
            transformer: any transformer of a known family, compiled or not.
            policy: what is cached when.
            clock: counts steps.
            trace: records calls.
            expert: "high" or "low" for one of two experts.
            trajectories: shared by two experts.

        Raises:
            InstallError: a cache is there already, vidaccel's or diffusers'; no blocks that it could skip, or sharded
                ones; an unknown class.
        """
        if cls.on(transformer) is not None:
            raise InstallError(
                f"this {type(unwrap(transformer)).__name__} has a cache already; remove that acceleration first"
            )
        refuse_other_cache(unwrap(transformer))
        return cls(FrontDoor.of(transformer, clock, trace, expert), policy, trajectories or Trajectories())

    @staticmethod
    def on(transformer: nn.Module) -> Cache | None:
        """The cache of this transformer, if any."""
        door = FrontDoor.open_door(transformer)
        found = [s for s in door.subscribers() if isinstance(s, Cache)] if door else []
        return found[0] if found else None

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return self._session.nbytes if self._session else 0

    def forget(self) -> None:
        """Drop everything that is remembered."""
        self._session = self._key = None

    def remove(self) -> None:
        """Stop caching, and forget; also after a call that was interrupted from the keyboard."""
        self._swap.restore()
        self._hook.remove()
        self._unsubscribe()
        self.forget()

    def before(self, call: Call, step: Step, record: CallRecord) -> None:
        """Find the trajectory that the call belongs to, and put the stand-ins in place."""
        transformer = self.door.transformer
        refuse_other_cache(transformer)
        if self._idle:
            raise InstallError(
                f"the cache reaches nothing: this {type(transformer).__name__} was called, but none of its blocks in "
                f"{', '.join(self._stack.lists)} was run through it; something else has replaced its forward. Remove "
                "that, or the cache"
            )
        self._follow(call, step)
        record.trajectory = self._trajectories.count
        if record.branch is None:
            self._say("guidance branches cannot be told apart in this pipeline: its calls are not cached")
            return
        self._session = session = self._session or self._start(call, step)
        if record.branch not in session.branches:
            self._check_memory(call, session.parts, len(session.branches) + 1)
        session.begin(call, step, record, record.branch)
        self._swap.swap()

    def after(self, record: CallRecord) -> None:
        """Put the blocks back. A failed call leaves nothing behind."""
        session = self._session
        if session is None or session.now is None:
            return
        changed = self._swap.restore()
        if record.failed:
            self.forget()
            return
        session.end()
        if changed:
            self._say(f"{', '.join(changed)} was replaced during a call: the cache did not see all of it", warn=True)
        if self._swap.reached:
            self._worked = True
        elif self._worked:
            self._say("the cache was displaced: a call ran none of its blocks through it", warn=True)
        else:
            self._idle = True

    def _follow(self, call: Call, step: Step) -> None:
        run = self._trajectories
        if run.active is not self:
            if run.active is not None:
                run.active.forget()
            run.active = self
        run.count += step.new_trajectory
        latents = call.latents
        shape = None if latents is None else (latents.shape, latents.dtype)
        # Not the text: what is kept is video, and guidance branches may have texts of different lengths.
        key = (run.count, call.grid, call.device, shape, step.total)
        if key != self._key or (self._session is not None and step.index < self._session.step):
            self.forget()
            self._key = key

    def _start(self, call: Call, step: Step) -> Session:
        trait = trait_of(call.grid, self.door.expert)
        if trait not in self._parts:
            self._parts[trait] = self.policy.parts(self._stack.model, trait)
        parts = self._parts[trait]
        for note in parts.notes:
            self._say(note)
        if told := useless(step.total):
            self._say(told, warn=True)
        if step.total is not None and self.policy.steps not in (None, step.total):
            self._say(
                f"the parameters of this cache were found on runs of {self.policy.steps} steps, and this one has "
                f"{step.total}: expect another speed and another quality, or find them anew (vidaccel calibrate, tune)",
                warn=True,
            )
        group = parallel_group(self.door.transformer)
        if group is not None and parts.base in ("input", "first"):
            raise InstallError(
                f"context parallelism is on: {self.policy.name} needs the input and the output of the blocks together, "
                "which are split differently then; take cg-taylor, taylorseer, easycache, placed or replay, or no cache"
            )
        if group is not None and self.door.family.split_plan(self.door.transformer) is not None:
            place = attn_processors_of(self.door.transformer)[self.door.family.sites(self.door.transformer)[0].name]
            if not hasattr(place, "exchange"):
                raise InstallError(
                    f"context parallelism is on, and diffusers' attention of {type(self.door.transformer).__name__} "
                    'sees its own rank\'s tokens alone; name an attention too, such as accelerate(pipe, "dense", ...)'
                )
        return Session(self.door.family, parts, self.policy.per_sample, self.policy.shadow, group)

    def _check_memory(self, call: Call, parts: Parts, branches: int) -> None:
        if call.latents is None or self.policy.max_gib is None:
            return
        sizes = sizes_of(self.door, call.grid, len(call.latents), call.latents.dtype)
        try:
            refuse_over_limit(self.policy, parts.estimate(sizes, branches), call.grid)
        except InstallError:
            self.forget()
            raise

    def _visit(self, place: Place, block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        assert self._session is not None
        return self._session.visit(self._swap, place, block, args, kwargs)

    def _output(self, module: nn.Module, args: Any, output: Any) -> Any:
        session = self._session
        if session is None or session.now is None or session.parts.site != "output":
            return None
        value = output[0] if isinstance(output, tuple) else output.sample
        result = session.finish(value)
        if isinstance(output, tuple):
            return (result, *output[1:])
        output.sample = result
        return output

    def _say(self, text: str, warn: bool = False) -> None:
        if self.door.trace.note(text):
            if warn:
                warnings.warn(text, VidaccelWarning, stacklevel=3)
            else:
                logger.info(text)


def useless(steps: int | None) -> str | None:
    """What to tell a user whose run has too few steps for any cache; None elsewhere."""
    if steps is None or steps > FEW_STEPS:
        return None
    return (
        f"{steps} steps are too few for caching to help: neighbouring steps of so short a run differ too much to be "
        "forecast, and most of them are warm-up; leave the cache out"
    )


def parallel_group(transformer: Any) -> Any:
    """The ranks that run this very transformer together, None where it runs alone.

    Never all ranks of the job: replicas that render other videos decide for themselves.
    """
    config = getattr(transformer, "_parallel_config", None)
    if config is None:
        return None
    context = config.context_parallel_config
    mesh = context._flattened_mesh if context is not None else config.tensor_parallel_config._mesh
    return mesh.get_group()


def refuse_other_cache(transformer: Any) -> None:
    """Raise where diffusers' own cache is on: each would take the other's skipped blocks for computed ones."""
    if getattr(transformer, "is_cache_enabled", False):
        raise InstallError(
            f"diffusers' own cache is enabled on this {type(transformer).__name__}; call .disable_cache() on it, or "
            "leave vidaccel's cache out"
        )


def _refuse_sharded(name: str, blocks: Sequence[nn.Module]) -> None:
    """Raise where FSDP shards blocks: ranks would wait for each other where one of them skips a block."""
    if any("FSDP" in kind.__name__ or "FullySharded" in kind.__name__ for b in blocks for kind in type(b).__mro__):
        raise InstallError(f"the blocks of this {name} are sharded by FSDP: caching cannot skip them; shard otherwise")


def refuse_over_limit(policy: CachePolicy, held: int, grid: VideoGrid) -> None:
    """Raise where a cache would hold more bytes than its limit allows."""
    if policy.max_gib is not None and held > policy.max_gib * 2**30:
        raise InstallError(
            f"the cache {policy.name} would hold {held / 2**30:.3g} GiB for a {grid} grid, more than its limit of "
            f"{policy.max_gib} GiB; raise max_gib, lower the order, or take a policy that holds less"
        )


def trait_of(grid: VideoGrid, expert: str | None) -> str:
    """What tells checkpoints of one architecture apart, see `CachePolicy.parts`: 480p has 1560 tokens a frame."""
    return f"experts:{expert}" if expert else "720p" if grid.frame > 2000 else "480p"


def sizes_of(door: FrontDoor, grid: VideoGrid, batch: int, dtype: torch.dtype) -> Sizes:
    """How large the features of a call are."""
    stack = door.family.stack(door.transformer)
    modulation = stack.modulation * (grid.tokens if stack.modulation_per_token else 1)
    return Sizes(batch, grid.tokens, stack.width, modulation, stack.latent * grid.tokens, dtype.itemsize)


def estimate_bytes(
    policy: CachePolicy,
    transformer: nn.Module,
    grid: VideoGrid | tuple[int, int, int],
    *,
    batch: int = 1,
    branches: int = 2,
    dtype: torch.dtype | None = None,
    expert: str | None = None,
) -> int:
    """Bytes that a cache will hold at most, before anything runs.

    Args:
        policy: the policy.
        transformer: the transformer.
        grid: (t, y, x) latent tokens.
        batch: videos at a time.
        branches: guidance branches that run one after another: 2 with guidance, 1 without or where both are one batch.
        dtype: type of the features; None is the transformer's.
        expert: "high" or "low" for one of two experts, which are never remembered together.
    """
    door, grid = FrontDoor.of(transformer), VideoGrid(*grid)
    # Its own `dtype` passes over what a model keeps in fp32, such as Wan's norms and tables.
    kind = dtype or door.transformer.dtype
    parts = policy.parts(door.family.stack(door.transformer).model, trait_of(grid, expert))
    return parts.estimate(sizes_of(door, grid, batch, kind), branches)
