"""What each pattern does to attention's output, on the q, k and v of one dense run: the cheapest test there is.

Idea: a run keeps every pair, so that it is the dense one; at some of its steps and layers every candidate attends to
    the same q, k and v beside it, and is forgotten. One render tells all patterns and densities apart.
Math: error = |o - o_dense| / |o_dense| over all tokens and heads, the mean over steps and layers.
Cost: a dense layer and one sparse call of each candidate, at each layer and step that is looked at; no memory.
Limits: errors of one layer, before later layers and steps hide or amplify them; only renders tell what a video loses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import torch

from .. import trace, wrapping
from ..errors import VidaccelError
from ..family import family_of
from ..grid import Site, TokenLayout
from ..patterns import Pattern, Plan


@dataclass(frozen=True)
class Candidate:
    """A pattern at a density."""

    pattern: Pattern
    density: float


@dataclass
class Judge:
    """Judges candidates, layer by layer.

    Attributes:
        candidates: what is judged.
        every: looks at every n-th layer.
        errors: relative errors of each candidate that could run, in the order in which layers were looked at.
        plans: one of each of these.
        reasons: why the others could not.
    """

    candidates: Sequence[Candidate]
    every: int = 2
    errors: dict[Candidate, list[float]] = field(default_factory=dict)
    plans: dict[Candidate, Plan] = field(default_factory=dict)
    reasons: dict[Candidate, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def watching(self, transformers: Sequence[Any]) -> Iterator[None]:
        """Judge in every n-th sparse layer while this lasts; the run's pattern is `explain.Everything`."""
        sites = {site.name: site for each in transformers for site in family_of(each).sites(each)}
        own = wrapping.attend

        def attend(plan: Plan, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> Any:
            record = trace.current()
            site = None if record is None or record.branch == "uncond" else sites[record.site]
            found = own(plan, query, key, value, *rest)
            if site is not None and site.index % self.every == 0:
                # Candidates are no part of the run: what they use must not be recorded as what ran.
                with trace.unrecorded():
                    self._look(own, plan.layout, site, found[0][-1:], *(x[-1:] for x in (query, key, value)))
            return found

        setattr(wrapping, "attend", attend)  # noqa: B010
        try:
            yield
        finally:
            setattr(wrapping, "attend", own)  # noqa: B010

    def rows(self) -> list[dict[str, Any]]:
        """A row for each candidate, as plain data."""
        return [
            {
                "key": f"attention {candidate.pattern} {candidate.density:g}",
                "kind": "attention",
                "pattern": candidate.pattern.name,
                "block": candidate.pattern.block,
                "density": candidate.density,
                "ok": candidate in self.errors,
                "reason": self.reasons.get(candidate),
                **self._judged(candidate),
            }
            for candidate in self.candidates
        ]

    def _judged(self, candidate: Candidate) -> dict[str, Any]:
        if candidate not in self.errors:
            return {}
        plan, errors = self.plans[candidate], self.errors[candidate]
        return {"delivered": plan.delivered, "visited": plan.visited, "error": mean(errors), "worst": max(errors)}

    def _look(
        self, attend: Callable[..., Any], layout: TokenLayout, site: Site, dense: torch.Tensor, *qkv: torch.Tensor
    ) -> None:
        wanted = layout.to_model(dense).float()
        given = [layout.to_model(x) for x in qkv]
        for candidate in self.candidates:
            if candidate in self.reasons:
                continue
            try:
                plan = self._plan(candidate, layout, site)
                out, _ = attend(plan, *(plan.layout.to_kernel(x) for x in given))
            except VidaccelError as error:
                self.reasons[candidate] = str(error)
                self.errors.pop(candidate, None)
                continue
            lost = plan.layout.to_model(out).float() - wanted
            self.errors.setdefault(candidate, []).append(float(lost.norm() / wanted.norm()))

    def _plan(self, candidate: Candidate, layout: TokenLayout, site: Site) -> Plan:
        if candidate not in self.plans or candidate.pattern.per_site:
            block = candidate.pattern.block
            raster = layout.tiled(None, block) if layout.block != block else layout
            plan = candidate.pattern.plan(raster, candidate.density, site).to(layout.device)
            self.plans[candidate] = plan
        return self.plans[candidate]
