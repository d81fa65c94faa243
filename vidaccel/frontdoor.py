"""The one place where a transformer's calls are seen: hooks on the unmodified module, and the clock that counts steps.

Nothing is baked in: grid, timestep and guidance branch are read from every call, so a new resolution, a second expert
or guidance switched off need no notice.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from .errors import VidaccelWarning
from .family import Call, family_of, unwrap
from .schedule import Step
from .trace import CallRecord, Trace

logger = logging.getLogger(__name__)

_ATTRIBUTE = "_vidaccel_door"


class Clock:
    """Counts denoising steps; one per pipeline, so that two experts share it.

    A step is new when the timestep falls, or when a branch comes again at the same timestep (second-order schedulers
    repeat timesteps; integer ones can collide). A trajectory is new when the timestep rises, or step 0 comes again.

    Args:
        total: the number of steps, or a function that knows it once a run has begun.

    Attributes:
        trajectory: how many have begun.
    """

    def __init__(self, total: int | Callable[[], int | None] | None = None) -> None:
        self._total = total
        self.trajectory = 0
        self._index = 0
        self._timestep: float | None = None
        self._scale = 1.0
        self._seen: set[tuple[int, str | int | None]] = set()

    def step(
        self,
        timestep: torch.Tensor,
        *,
        caller: int = 0,
        branch: str | int | None = None,
        hint: Mapping[str, Any] | None = None,
    ) -> Step:
        """Count one call.

        Args:
            timestep: (b,) or (b, tokens) as given to the transformer; the largest value counts. Reading it waits for
                the device, so it is only read where the pipeline tells nothing in `hint`.
            caller: which transformer calls.
            branch: its guidance branch, by name or by whatever else tells it apart.
            hint: what the pipeline passed to `cache_context` (WanPipeline: step_index, sigma, num_inference_steps).
        """
        hint = hint or {}
        total = hint.get("num_inference_steps") or (self._total() if callable(self._total) else self._total)
        who = (caller, branch)
        if "step_index" in hint and "sigma" in hint:
            index, sigma = int(hint["step_index"]), float(hint["sigma"])
            new = (
                index < self._index or self._timestep is None or (index == 0 and self._index == 0 and who in self._seen)
            )
            moved = new or index > self._index
            self._index, self._timestep = index, sigma
        else:
            value = float(timestep.max())
            again = who in self._seen and value == self._timestep
            new = self._timestep is None or value > self._timestep or (again and self._index == 0)
            moved = new or again or value != self._timestep
            self._index = 0 if new else self._index + moved
            self._timestep = value
            if new:  # the last timestep may be 1 of 1000
                self._scale = 1000.0 if value > 1 else 1.0
            sigma = value / self._scale
        self.trajectory += new
        if moved:
            self._seen.clear()
        self._seen.add(who)
        return Step(self._index, total, sigma, new)


class Subscriber(Protocol):
    """Something that acts around every call of a transformer."""

    def before(self, call: Call, step: Step, record: CallRecord) -> None:
        """Prepare the call."""
        ...

    def after(self, record: CallRecord) -> None:
        """Undo what was prepared; also when the call has failed."""
        ...


class FrontDoor:
    """Watches one transformer. Get it with `FrontDoor.of`; it opens with the first subscriber, closes with the last.

    Attributes:
        transformer: the module, unwrapped from torch.compile.
        family: its family.
        clock: counts its steps.
        trace: records its calls.
        expert: "high" or "low" for models with two experts.
    """

    def __init__(self, transformer: Any, clock: Clock, trace: Trace, expert: str | None) -> None:
        self.transformer = transformer
        self.family = family_of(transformer)
        self.clock = clock
        self.trace = trace
        self.expert = expert
        self._subscribers: list[Subscriber] = []
        self._undo: list[Callable[[], None]] = []
        self._context: tuple[str, dict[str, Any]] | None = None
        self._embeds: list[torch.Tensor] = []
        self._trajectory = 0
        self._record: CallRecord | None = None
        self._entered: list[Subscriber] = []

    @classmethod
    def of(
        cls, transformer: nn.Module, clock: Clock | None = None, trace: Trace | None = None, expert: str | None = None
    ) -> FrontDoor:
        """The door of this transformer, the open one if there is one.

        Raises:
            InstallError: no family serves this class of transformer.
        """
        return cls.open_door(transformer) or cls(unwrap(transformer), clock or Clock(), trace or Trace(), expert)

    @staticmethod
    def open_door(transformer: nn.Module) -> FrontDoor | None:
        """The open door of this transformer, if any."""
        door = vars(unwrap(transformer)).get(_ATTRIBUTE)
        return door if isinstance(door, FrontDoor) else None

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Act around every call from now on. Returns the function that ends it."""
        if not self._subscribers:
            self._open()
        self._subscribers.append(subscriber)

        def unsubscribe() -> None:
            if subscriber in self._subscribers:
                self._subscribers.remove(subscriber)
                if not self._subscribers:
                    self._close()

        return unsubscribe

    def subscribers(self) -> Sequence[Subscriber]:
        """Who acts around calls now."""
        return tuple(self._subscribers)

    def _open(self) -> None:
        module = self.transformer
        # In the instance's own dict: neither state_dict nor save_pretrained sees it.
        vars(module)[_ATTRIBUTE] = self
        # Disabled here rather than by decorators, which would load the compiler whenever vidaccel is imported.
        before = module.register_forward_pre_hook(torch.compiler.disable(self._before), with_kwargs=True)
        after = module.register_forward_hook(torch.compiler.disable(self._after), always_call=True)
        self._undo = [before.remove, after.remove, lambda: vars(module).pop(_ATTRIBUTE, None)]
        if hasattr(type(module), "cache_context"):
            vars(module)["cache_context"] = self._named_context
            self._undo.append(lambda: vars(module).pop("cache_context", None))

    def _close(self) -> None:
        if self._record is not None:  # interrupted from the keyboard, see `_before`, and nothing is called after it
            self._record.close(failed=True)
            self._record = None
        for undo in self._undo:
            undo()
        self._undo = []
        self._embeds.clear()

    @contextmanager
    def _named_context(self, name: str, **kwargs: Any) -> Iterator[None]:
        """Stands before the transformer's own `cache_context`, to learn the guidance branch and the step."""
        outer, self._context = self._context, (name, kwargs)
        try:
            with type(self.transformer).cache_context(self.transformer, name, **kwargs):
                yield
        finally:
            self._context = outer

    def _branch_of(self, embeds: torch.Tensor) -> str | None:
        """Names a branch whose pipeline names none (video to video): it passes the same two embeddings at every step.

        They are held, so that no other tensor can take their address before the trajectory ends.
        """
        known = [each.data_ptr() for each in self._embeds]
        if embeds.data_ptr() not in known:
            if len(known) == 2:
                return None
            known.append(embeds.data_ptr())
            self._embeds.append(embeds)
            if len(known) == 2 and self.trace.note(
                "guidance branches are told apart by their text embeddings: first cond, then uncond"
            ):
                logger.info(self.trace.notes[-1])
        return ("cond", "uncond")[known.index(embeds.data_ptr())]

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._record is not None:  # the last call was interrupted from the keyboard: torch runs no hook then
            self._after(module, (), None)
        call = self.family.read(module, args, kwargs)
        name, hint = self._context or (None, None)
        embeds = call.embeds if name is None else None
        # The clock comes first: which embeddings are whose is only known once it is known whose trajectory this is.
        step = self.clock.step(
            call.timestep, caller=id(module), branch=name if embeds is None else embeds.data_ptr(), hint=hint
        )
        if self._trajectory != self.clock.trajectory:  # its first step may have been another expert's
            self._trajectory = self.clock.trajectory
            self._embeds.clear()
        if step.total is not None and step.index >= step.total:
            told = (
                f"a step after the last of {step.total} was called: their number is that of the pipeline that was "
                "accelerated, or num_inference_steps=, and the last steps were taken for others; accelerate the "
                "pipeline that runs, or correct the number"
            )
            if self.trace.note(told):
                warnings.warn(told, VidaccelWarning, stacklevel=2)
        branch = name and name.removeprefix("pred_")  # so named by HunyuanVideo-1.5's guiders
        if embeds is not None:
            branch = self._branch_of(embeds)
        record = CallRecord(
            step.index, step.total, step.sigma, branch, self.expert, call.grid, call.text, trace=self.trace
        )
        self._record, self._entered = record, []
        for subscriber in self._subscribers:
            self._entered.append(subscriber)
            subscriber.before(call, step, record)
        record.open(call.device)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        record, self._record = self._record, None
        if record is None:
            return
        record.close(failed=output is None)
        for subscriber in reversed(self._entered):
            subscriber.after(record)
        self.trace.add(record)
