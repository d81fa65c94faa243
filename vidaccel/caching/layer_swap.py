"""How caches, and FreeSwim's second path, act on blocks: their list is another one for the duration of a call.

Before a call of the transformer its lists of blocks are replaced by lists of stand-ins, after it (also after a failed
one) they are put back. Nothing else of the model is touched: no `forward`, no class, no hooks on blocks. So whoever
wraps the transformer or its blocks, before or after (offload, LoRA, compile), is neither seen nor disturbed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from ..errors import InstallError
from ..family import Stack


class Place(NamedTuple):
    """One block.

    Attributes:
        number: its number, over all lists.
        total: how many blocks there are.
        name: its path, such as "blocks.3".
    """

    number: int
    total: int
    name: str

    @property
    def first(self) -> bool:
        """No block comes before it."""
        return self.number == 0

    @property
    def last(self) -> bool:
        """No block comes after it."""
        return self.number == self.total - 1


Visit = Callable[[Place, nn.Module, Sequence[Any], Mapping[str, Any]], Any]
"""Runs, or stands in for, a block: (place, block, args, kwargs) -> what the block returns."""


class StandIn(nn.Module):
    """Takes the place of a block and hands its calls to `visit`.

    It shares its block's parameters, buffers and children, so that walking the model during a call (processors,
    state_dict, devices) finds what it always finds.
    """

    def __init__(self, block: nn.Module, place: Place, visit: Visit) -> None:
        super().__init__()

        def forward(*args: Any, **kwargs: Any) -> Any:
            return visit(place, block, args, kwargs)

        # Past nn.Module's own __setattr__, which would register the block as a child of ours. Not disabled recursively:
        # the blocks that run inside are compiled where the whole model is.
        vars(self).update(
            _parameters=block._parameters,
            _buffers=block._buffers,
            _modules=block._modules,
            block=block,
            forward=torch.compiler.disable(forward, recursive=False),
        )


class LayerSwap:
    """Swaps the blocks of one transformer.

    Args:
        transformer: the module.
        stack: where its blocks are.
        visit: what runs in their place.

    Attributes:
        reached: stand-ins that ran since the last `swap`.

    Raises:
        InstallError: there are no blocks.
    """

    def __init__(self, transformer: nn.Module, stack: Stack, visit: Visit) -> None:
        self.transformer = transformer
        self.stack = stack
        self.reached = 0
        self._visit = visit
        self._real: dict[str, nn.Module] = {}
        self._ours: dict[str, nn.ModuleList] = {}
        if not self.blocks:
            name = type(transformer).__name__
            raise InstallError(f"{name} has no blocks in {', '.join(stack.lists)}; a cache would reach nothing")

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, in the order in which they run."""
        return [block for blocks in self._lists().values() for block in cast(nn.ModuleList, blocks)]

    def swap(self) -> None:
        """Put the stand-ins in place."""
        self.reached = 0
        self._real = self._lists()
        if not self._current():
            total, number = sum(len(cast(nn.ModuleList, blocks)) for blocks in self._real.values()), 0
            for name, blocks in self._real.items():
                ours = []
                for index, block in enumerate(cast(nn.ModuleList, blocks)):
                    ours.append(StandIn(block, Place(number, total, f"{name}.{index}"), self._run))
                    number += 1
                self._ours[name] = nn.ModuleList(ours)
        for name, stand_ins in self._ours.items():
            setattr(self.transformer, name, stand_ins)

    def restore(self) -> list[str]:
        """Put the blocks back. Returns the lists that somebody else has replaced meanwhile; those are left alone."""
        changed = []
        for name, real in self._real.items():
            if getattr(self.transformer, name) is self._ours[name]:
                setattr(self.transformer, name, real)
            else:
                changed.append(name)
        self._real = {}
        return changed

    def video(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """The video stream among a block's arguments, (b, tokens, width)."""
        name = self.stack.streams[0]
        return cast(torch.Tensor, kwargs[name] if name in kwargs else args[0])

    def video_of(self, output: Any) -> torch.Tensor:
        """The video stream of what a block has returned."""
        return cast(torch.Tensor, output if len(self.stack.streams) == 1 else output[0])

    def output(self, video: torch.Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a block returns whose video stream is `video` and whose other streams are as they came."""
        if len(self.stack.streams) == 1:
            return video
        others = [kwargs[n] if n in kwargs else args[i] for i, n in enumerate(self.stack.streams) if i]
        return (video, *others)

    def _run(self, place: Place, block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        self.reached += 1
        return self._visit(place, block, args, kwargs)

    def _lists(self) -> dict[str, nn.Module]:
        return {name: getattr(self.transformer, name, nn.ModuleList()) for name in self.stack.lists}

    def _current(self) -> bool:
        """The stand-ins of the last call still stand for these very blocks."""
        return list(self._ours) == list(self._real) and all(
            [vars(ours)["block"] for ours in self._ours[name]] == list(cast(nn.ModuleList, blocks))
            for name, blocks in self._real.items()
        )
