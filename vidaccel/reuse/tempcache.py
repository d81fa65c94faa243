"""Frames that have left the window live on as merged keys: one for each thing that stayed the same over time.

Idea: a still background gives nearly the same key in every frame. m identical keys are one key whose logit has log(m)
    added, and whose value is their mean: exactly so, and nearly so for nearly identical keys.
Math: each key of a new frame looks for the most similar key of the frame before; where the cosine reaches
    `threshold` it joins that one's group. A group is its latest key, at its latest place, the mean of its values, and
    log(size).
Cost: n products of d a head (the same place) or n^2 (anywhere), once when a frame leaves, not at a step.
Source: TempCache of FAST-AR, arXiv 2602.01801, section 4.1. Comparing consecutive frames: rotary positions alone take a
    still token's cosine to 0.85 over 21 frames; here the older key is first rotated to the newer one's time.
Limits: noise never merges, so there is room for a fixed number of groups; where it is full, those that have not grown
    for longest go. Shapes are fixed and nothing is read back.
"""

from __future__ import annotations

import torch

from ..streaming.kvcache import LayerCache
from ..streaming.rope import VideoRope
from .methods import TempCache


class MergedKeys:
    """Merged keys of one layer: the first `room` slots of its cache.

    Args:
        layer: whose first `extra` slots they fill.
        settings: how they merge.
        rope: how positions move.
        tokens: of one frame.
        token_slots: (tokens,) places of the tokens among the slots of a frame; None where there are no holes.

    Attributes:
        size: (b * h, room) fp32, keys in each group; 0 where there is none.
    """

    def __init__(
        self,
        layer: LayerCache,
        settings: TempCache,
        rope: VideoRope,
        tokens: int,
        token_slots: torch.Tensor | None = None,
    ) -> None:
        self.settings = settings
        self.layer = layer
        self._rope = rope
        self._token_slots = token_slots
        self._keys, self._values = (buffer[:, : layer.extra] for buffer in layer.buffers)
        batch, room, heads, _ = self._keys.shape
        rows, device = batch * heads, self._keys.device
        self.size = torch.zeros(rows, room, device=device)
        # Number of the frame that a group was last seen in; -1 for none. Groups of the last frame, by place.
        self._newest = torch.full((rows, room), -1, device=device)
        self._at = torch.zeros(rows, tokens, dtype=torch.int64, device=device)
        self._last: int | None = None

    def reset(self) -> None:
        """Forget everything."""
        self.size.zero_()
        self._newest.fill_(-1)
        self._last = None

    def bias(self) -> torch.Tensor:
        """(b, h, room) fp32: the logarithm of each group's size; -inf where there is none."""
        batch, _, heads, _ = self._keys.shape
        bias: torch.Tensor = self.size.log().unflatten(0, (batch, heads))
        return bias

    def absorb(self, number: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Merge one frame, later than those before it.

        Args:
            number: of the frame; its keys are rotated to it.
            keys: (b, slots, h, d).
            values: (b, slots, h, d).
        """
        if self._token_slots is not None:
            keys, values = (x.index_select(1, self._token_slots) for x in (keys, values))
        k, v = (x.transpose(1, 2).flatten(0, 1).float() for x in (keys, values))
        kept_k, kept_v = (x.transpose(1, 2).flatten(0, 1).float() for x in (self._keys, self._values))
        if self._last is not None:
            kept_k = torch.where((self._newest == self._last)[..., None], self._moved(kept_k, number), kept_k)
        joins, group = self._correspondence(k, kept_k)
        room = self.size.shape[1]
        # Groups that go on are not to be given away below. Index `room` is a place for what is written nowhere.
        newest = _padded(self._newest).scatter(1, torch.where(joins, group, room), number)[:, :room]
        oldest = newest.argsort(dim=1, stable=True)
        rank = ((~joins).cumsum(1) - 1).clamp(min=0)
        slot = torch.where(joins, group, oldest.gather(1, rank))
        begun = torch.where(joins, room, slot)
        before = _padded(self.size).scatter(1, begun, 0.0)[:, :room]
        size = before.scatter_add(1, slot, torch.ones_like(slot, dtype=torch.float32))
        wide = slot[..., None].expand_as(k)
        total = (kept_v * before[..., None]).scatter_add(1, wide, v)
        grown = torch.zeros_like(size, dtype=torch.bool).scatter(1, slot, True)[..., None]
        kept_v = torch.where(grown, total / size.clamp(min=1)[..., None], kept_v)
        if self.settings.key == "mean":
            latest = (kept_k * before[..., None]).scatter_add(1, wide, k) / size.clamp(min=1)[..., None]
        else:
            place = torch.arange(k.shape[1], device=k.device).expand_as(slot)
            last = torch.zeros_like(newest).scatter_reduce(1, slot, place, "amax")
            latest = k.gather(1, last[..., None].expand(-1, -1, k.shape[-1]))
        kept_k = torch.where(grown, latest, self._stored_keys())
        self.size.copy_(size)  # a captured CUDA graph reads it
        self._newest = newest.scatter(1, slot, number)
        self._at, self._last = slot, number
        heads = self._keys.shape[2]
        for buffer, new in ((self._keys, kept_k), (self._values, kept_v)):
            buffer.copy_(new.unflatten(0, (-1, heads)).transpose(1, 2))

    def snapshot(self) -> tuple[torch.Tensor, ...]:
        """Everything, to come back to."""
        last = torch.tensor(-1 if self._last is None else self._last)
        return tuple(x.clone() for x in (self.size, self._newest, self._at, last, self._keys, self._values))

    def restore(self, snapshot: tuple[torch.Tensor, ...]) -> None:
        """Go back to a snapshot."""
        self.size.copy_(snapshot[0])
        self._newest, self._at = (x.clone() for x in snapshot[1:3])
        self._last = None if int(snapshot[3]) < 0 else int(snapshot[3])
        self._keys.copy_(snapshot[4])
        self._values.copy_(snapshot[5])

    def _stored_keys(self) -> torch.Tensor:
        return self._keys.transpose(1, 2).flatten(0, 1).float()

    def _moved(self, keys: torch.Tensor, number: int) -> torch.Tensor:
        assert self._last is not None
        return self._rope.moved(keys, number - self._last)

    def _correspondence(self, k: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether each new key joins a group, and which: both (b * h, tokens)."""
        if self._last is None:
            return torch.zeros_like(self._at, dtype=torch.bool), self._at
        before = kept.gather(1, self._at[..., None].expand_as(k))
        unit, unit_before = (torch.nn.functional.normalize(x, dim=-1) for x in (k, before))
        if self.settings.match == "position":
            return (unit * unit_before).sum(-1) >= self.settings.threshold, self._at
        # One head at a time: a frame at 720p has 13 million pairs.
        best = [(new @ old.T).max(-1) for new, old in zip(unit, unit_before, strict=True)]
        group = torch.stack([self._at[row, found.indices] for row, found in enumerate(best)])
        return torch.stack([found.values for found in best]) >= self.settings.threshold, group


def _padded(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, 1))
