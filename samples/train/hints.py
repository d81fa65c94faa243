"""Hints: a student's inner layers are asked for what its teacher's hold.

A velocity says what came out of the teacher's layers, not what they found on the way: where the object is, which
outline it has. Linear maps of the student's hidden states are therefore held against the teacher's; the maps are thrown
away after training. A few of the teacher's channels are large and hardly change, so each channel is standardised first:
what is asked for is what differs between places.

Source: A. Romero et al., "FitNets: hints for thin deep nets" (2015); for diffusion, B.-K. Kim et al., "BK-SDM" (2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Hints(nn.Module):
    """Watches a student and its teacher after a third and after two thirds of their layers.

    Args:
        student: Blocks whose output is, or begins with, hidden states (b, n, `width`).
        teacher: Blocks whose output is hidden states (b or more, n, `wide`), of the same n places.
        width: Channels of the student.
        wide: Channels of the teacher.
    """

    def __init__(self, student: Sequence[nn.Module], teacher: Sequence[nn.Module], width: int, wide: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(width, wide) for _ in range(2))
        self._held: dict[tuple[str, int], Tensor] = {}
        for number in range(2):
            for name, blocks in (("student", student), ("teacher", teacher)):
                last = round(len(blocks) * (number + 1) / 3) - 1
                blocks[last].register_forward_hook(partial(self._hold, (name, number)))

    def _hold(self, key: tuple[str, int], block: nn.Module, given: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        self._held[key] = output if isinstance(output, Tensor) else output[0]

    def forward(self) -> Tensor:
        """Return the mean squared error of the last call of both: of the teacher's batch, the first samples count."""
        errors = []
        for number, read in enumerate(self.maps):
            own = self._held.pop(("student", number))
            told = self._held.pop(("teacher", number))[: len(own)].float()
            asked = F.batch_norm(told.flatten(0, 1), None, None, training=True).view_as(told)
            errors.append((read(own).float() - asked).square().mean())
        return torch.stack(errors).mean()
