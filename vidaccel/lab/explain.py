"""Where attention looks, and how much of that each pattern keeps: by layer, head and step, on a real run.

Idea: the run keeps every pair, so that it is the dense one; beside it, the softmax of sampled queries is computed in
    full and added up over the pairs that a pattern would have kept.
Math: mass of a head = mean over queries of the sum over kept keys of softmax(q k / sqrt(d)). What stands apart: same
    frame, same place (at most one token away) in other frames, first frame, text, and the spread exp(entropy) / keys.
Cost: samples x tokens x heads products at each step that is looked at.
Limits: patterns that merge keys (pyramid) have no kept pairs, and are named with that reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from .. import trace, wrapping
from ..blocks import BlockMask
from ..errors import BackendError, VidaccelError
from ..family import family_of
from ..grid import Site, TokenLayout
from ..kernels import Problem
from ..patterns import Choice, Pattern, Plan
from ..schedule import DENSE, Schedule, Step
from .heads import counted, kind

# Losses that are named, the largest first.
WORST = 8


@dataclass(frozen=True)
class Everything:
    """Every pair, by vidaccel's own kernel: the dense result, where q and k can be seen."""

    name: ClassVar[str] = "everything"
    per_site: ClassVar[bool] = False

    block: int = 128

    def plan(self, layout: TokenLayout, density: float | None, site: Site) -> Plan:
        """See `Pattern.plan`."""
        keep = torch.ones(layout.blocks, layout.blocks, dtype=torch.bool, device=layout.device)
        return Plan.of(BlockMask.of(keep, layout), density, "every pair")


@dataclass(frozen=True)
class AtSteps(Schedule):
    """Sparse at some steps, dense at the others.

    Attributes:
        steps: those steps.
    """

    steps: tuple[int, ...] = ()
    even_if_slower: bool = True

    def density(self, step: Step, *rest: Any) -> float | None:
        """See `Schedule.density`."""
        return None if step.index in self.steps else DENSE


@dataclass
class Atlas:
    """What was seen.

    Attributes:
        patterns: to be judged.
        density: of all of them; a pattern with parameters of its own can be given None.
        samples: queries that are looked at in each layer.
        rows: one a step and layer: "step", "layer", "site", "kept" {pattern: mass by head}, and where attention looks,
            by head: "same_frame", "same_place", "first_frame", "text", "spread", and the "kind" that this makes of it;
            "chance" is what a head that looks everywhere alike would have there.
        problem: what a kernel is asked in a layer that was looked at, without its mask.
        left_out: why a pattern cannot be judged, by name.
    """

    patterns: Sequence[Pattern]
    density: float | None
    samples: int = 64
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    problem: Problem | None = None
    _plans: dict[tuple[str, str], Plan] = field(default_factory=dict)

    @contextlib.contextmanager
    def watching(self, transformer: Any) -> Iterator[None]:
        """Look at every sparse layer while this lasts; the run's pattern is `Everything`."""
        sites = {site.name: site for site in family_of(transformer).sites(transformer)}
        own = wrapping.attend

        def attend(plan: Plan, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> Any:
            record = trace.current()
            # Guidance's other branch, and the other samples of a batch, look alike.
            if record is not None and record.branch != "uncond":
                self.problem = Problem.of(query, key, None, None)
                last = [x[-1:] for x in (query, key, value)]
                self.rows.append(self._look(plan.layout, sites[record.site], record.step, *last))
            return own(plan, query, key, value, *rest)

        setattr(wrapping, "attend", attend)  # noqa: B010
        try:
            yield
        finally:
            setattr(wrapping, "attend", own)  # noqa: B010

    def data(self) -> dict[str, Any]:
        """Everything, as plain data, with the mean and the worst head of each pattern."""
        return {
            "schema": 1,
            "density": self.density,
            "samples": self.samples,
            "patterns": {name: self._judged(name) for name in (p.name for p in self.patterns)},
            "heads": counted(self.rows),
            "rows": self.rows,
        }

    def plans(self, name: str) -> list[Plan]:
        """Those of one pattern, one or one a layer."""
        return [plan for (pattern, _), plan in self._plans.items() if pattern == name]

    def _judged(self, name: str) -> dict[str, Any]:
        if name in self.left_out:
            return {"reason": self.left_out[name]}
        plans = self.plans(name)
        found = [(mass, row, n) for row in self.rows for n, mass in enumerate(row["kept"][name])]
        losses = [
            {"kept": mass, "step": row["step"], "layer": row["layer"], "head": n, "kind": row["kind"][n]}
            for mass, row, n in sorted(found, key=lambda each: each[0])[:WORST]
        ]
        by_kind: dict[str, list[float]] = {}
        for mass, row, n in found:
            by_kind.setdefault(row["kind"][n], []).append(mass)
        return {
            "delivered": sum(plan.delivered for plan in plans) / len(plans),
            "kept": sum(mass for mass, _, _ in found) / len(found),
            "kept_by_kind": {kind: sum(each) / len(each) for kind, each in sorted(by_kind.items())},
            "worst": losses[0],
            "losses": losses,
        }

    def _look(self, layout: TokenLayout, site: Site, step: int, *qkv: torch.Tensor) -> dict[str, Any]:
        query, key, value = (layout.to_model(x.float()) for x in qkv)
        tokens, heads = query.shape[1], query.shape[2]
        generator = torch.Generator().manual_seed(1000 * step + site.index)
        position = layout.positions[layout.slot_of]
        video = (position[:, 0] >= 0).nonzero()[:, 0].cpu()
        sampled = video[torch.randperm(len(video), generator=generator)[: self.samples]].to(query.device)
        valid = _valid(layout)
        logits = torch.einsum("shd,thd->hst", query[0, sampled], key[0]) * query.shape[-1] ** -0.5
        weight = logits.masked_fill(~valid, -torch.inf).softmax(-1)
        kept = {}
        for pattern in self.patterns:
            try:
                keep = _kept(self._plan(pattern, layout, site), (query, key, value), sampled)
            except VidaccelError as error:
                self.left_out[pattern.name] = str(error)
                continue
            kept[pattern.name] = _by_head(weight * keep)
        mine, text = position[sampled], position[:, 0] < 0
        frame = (mine[:, None, 0] == position[None, :, 0]) & ~text
        place = ((mine[:, None, 1:] - position[None, :, 1:]).abs() <= 1).all(-1) & ~frame & ~text
        entropy = -(weight * weight.clamp(min=1e-30).log()).sum(-1)
        first = (position[:, 0] == 0).expand(len(sampled), -1)
        spread = (entropy.exp() / int(valid.sum())).mean(-1).tolist()
        places = {"same_frame": frame, "same_place": place, "first_frame": first, "text": text.expand_as(first)}
        masses = {name: _by_head(weight * where) for name, where in places.items()}
        chance = {name: float((where & valid).sum() / valid.sum()) / len(sampled) for name, where in places.items()}
        return {
            "step": step,
            "layer": site.index,
            "site": site.name,
            "heads": heads,
            "tokens": tokens,
            "kept": kept,
            **masses,
            "spread": spread,
            "chance": chance,
            "kind": [kind({name: each[n] for name, each in masses.items()}, chance) for n in range(heads)],
        }

    def _plan(self, pattern: Pattern, layout: TokenLayout, site: Site) -> Plan:
        key = pattern.name, site.name if pattern.per_site else ""
        if key not in self._plans:
            raster = layout.tiled(None, pattern.block) if layout.block != pattern.block else layout
            self._plans[key] = pattern.plan(raster, self.density, site).to(layout.device)
        return self._plans[key]


def _by_head(weight: torch.Tensor) -> list[float]:
    """(h, samples, tokens) -> the mean mass of each head."""
    found: list[float] = weight.sum(-1).mean(-1).tolist()
    return found


def _valid(layout: TokenLayout) -> torch.Tensor:
    """(tokens,) bool, in model order: no padded text."""
    length = layout.k_len[-1] if layout.k_len.ndim == 2 else layout.k_len
    return layout.slot_of % layout.block < length[layout.slot_of // layout.block]


def _kept(plan: Plan, qkv: tuple[torch.Tensor, ...], sampled: torch.Tensor) -> torch.Tensor:
    """(h or 1, samples, tokens) bool, in model order: what a plan keeps for sampled queries.

    Args:
        plan: the plan.
        qkv: (1, tokens, h, d), in model order.
        sampled: (samples,) int64, tokens.

    Raises:
        BackendError: it merges keys.
    """
    layout, mask = plan.layout, plan.mask
    choice = Choice(mask) if mask is not None else None
    if choice is None:
        assert plan.select is not None
        choice = plan.select.choose(*(layout.to_kernel(x) for x in qkv))
    mask = choice.mask
    if mask.k_len is not None:
        raise BackendError("it merges keys, so that no pair is kept or dropped as such")
    slot, kinds = layout.slot_of, mask.block_map()
    q_place, k_place = (_places(order, slot, kinds.shape[0]) for order in (choice.q_order, choice.k_order))
    q_place = q_place[:, sampled]
    rows = kinds.gather(1, (q_place // layout.block)[..., None].expand(-1, -1, kinds.shape[2]))
    kind = rows.gather(2, (k_place // layout.block)[:, None].expand(-1, len(sampled), -1))
    keep = kind == 2
    if mask.window is not None:
        keep = keep | ((kind == 1) & mask.window.kept(q_place[0], k_place[0]))
    return keep


def _places(order: torch.Tensor | None, slot: torch.Tensor, heads: int) -> torch.Tensor:
    """(h, tokens) int64: where each token stands after a choice has moved slots; `order` is (1, slots, h) or None."""
    if order is None:
        return slot.expand(heads, -1)
    return order[0].argsort(0)[slot].T.contiguous()
