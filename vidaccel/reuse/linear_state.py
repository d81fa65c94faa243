"""Frames that have left the window, in a state of constant size: linear attention with a trained projection.

Math, for each head, over the n tokens absorbed so far:
    z = mean relu(k),   H = mean rope(k) v^T
    y = W [ rope(q)^T H / (relu(q)^T z + 1e-6) ] + b        is added to the window's attention
    The numerator can be negative, and its weights are not those of the denominator: W (d x d, shared by heads) is
    trained to make up for that, and starts at zero. Without trained weights the state is worth nothing.
Positions: frames are absorbed at their own places, for the chunk that they have left the window for. From the chunk
    at frame `CAP` on, the state then moves along with the stream, so that what was absorbed keeps its distance from the
    queries: one rotation of H's temporal channels a chunk, before the next frames are absorbed.
Cost: 2 d^2 flops a query and head; d (d + 1) numbers a head, whatever the length.
Source: Hybrid Forcing, arXiv 2604.10103, section 3.
"""

from __future__ import annotations

import torch

from ..streaming.rope import VideoRope
from .in_place import in_place

CAP = 18
"""The frame at which queries stand for ever after; the released configuration's."""


class LinearState:
    """One layer of one branch.

    Args:
        weight: W, (d, d).
        bias: b, (d,).
        rope: how positions move.

    Attributes:
        tokens: absorbed so far.
        z: (b * h, d), mean of relu(k).
        h: (b * h, d, d), mean of rope(k) v^T.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, rope: VideoRope) -> None:
        self.weight, self.bias = weight, bias
        self.tokens = 0
        self.z = torch.zeros(())
        self.h = torch.zeros(())
        self._rope = rope
        self._start = 0

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What it remembers."""
        return self.z, self.h

    def absorb(self, keys: torch.Tensor, plain: torch.Tensor, values: torch.Tensor) -> None:
        """Add tokens: rotated keys, the same without rotation, and values, each (b, l, heads, d)."""
        k, raw, v = (x.transpose(1, 2).flatten(0, 1) for x in (keys, plain, values))
        high = torch.promote_types(k.dtype, torch.float32)
        count, before = k.shape[1], self.tokens
        total = before + count
        z, h = raw.to(high).relu().sum(1), k.to(high).transpose(1, 2) @ v.to(high)
        self._set((before * self.z.to(z) + z) / total, (before * self.h.to(h) + h) / total)
        self.tokens = total

    def advance(self, start: int) -> None:
        """A chunk begins at frame `start`; called before frames are absorbed for it."""
        by = max(start, CAP) - max(self._start, CAP)
        self._start = start
        if by and self.tokens:
            self._set(self.z, self._rope.moved(self.h.transpose(1, 2), by).transpose(1, 2))

    def attend(self, query: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        """What is added for rotated queries, and the same without rotation, each (b, l, heads, d)."""
        q, raw = (x.transpose(1, 2).to(self.h.dtype) for x in (query, plain))
        heads = q.shape[1]
        h, z = self.h.unflatten(0, (-1, heads)), self.z.unflatten(0, (-1, heads))
        share = (q @ h) / (raw.relu() @ z[..., None] + 1e-6)
        out: torch.Tensor = share @ self.weight.to(share).T + self.bias.to(share)
        return out.transpose(1, 2).to(query.dtype)

    def snapshot(self) -> tuple[int, torch.Tensor, torch.Tensor, int]:
        """Everything, to come back to."""
        return self.tokens, self.z.clone(), self.h.clone(), self._start

    def restore(self, snapshot: tuple[int, torch.Tensor, torch.Tensor, int]) -> None:
        """Go back to a snapshot."""
        self.tokens, z, h, self._start = snapshot
        self._set(z, h)

    def _set(self, z: torch.Tensor, h: torch.Tensor) -> None:
        self.z, self.h = in_place((self.z, self.h), z, h)
