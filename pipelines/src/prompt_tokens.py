"""AnnCA on the stock Wan, which sees all frames at once: cross-attention to the prompt tokens that matter.

Padding is one token, and of longer prompts each head attends to the tokens that hash like its queries; see
`vidaccel.reuse.cross`. A prompt's keys and values are projected once a video and guidance branch, not at every step.
It goes together with whatever serves self-attention:

    >>> transformer.set_attn_processor(
    ...     vidaccel.attn_processors(transformer, "light-forcing", density=0.3) | ann_cross(transformer, density=0.5)
    ... )

HunyuanVideo and CogVideoX have no cross-attention: their text stands beside the video in one attention, as 0.2 % of its
keys (256 of 119,056, 720p) and 1.3 % (226 of 17,776). All of it is less than choosing would take, and padding is masked
where the model masks it, so text stays whole there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..errors import InstallError
from ..family import Call, attn_processors_of, place_processors, unwrap
from ..frontdoor import FrontDoor
from ..ranks import Ranks
from ..reuse import AnnCross
from ..reuse.cross import PromptChoice
from ..schedule import Step
from ..trace import CallRecord
from .causal_processors import PromptAttnProcessor, PromptMemory
from .wan import Wan

__all__ = ["AnnCrossAttnProcessor", "ann_cross", "remove"]


class Prompts:
    """The prompts of one transformer: gives each layer the memory of the call's guidance branch.

    Args:
        transformer: of the Wan family, text to video.
        settings: how many tokens.

    Attributes:
        processors: one for each cross-attention layer, by name.

    Raises:
        InstallError: there is no cross-attention that this could serve.
    """

    def __init__(self, transformer: nn.Module, settings: AnnCross) -> None:
        door = FrontDoor.of(transformer)
        module: Any = door.transformer
        name, config = type(module).__name__, module.config
        sites = door.family.cross_sites(module)
        if any(site.kind == "joint" for site in door.family.sites(module)):
            raise InstallError(
                f"{name} has no cross-attention: its text stands beside the video in one attention, as about 1 % of "
                "its keys or less, which patterns keep whole; AnnCA is for Wan"
            )
        if not isinstance(door.family, Wan) or config.image_dim is not None or config.added_kv_proj_dim is not None:
            raise InstallError(f"AnnCA serves Wan's cross-attention to text; that of this {name} is another one")
        stock = attn_processors_of(module)
        if taken := [site for site in sites if isinstance(stock[site], PromptAttnProcessor)]:
            raise InstallError(f"{len(taken)} layers of this {name} choose prompt tokens already; call remove() first")
        self.processors = {site: PromptAttnProcessor(stock[site]) for site in sites}
        self._choice = PromptChoice.of(settings, next(module.parameters()).device)
        self._memories: dict[str, dict[str, PromptMemory]] = {}
        self._module = module
        self._door = door
        self._unsubscribe = door.subscribe(self)

    def before(self, call: Call, step: Step, record: CallRecord) -> None:
        """Give every layer its memory; a new video has a new prompt."""
        if step.new_trajectory or record.branch is None:
            self._memories.clear()
        if record.branch is None:
            self._door.trace.note("guidance branches cannot be told apart here: prompts are projected at every step")
        branch = record.branch or ""
        if branch not in self._memories:
            choice = replace(self._choice, ranks=Ranks.of(self._module))
            self._memories[branch] = {site: PromptMemory(choice) for site in self.processors}
            # Projecting looks at the prompt's values: outside of compiled graphs, for this one call.
            torch.compiler.set_stance("force_eager")
        for site, memory in self._memories[branch].items():
            self.processors[site].memory = memory

    def after(self, record: CallRecord) -> None:
        """End of the call."""
        torch.compiler.set_stance("default")
        for processor in self.processors.values():
            if processor.memory is not None and processor.memory.note:
                self._door.trace.note(f"ann-cross: {processor.memory.note}")
            processor.memory = None

    def remove(self) -> None:
        """Give the transformer's places that still hold ours their own processors back."""
        current = attn_processors_of(self._module)
        ours = {site: mine.stock for site, mine in self.processors.items() if current[site] is mine}
        place_processors(self._module, current | ours)
        self._unsubscribe()
        self._memories.clear()


_installed: WeakKeyDictionary[nn.Module, Prompts] = WeakKeyDictionary()


def ann_cross(transformer: nn.Module, *, density: float = 0.5, bits: int = 8, block: int = 64) -> dict[str, Any]:
    """Processors of the cross-attention layers, by name, that choose prompt tokens.

    Args:
        transformer: a Wan transformer, text to video.
        density: of the padded prompt, in (0, 1].
        bits: of the hash.
        block: keys that a kernel reads together; no prompt is cut below one block.

    Raises:
        InstallError: there is no cross-attention that this could serve, or it is served already.
        UsageError: settings that cannot be.
    """
    prompts = Prompts(transformer, AnnCross(density, bits, block))
    _installed[unwrap(transformer)] = prompts
    return dict(prompts.processors)


class AnnCrossAttnProcessor:
    """One object for all layers: at its first call in each, it gives that layer the processor that it should have.

    `transformer.set_attn_processor(AnnCrossAttnProcessor(transformer, density=0.5))` leaves self-attention as it was.

    Args:
        transformer: a Wan transformer, text to video.
        settings: as those of `ann_cross`.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, transformer: nn.Module, **settings: Any) -> None:
        wanted = attn_processors_of(transformer)
        wanted |= ann_cross(transformer, **settings)
        layers = {name: transformer.get_submodule(name.removesuffix(".processor")) for name in wanted}
        self._wanted = WeakKeyDictionary({layers[name]: processor for name, processor in wanted.items()})

    def __call__(self, attn: Any, *inputs: Any, **kwargs: Any) -> Any:
        """Attend as the layer should, now and from now on."""
        processor = self._wanted[attn]
        attn.set_processor(processor)
        return processor(attn, *inputs, **kwargs)


def remove(transformer: nn.Module) -> None:
    """Give cross-attention its own processors back.

    Raises:
        InstallError: `ann_cross` is not on this transformer.
    """
    prompts = _installed.pop(unwrap(transformer), None)
    if prompts is None:
        raise InstallError(f"this {type(transformer).__name__} chooses no prompt tokens; there is nothing to remove")
    prompts.remove()
