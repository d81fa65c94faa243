"""Muon: momentum whose matrix updates are made orthogonal.

Math: M <- mu M + G;  O = NewtonSchulz5(G + mu M), about U V^T of its SVD;  W <- W - lr 0.2 sqrt(max(n, m)) O.
The factor gives updates the size that AdamW's have, so both can share one learning rate.
Cost: 15 small matrix products a step and shape; equal shapes are stacked and go together.
Source: K. Jordan et al., "Muon" (2024); the scale from Liu et al., "Muon is scalable for LLM training" (2025), 2.2.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum, for matrices and for convolution kernels taken as (outputs, all else).

    `lr` may be a tensor, which a CUDA graph then reads afresh at each replay.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float | Tensor, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for shape, parameters in shapes.items():
                gradients = torch.stack([parameter.grad.flatten(1) for parameter in parameters])
                buffers = [self._buffer(parameter) for parameter in parameters]
                torch._foreach_lerp_(buffers, list(gradients.unbind()), 1 - group["momentum"])
                ahead = gradients.lerp(torch.stack(buffers), group["momentum"])
                scale = 0.2 * max(ahead.shape[1:]) ** 0.5
                updates = orthogonal(ahead).to(ahead.dtype) * (-scale * group["lr"])
                torch._foreach_add_(parameters, [update.view(shape) for update in updates.unbind()])

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter.flatten(1))
        return state["momentum"]


def orthogonal(stack: Tensor, steps: int = 5) -> Tensor:
    """Return the nearest orthogonal matrix, roughly, of each matrix in (n, rows, columns)."""
    x = stack.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x
