"""Named attention processors: one object for `set_attn_processor`, whatever the layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .errors import InstallError
from .family import Call, Family, attention_family_of
from .grid import Site, VideoGrid
from .install import Installation
from .patterns import (
    Ann,
    FlashBlock,
    FreeSwim,
    LightForcing,
    Neighborhood,
    Pattern,
    PerHead,
    PerLayer,
    Plan,
    Pyramid,
    Radial,
    SlidingWindow,
    SparseVideoGen,
    TempCache,
    TopK,
    Union,
    check_given,
    check_model,
    nested,
)
from .ranks import HeadPart
from .schedule import Schedule
from .wrapping import SparseAttnProcessor


class NamedAttnProcessor:
    """Base of the named processors: one object for all layers of a transformer.

    `transformer.set_attn_processor(RadialAttnProcessor(transformer, density=0.25))` puts one object in every place,
    cross-attention and refiners included. It knows what stood in each place, and at the transformer's next call gives
    every layer its own: a `SparseAttnProcessor` where video attends to video, and elsewhere what stood there.

    Args:
        transformer: the transformer it will serve, so that it sees grid and step.
        density: wanted fraction of video-video pairs, in (0, 1]; None lets the pattern's own parameters decide.
        schedule: which steps and layers stay dense; all are sparse without one.
        num_inference_steps: needed by schedules with fractions or dense last steps.
        grid: (t, y, x) latent tokens, instead of a transformer: one fixed plan, the same for all layers and steps.
        pattern: the pattern's own parameters.

    Raises:
        InstallError: what differs between layers or steps was asked for with `grid`; at the first call, when neither
            `transformer` nor `grid` was given.
        PatternError: a density that the pattern cannot have, or none where it needs one.
    """

    pattern_type: type[Pattern]

    def __init__(
        self,
        transformer: nn.Module | None = None,
        *,
        density: float | None = None,
        schedule: Schedule | None = None,
        num_inference_steps: int | None = None,
        grid: tuple[int, int, int] | None = None,
        **pattern: Any,
    ) -> None:
        self._pattern = self.pattern_type(**pattern)
        self._density = density
        self._grid = None if grid is None else VideoGrid(*grid)
        self._fixed: dict[torch.device, Plan] = {}
        if grid is not None:
            check_given(self._pattern, density)
            self._check_fixed(schedule, num_inference_steps)
        if transformer is not None:
            Installation.of(
                transformer,
                self._pattern,
                density=density,
                schedule=schedule or Schedule(),
                num_inference_steps=num_inference_steps,
                stand_in=self,
            )

    def _check_fixed(self, schedule: Schedule | None, steps: int | None) -> None:
        """Raise InstallError for what a fixed plan cannot do: it sees neither step nor branch nor layer."""
        parts = list(nested(self._pattern))
        asked = {
            "schedule=": schedule is not None,
            "num_inference_steps=": steps is not None,
            "guide=": any(isinstance(part, FreeSwim) and part.guide for part in parts),
            "reselect=": any(getattr(part, "reselect", 1) != 1 for part in parts),
            "flashblock": any(isinstance(part, FlashBlock) for part in parts),
            "a pattern for each layer": self._pattern.per_site,
        }
        if wrong := [what for what, is_asked in asked.items() if is_asked]:
            raise InstallError(
                f"{type(self).__name__} was given grid= and {', '.join(wrong)}, but a fixed grid tells nothing of "
                "layers and steps; leave grid= out and name the transformer, or use vidaccel.accelerate(pipe, ...)"
            )

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *inputs: Any, **kwargs: Any) -> Any:
        """Attend on the fixed grid; with a transformer, its first call takes this object's place."""
        name = type(self).__name__
        if self._grid is None:
            raise InstallError(
                f"{name} does not know the video's grid: build it as {name}(pipe.transformer, ...), so that it reads "
                f"every call, or with grid=(t, y, x) for one fixed size"
            )
        family = attention_family_of(attn)
        processor = SparseAttnProcessor(attn._default_processor_cls(), family)
        if family.is_video(attn, hidden_states, inputs[0] if inputs else kwargs.get("encoder_hidden_states")):
            processor.plan = self._fixed_plan(family, hidden_states.device, attn.heads)
        return processor(attn, hidden_states, *inputs, **kwargs)

    def _fixed_plan(self, family: Family, device: torch.device, heads: int) -> Plan:
        assert self._grid is not None
        if device not in self._fixed:
            layout = family.layout(Call(self._grid, 0, torch.zeros(1), None, device), self._pattern.block)
            check_model(self._pattern, 1, heads)
            plan = self._pattern.plan(layout, self._density, Site("", 0, "self", family.name))
            self._fixed[device] = plan.of_heads(HeadPart.whole(heads)).to(device)
        return self._fixed[device]


class RadialAttnProcessor(NamedAttnProcessor):
    """Radial attention (arXiv 2506.19852) for all layers; its pattern takes `rule`, `decay`, `block`, `sink`."""

    pattern_type = Radial


class NeighborhoodAttnProcessor(NamedAttnProcessor):
    """Generalized neighborhood attention (arXiv 2504.16922) for all layers; see `patterns.Neighborhood`."""

    pattern_type = Neighborhood


class SlidingWindowAttnProcessor(NamedAttnProcessor):
    """Sliding tile attention (arXiv 2502.04507) for all layers; see `patterns.SlidingWindow`."""

    pattern_type = SlidingWindow


class FlashBlockAttnProcessor(NamedAttnProcessor):
    """A sparse pattern, the rest from an earlier step (arXiv 2602.05305), for all layers; see `patterns.FlashBlock`."""

    pattern_type = FlashBlock


class FreeSwimAttnProcessor(NamedAttnProcessor):
    """FreeSwim's inward window (arXiv 2511.14712) for all layers; see `patterns.FreeSwim`."""

    pattern_type = FreeSwim


class UnionAttnProcessor(NamedAttnProcessor):
    """What any of several patterns keeps, for all layers; see `patterns.Union`."""

    pattern_type = Union


class PerHeadAttnProcessor(NamedAttnProcessor):
    """Another pattern for each head; see `patterns.PerHead`."""

    pattern_type = PerHead


class PerLayerAttnProcessor(NamedAttnProcessor):
    """Another pattern from some layers on; see `patterns.PerLayer`."""

    pattern_type = PerLayer


class TempCacheAttnProcessor(NamedAttnProcessor):
    """Merging of keys that stay the same over time (arXiv 2602.01801) for all layers; see `patterns.TempCache`."""

    pattern_type = TempCache


class TopKAttnProcessor(NamedAttnProcessor):
    """Block top-k by pooled scores for all layers; see `patterns.TopK`."""

    pattern_type = TopK


class AnnAttnProcessor(NamedAttnProcessor):
    """Approximate nearest neighbours (AnnSA, arXiv 2602.01801) for all layers; see `patterns.Ann`."""

    pattern_type = Ann


class LightForcingAttnProcessor(NamedAttnProcessor):
    """Light Forcing's hierarchical selection (arXiv 2602.04789) for all layers; see `patterns.LightForcing`."""

    pattern_type = LightForcing


class PyramidAttnProcessor(NamedAttnProcessor):
    """Pyramid attention (arXiv 2512.04025) for all layers; see `patterns.Pyramid`."""

    pattern_type = Pyramid


class SparseVideoGenAttnProcessor(NamedAttnProcessor):
    """Spatial or temporal heads, chosen online (arXiv 2502.01776), for all layers; see `patterns.SparseVideoGen`."""

    pattern_type = SparseVideoGen
