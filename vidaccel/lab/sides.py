"""One way of running a model at real size: a copy of the stock class that shares its weights, dense or accelerated."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..api import Acceleration, accelerate
from ..caching import CachePolicy
from ..grid import Site, TokenLayout
from ..patterns import Pattern, Plan
from ..pipelines.zoo import RealModel
from ..schedule import Schedule
from .rivals import Context

Shape = dict[str, int]
"""How many blocks each list of a transformer has."""


def shapes(model: RealModel, layers: int) -> dict[str, Shape]:
    """Depths whose times tell what a layer of each list costs, and what is no layer: the difference of two calls."""
    base = dict.fromkeys(model.layers, 1)
    return {"base": base} | {
        name: {**base, name: 1 + min(layers, count - 1)} for name, count in model.layers.items() if count > 1
    }


@dataclass(frozen=True)
class Times:
    """What calls of several depths tell of all layers.

    Attributes:
        model: which.
        depths: of the calls: `shapes`, and others that say nothing of single layers.
        ms: median milliseconds at each.
    """

    model: RealModel
    depths: Mapping[str, Shape]
    ms: Mapping[str, float]

    @property
    def layer(self) -> dict[str, float]:
        """Milliseconds of one more block of each list."""
        base = self.ms["base"]
        return {
            name: (self.ms[name] - base) / (self.depths[name][name] - 1)
            for name in self.depths
            if name in self.model.layers
        }

    @property
    def call(self) -> float:
        """Milliseconds of all blocks."""
        return self.ms["base"] + sum((self.model.layers[name] - 1) * each for name, each in self.layer.items())

    def row(self) -> dict[str, Any]:
        """As a part of a row."""
        return {"base_ms": self.ms["base"], "layer_ms": self.layer, "call_ms": self.call}


def twin(transformer: nn.Module, shape: Shape) -> Any:
    """The same model with the first blocks of each list. Modules are copies, weights are not."""
    shared = {id(tensor): tensor for tensor in itertools.chain(transformer.parameters(), transformer.buffers())}
    copied = copy.deepcopy(transformer, dict(shared))
    for name, count in shape.items():
        setattr(copied, name, nn.ModuleList(list(getattr(copied, name))[:count]))
    return copied


def compile_blocks(transformer: Any, lists: Mapping[str, int]) -> None:
    """Compile each block, as `compile_repeated_blocks` does where a model has it (CogVideoX does not)."""
    if getattr(transformer, "_repeated_blocks", None):
        transformer.compile_repeated_blocks(fullgraph=True)
        return
    for name in lists:
        for block in getattr(transformer, name):
            block.compile(fullgraph=True)


@dataclass(eq=False)
class Planned:
    """A pattern that plans each layout once, so that several copies of a model can share its plans.

    Attributes:
        pattern: the pattern.
        plans: what it has planned.
    """

    pattern: Pattern
    plans: dict[tuple[Any, ...], Plan] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """See `Pattern`."""
        return self.pattern.name

    @property
    def per_site(self) -> bool:
        """See `Pattern`."""
        return self.pattern.per_site

    @property
    def block(self) -> int:
        """See `Pattern`."""
        return self.pattern.block

    def plan(self, layout: TokenLayout, density: float | None, site: Site) -> Plan:
        """See `Pattern.plan`."""
        key = (layout.grid, layout.text, layout.device, density, site if self.per_site else site.family)
        if key not in self.plans:
            self.plans[key] = self.pattern.plan(layout, density, site)
        return self.plans[key]


class Side:
    """One way of running a model, at one depth.

    Args:
        transformer: a `twin` of its own.
        model: which.
        inputs: of its calls.
        context: the dense attention that it runs on.
        attention: a pattern, or None for the stock model.
        density: of the pattern.
        cache: a caching policy.
        steps: denoising steps that the pipeline around it has.
        schedule: which steps and layers stay dense; none without one. What is to be timed runs, even if it is slower.
        compiled: compile its blocks.
    """

    def __init__(
        self,
        transformer: Any,
        model: RealModel,
        inputs: Mapping[str, Any],
        context: Context,
        *,
        attention: Pattern | None = None,
        density: float | None = None,
        cache: CachePolicy | None = None,
        steps: int | None = None,
        schedule: Schedule | None = None,
        compiled: bool = False,
    ) -> None:
        self.transformer = transformer
        self.model = model
        self.inputs = dict(inputs)
        self.context = context
        self.run: Acceleration | None = None
        if attention is not None or cache is not None:
            schedule = replace(schedule or Schedule(), even_if_slower=True)
            pipe = SimpleNamespace(transformer=transformer, _num_timesteps=steps or model.steps)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.run = accelerate(pipe, attention, density=density, cache=cache, schedule=schedule)
        if compiled:
            compile_blocks(transformer, model.layers)

    def __call__(self, name: str | None = None, **changes: Any) -> Any:
        """One call of the transformer, as its pipeline makes it.

        Args:
            name: of the guidance branch; default the pipeline's first.
            changes: of the inputs.
        """
        with ExitStack() as around:
            around.enter_context(torch.no_grad())
            around.enter_context(self.context())
            # Patterns warn of what they cannot gain at a size; the numbers say it.
            around.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            if hasattr(self.transformer, "cache_context"):
                around.enter_context(self.transformer.cache_context(name or self.model.contexts[0]))
            return self.transformer(**{**self.inputs, **changes})

    def close(self) -> None:
        """Give the transformer its processors back."""
        if self.run is not None:
            self.run.remove()
