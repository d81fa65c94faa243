"""A pattern at work on one transformer: processors placed, plans made for each call, everything given back."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .checked import checked
from .choices import Choices, kept_share
from .errors import InstallError, VidaccelWarning
from .exchange import Exchange
from .family import Call, attn_processors_of, place_processors, unwrap
from .frontdoor import Clock, FrontDoor
from .grid import Site, TokenLayout
from .guide import Guide
from .kernels import prepare
from .patterns import Pattern, Plan, advice, check_density, check_given, check_model, of_layer, would_lose
from .ranks import HeadPart, Ranks
from .schedule import DENSE, Schedule, Step, check_schedule
from .trace import CallRecord, Trace
from .wrapping import SparseAttnProcessor

logger = logging.getLogger(__name__)

# Masks of one resolution are a few MiB; a server that sees many resolutions must not keep them all.
_MOST_PLANS = 64


class Recent(dict[tuple[Any, ...], Plan]):
    """Plans by what they were made for, the latest used last. Beyond `_MOST_PLANS`, those of earlier steps go."""

    def __init__(self) -> None:
        super().__init__()
        self._step: dict[tuple[Any, ...], int] = {}

    def use(self, key: tuple[Any, ...], step: int, make: Callable[[], Plan]) -> Plan:
        """The plan of a key, made where there is none.

        Args:
            key: what it is made for.
            step: counts denoising steps; what this one or the one before has used stays, however much that is.
            make: makes it.
        """
        plan = self.pop(key) if key in self else make()
        while len(self) >= _MOST_PLANS and self._step[oldest := next(iter(self))] < step - 1:
            del self[oldest], self._step[oldest]
        self[key], self._step[key] = plan, step
        return plan


class Installation:
    """One pattern on one transformer. Build it with `Installation.of`.

    Attributes:
        pattern: the pattern.
        schedule: which layers run sparse when.
        sites: where it works, in the order of execution.
        processors: one a site, by name.
        originals: every processor that stood in the transformer, by name.
        plans: what each plan was made for, with the plan.
        choices: blocks that were chosen at earlier steps, where a plan uses them again.
    """

    def __init__(
        self,
        door: FrontDoor,
        pattern: Pattern,
        density: float | None,
        schedule: Schedule,
        stand_in: object | None,
        choices: Choices | None = None,
    ) -> None:
        self.door = door
        self.pattern = pattern
        self.density_requested = density
        self.schedule = schedule
        self.sites = door.family.sites(door.transformer)
        self.originals: dict[str, Any] = attn_processors_of(door.transformer)
        self.processors = {
            site.name: SparseAttnProcessor(self.originals[site.name], door.family) for site in self.sites
        }
        self.plans = Recent()
        self._losing: set[tuple[Any, ...]] = set()
        self._texts = Recent()
        self._steps = 0
        self._at: tuple[int, int] | None = None
        self._exchanges: dict[tuple[Any, ...], Exchange] = {}
        self.choices = choices or Choices()
        self._stand_in = stand_in
        self._layers = 1 + max(site.index for site in self.sites)
        self._heads = {site.name: _heads(door.transformer, site) for site in self.sites}
        self._unsubscribe = door.subscribe(self)
        try:
            self._guide = Guide.of(door, pattern, self.originals, self.processors)
        except InstallError:
            self._unsubscribe()
            raise

    @classmethod
    def of(
        cls,
        transformer: nn.Module,
        pattern: Pattern,
        *,
        density: float | None,
        schedule: Schedule,
        num_inference_steps: int | None = None,
        clock: Clock | None = None,
        trace: Trace | None = None,
        expert: str | None = None,
        stand_in: object | None = None,
        choices: Choices | None = None,
    ) -> Installation:
        """Prepare a pattern for a transformer; `place` puts it there.

        Args:
            transformer: any transformer of a known family, compiled or not.
            pattern: which pairs attend.
            density: wanted fraction of video-video pairs, in (0, 1]; None lets the pattern decide.
            schedule: which steps and layers stay dense.
            num_inference_steps: steps of a trajectory, where no clock knows them.
            clock: counts steps.
            trace: records calls.
            expert: "high" or "low".
            stand_in: an object that the user will set as the one processor of all layers.
            choices: shared by two experts.

        Raises:
            InstallError: the transformer is accelerated already, has no site, or its class is unknown.
            PatternError: a density outside (0, 1], none for a pattern that needs one, one beside a window, or heads or
                layers that the model does not have.
            RecipeError: a schedule that is none.
        """
        check_schedule(schedule)
        check_density(density)
        for asked in schedule.asked(expert, density):
            check_given(pattern, asked)
        if cls.on(transformer) is not None:
            raise InstallError(
                f"this {type(unwrap(transformer)).__name__} is accelerated already; "
                "call .remove() on that acceleration, or vidaccel.remove(transformer), first"
            )
        if density == DENSE and pattern.name != "dense":
            warnings.warn(
                "density 1 keeps every pair: all layers run on the dense backend", VidaccelWarning, stacklevel=3
            )
        if schedule.expert and expert is None:
            warnings.warn(
                f"the schedule gives expert {', '.join(sorted(schedule.expert))} a density, which has no effect: this "
                f"{type(unwrap(transformer)).__name__} is not one of two experts; drop it, or accelerate a pipeline "
                "that has a transformer_2",
                VidaccelWarning,
                stacklevel=3,
            )
        door = FrontDoor.of(transformer, clock or Clock(num_inference_steps), trace, expert)
        sites = door.family.sites(door.transformer)
        if not sites:
            raise InstallError(f"{type(door.transformer).__name__} has no video self-attention to make sparse")
        check_model(pattern, 1 + max(site.index for site in sites), _heads(door.transformer, sites[0]))
        return cls(door, pattern, density, schedule, stand_in, choices)

    @staticmethod
    def on(transformer: nn.Module) -> Installation | None:
        """The installation of this transformer, if any."""
        door = FrontDoor.open_door(transformer)
        found = [s for s in door.subscribers() if isinstance(s, Installation)] if door else []
        return found[0] if found else None

    def complete(self) -> dict[str, Any]:
        """A processor for every attention layer: ours at the sites, elsewhere the very object that stands there."""
        return self.originals | self._ours()

    def _ours(self) -> dict[str, Any]:
        return self.processors | (self._guide.processors if self._guide else {})

    def place(self) -> None:
        """Put our processors in the transformer."""
        place_processors(self.door.transformer, self.complete())

    def remove(self) -> list[str]:
        """Give every place that still holds ours its own processor back, and close the door.

        Returns:
            Names of the places that somebody else has changed since; they are left as they are.
        """
        changed: list[str] = []
        current = self._current()
        for name, original in self.originals.items():
            mine = self._ours().get(name)
            if current[name] is mine or current[name] is self._stand_in:
                current[name] = original
            elif mine is not None and current[name] is not original:
                changed.append(name)
        place_processors(self.door.transformer, current)
        if self._guide is not None:
            self._guide.remove()
        self._unsubscribe()
        self.choices.forget()
        return changed

    def _current(self) -> dict[str, Any]:
        return attn_processors_of(self.door.transformer)

    def before(self, call: Call, step: Step, record: CallRecord) -> None:
        """Write a plan, or None, on every processor."""
        if self._at is None:
            self._prepare(call)
        if self._at != (at := (self.door.clock.trajectory, step.index)):
            self._at, self._steps = at, self._steps + 1
        ranks = Ranks.of(self.door.transformer)
        exchange = None if ranks is None else self._exchange(ranks, call, step)
        for text in call.notes:
            if self.door.trace.note(text):
                logger.info(text)
        current = self._current()
        if self._stand_in is not None and any(p is self._stand_in for p in current.values()):
            self.place()
            current = self._current()
        if (
            self.density_requested != DENSE
            and (told := self.schedule.covers(step.total, self._layers))
            and self.door.trace.note(told)
        ):
            warnings.warn(told, VidaccelWarning, stacklevel=2)
        if (told := self.schedule.misses(record.branch)) and self.door.trace.note(told):
            warnings.warn(told, VidaccelWarning, stacklevel=2)
        displaced = [site.name for site in self.sites if current[site.name] is not self.processors[site.name]]
        if displaced and self.door.trace.note(
            f"{len(displaced)} layers, such as {displaced[0]}, do not hold our processor"
        ):
            warnings.warn(
                f"{len(displaced)} of {len(self.sites)} attention layers do not hold vidaccel's processor (first: "
                f"{displaced[0]}): they were never set, or set again since. They run as their own processor does",
                VidaccelWarning,
                stacklevel=2,
            )
        lengths = call.valid
        valid = None if lengths is None else tuple(torch.arange(n, device=call.device) for n in lengths)
        for site in self.sites:
            if site.name in displaced:
                continue
            plan = self._plan(call, step, record, site, ranks)
            processor = self.processors[site.name]
            processor.plan, processor.valid, processor.exchange = plan, valid, exchange
            if plan is None:
                record.dense.append(site.name)
                continue
            record.scheduled.append((site.name, plan.delivered))
            processor.held = self.choices.held(plan, site.name, record.branch, step.index, self.door.clock.trajectory)
            if processor.held is not None:
                record.held.append(site.name)
            if plan.reselect != 1 and record.branch is None:
                self.door.trace.note(
                    "guidance branches cannot be told apart here, so blocks are chosen at every step (reselect has no "
                    "effect); pass prompts through the pipeline's own arguments"
                )
        if self._guide is not None:
            self._guide.before(call, step, record)

    def _prepare(self, call: Call) -> None:
        """Tune kernels that were never used on this GPU before the first step, not within it."""
        transformer = self.door.transformer
        d = getattr(transformer.config, "attention_head_dim", None)
        if d is not None:
            prepare(d, self.pattern.block, transformer.dtype, call.device)

    def after(self, record: CallRecord) -> None:
        """Take the plans away, after the last step the choices too; say so where fewer layers ran than scheduled."""
        for name, processor in self.processors.items():
            if processor.plan is not None and not record.failed:
                self._look_at(processor, name, record)
            processor.plan = processor.valid = processor.held = processor.chosen = processor.exchange = None
        if self._guide is not None:
            self._guide.after(record)
        if record.failed:
            self.choices.forget()
        elif record.branch is not None and record.step + 1 == record.total:
            self.choices.forget(record.branch)
        missing = len(record.scheduled) - len(record.kernels)
        if missing and not record.failed:
            self.door.trace.note(
                f"{missing} of {len(record.scheduled)} sparse layers did not run in step {record.step}"
            )

    def _look_at(self, processor: SparseAttnProcessor, name: str, record: CallRecord) -> None:
        """Keep what a layer has chosen for later steps, and record what only the choice can tell."""
        plan, choice = processor.plan, processor.chosen
        if plan is None:
            return
        if choice is not None and processor.held is None:
            moved = self.choices.keep(plan, name, record.branch, record.step, self.door.clock.trajectory, choice)
            if moved is not None:
                record.drift[name] = moved
        if plan.varies and (used := choice or processor.held) is not None:
            record.measured[name] = kept_share(used.mask) if used.spent is None else used.spent

    def _exchange(self, ranks: Ranks, call: Call, step: Step) -> Exchange:
        """What ranks swap in this call; looks whether all of them were given the same video to make."""
        if step.new_trajectory and call.latents is not None:
            ranks.check_same(call.latents)
        key = (ranks, call.grid, call.text, call.text_slots, call.device)
        if key not in self._exchanges:
            self.door.trace.note(f"{ranks.count} processes share the video, each with its own heads in attention")
            self._exchanges[key] = Exchange.of(
                ranks,
                call.grid.tokens,
                call.text,
                call.text_slots,
                text_first=self.door.family.text_first,
                device=call.device,
            )
        return self._exchanges[key]

    def _plan(self, call: Call, step: Step, record: CallRecord, site: Site, ranks: Ranks | None) -> Plan | None:
        density = self.schedule.density(
            step, site.index, self._layers, record.branch, record.expert, self.density_requested
        )
        if density == DENSE:
            return None
        total = self._heads[site.name]
        heads = HeadPart.whole(total) if ranks is None else ranks.heads(total)
        key = (call.grid, call.text, call.device, density, site if self.pattern.per_site else site.family, heads)

        def make() -> Plan:
            plan = self._make_plan(self.door.family.layout(call, self.pattern.block), density, site)
            if would_lose(of_layer(self.pattern, site.index), plan) and not self.schedule.even_if_slower:
                self._losing = {*self._losing & self.plans.keys(), key}
            return plan.of_heads(heads).to(call.device)

        plan = self.plans.use(key, self._steps, make)
        if key in self._losing:
            return None
        if (valid := call.valid) is None:
            return plan
        # Padded text: the same rows, other key lengths.
        return self._texts.use((*key, valid), self._steps, lambda: plan.with_valid_text(torch.tensor(valid)))

    def _make_plan(self, layout: TokenLayout, density: float | None, site: Site) -> Plan:
        plan = self.pattern.plan(layout, density, site)
        if plan.mask is not None and not type(self.pattern).__module__.startswith(f"{__package__}."):
            checked(plan.mask)
        message = f"{self.pattern.name} on a {layout.grid} grid, {plan.rule}: density {plan.delivered:.3f}"
        asked = "" if plan.requested is None else f" (requested {plan.requested:.3f})"
        for text in (f"{message}{asked}, visited {plan.visited:.3f}", *plan.notes):
            if self.door.trace.note(text):
                logger.info(text)
        pattern = of_layer(self.pattern, site.index)
        told = advice(pattern, plan, layout, density, site, forced=self.schedule.even_if_slower)
        if told and self.door.trace.note(told):
            warnings.warn(told, VidaccelWarning, stacklevel=2)
        return plan


def _heads(transformer: nn.Module, site: Site) -> int:
    attn: Any = transformer.get_submodule(site.name.removesuffix(".processor"))
    return int(attn.heads)
