"""One trajectory on one transformer: what is remembered, what is decided, and what runs in a block's place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import InstallError
from ..family import Call, Family
from ..schedule import Step
from ..trace import CallRecord
from .forecast import Ladder, absolute_error, combine
from .gate import Decision, Gate, relative
from .indicator import Indicator
from .layer_swap import LayerSwap, Place
from .policy import Parts


@dataclass
class Branch:
    """One guidance branch: its predictor, and what its gate looks at where it decides."""

    ladder: Ladder
    indicator: Indicator | None


@dataclass
class Now:
    """The call under way.

    Attributes:
        call: its arguments.
        step: where it stands.
        x: its coordinate.
        record: what is written about it.
        branch: its branch.
        follows: another branch has decided this step.
        decision: what happens, None while undecided.
        signal: what the indicator looks at.
        base: what a forecast is added to.
        shadow: a step that is forecast and, to see the error, computed too.
    """

    call: Call
    step: Step
    x: float
    record: CallRecord
    branch: Branch
    follows: bool
    decision: Decision | None = None
    signal: torch.Tensor | None = None
    base: torch.Tensor | None = None
    shadow: bool = False

    @property
    def skips(self) -> bool:
        """No block that can be left out runs any more."""
        return self.decision is not None and self.decision.skip and not self.shadow


class Session:
    """One trajectory: branches by name, one gate, one decision a step.

    The first branch that calls at a step decides it (cond, wherever branches run one after another); the others follow,
    unless they have no history to forecast from.

    Args:
        family: reads the arguments of blocks.
        parts: what the policy is made of.
        per_sample: the worst sample of a batch decides.
        shadow: every how many forecast steps one is computed too; 0 never.
        group: the ranks that hold shards of the features; they decide as one process would.
    """

    def __init__(self, family: Family, parts: Parts, per_sample: bool, shadow: int, group: Any = None) -> None:
        self.family = family
        self.parts = parts
        self.gate = Gate(parts.rule, parts.caps)
        self.branches: dict[str, Branch] = {}
        self.now: Now | None = None
        self._per_sample = per_sample
        self._shadow = shadow
        self._group = group
        self._forecasts = 0
        self._decided: tuple[int, Decision, bool] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held by all branches."""
        return sum(b.ladder.nbytes + (b.indicator.nbytes if b.indicator else 0) for b in self.branches.values())

    @property
    def step(self) -> int:
        """The last step that was decided, -1 before the first."""
        return self._decided[0] if self._decided else -1

    def begin(self, call: Call, step: Step, record: CallRecord, name: str) -> None:
        """A call of a branch begins."""
        if name not in self.branches:
            self.branches[name] = Branch(self.parts.ladder(), self.parts.indicator() if self.parts.indicator else None)
        branch = self.branches[name]
        x = step.sigma if self.parts.axis == "sigma" else float(step.index)
        self.now = now = Now(call, step, x, record, branch, self.step == step.index)
        indicator, ladder = branch.indicator, branch.ladder
        if now.follows and self._decided:
            _, leader, now.shadow = self._decided
            alone = leader.skip and not ladder.ready
            now.decision = Decision(False, leader.error, "no history") if alone else leader
        elif indicator is None:
            self._decide(now, None)
        elif indicator.signal == "latent":
            self._decide(now, _like(call.latents, ladder.terms[0]) if ladder.ready else None)

    def visit(
        self, swap: LayerSwap, place: Place, block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Run a block, or stand in for it."""
        now, base = self.now, self.parts.base
        assert now is not None
        start = swap.video(args, kwargs)
        indicator = now.branch.indicator
        if place.first:
            now.base = start if base == "input" else None
            if now.decision is None and indicator is not None and indicator.signal == "modulation":
                self._decide(now, self.family.modulation(block, args, kwargs))
        if now.skips and not (place.first and base == "first"):
            now.record.skip(place.name)
            output = swap.output(start, args, kwargs)
        else:
            output = block(*args, **kwargs)
        if place.first:
            first = swap.video_of(output)
            now.base = first if base == "first" else now.base
            if now.decision is None and indicator is not None:
                self._decide(now, first - start if indicator.signal == "residual" else first)
        if not place.last or self.parts.site == "output":
            return output
        video = swap.video_of(output)
        result = self.finish(video)
        return output if result is video else swap.output(result, args, kwargs)

    def finish(self, value: torch.Tensor) -> torch.Tensor:
        """The end of the call: learn from what was computed, or forecast it.

        Args:
            value: the last block's output, (b, tokens, width), or the transformer's, (b, channels, ...).

        Returns:
            `value` itself where it was computed, its forecast elsewhere.
        """
        now = self.now
        assert now is not None
        assert now.decision is not None
        if value.requires_grad:
            raise InstallError("gradients were asked for, but caches only infer; call the model under torch.no_grad()")
        ladder = now.branch.ladder
        if self.parts.base == "latent":
            # Where ranks share a video, a call that skipped its split input is gathered to another shape.
            now.base = _like(now.call.latents, ladder.terms[0] if now.decision.skip else value)
            if now.signal is None and not now.follows:
                now.signal = now.base
        if now.decision.skip:
            forecast = ladder.forecast(now.x)
            if now.base is not None:
                forecast = combine([forecast, now.base.contiguous()], [1.0, 1.0], value.dtype)
            if now.shadow:
                now.record.true_error = self._relative(absolute_error([forecast], [1.0], value))
            return forecast
        if now.step.total is not None and now.step.index >= now.step.total - 1:
            return value  # Nothing comes after it.
        target = value if now.base is None else value - now.base
        self._learn_ratio(now, target)
        ladder.update(now.x, target)
        if now.branch.indicator is not None and now.signal is not None:
            now.branch.indicator.computed(now.x, now.signal, value)
        return value

    def end(self) -> None:
        """The call is over: write down what happened. After the last step the branch forgets everything."""
        now, self.now = self.now, None
        if now is None or now.decision is None:
            return
        record = now.record
        record.forecast = now.decision.skip
        record.gate_error, record.why = now.decision.error, "follows" if now.follows else now.decision.why
        record.cache_bytes = self.nbytes
        if now.step.total is not None and now.step.index >= now.step.total - 1:
            now.branch.ladder.clear()
            now.branch.indicator = self.parts.indicator() if self.parts.indicator else None

    def _decide(self, now: Now, signal: torch.Tensor | None) -> None:
        error = None
        if now.branch.indicator is not None and signal is not None:
            now.signal = signal
            sums = now.branch.indicator.measure(now.x, signal)
            error = None if sums is None else self._relative(sums)
        now.decision = self.gate.decide(now.step, error, now.branch.ladder.ready)
        if now.decision.skip and self._shadow:
            self._forecasts += 1
            now.shadow = self._forecasts % self._shadow == 0
        self._decided = (now.step.index, now.decision, now.shadow)

    def _relative(self, sums: torch.Tensor) -> float:
        if self._group is not None:
            # Sums, not ratios: shards need not be of one size.
            torch.distributed.all_reduce(sums, group=self._group)
        return relative(sums, self._per_sample)

    def _learn_ratio(self, now: Now, target: torch.Tensor) -> None:
        ladder = now.branch.ladder
        if self.parts.learn and not now.follows and ladder.fits(target) and ladder.anchors[0] == now.x - 1:
            before = ladder.terms[0].float().norm(dim=-1)
            self.parts.learn(now.step, float((target.float().norm(dim=-1) / before).mean()))


def _like(latents: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """The part of the latents that the transformer's output has too: pipelines append masks and images as channels."""
    assert latents is not None
    return latents[tuple(slice(size) for size in other.shape)]
