"""Frames that are no longer kept whole live on as merged keys: one for each thing that stayed the same over time.

Idea: a still background gives nearly the same key in every frame. m identical keys are one key whose logit has log(m)
    added, and whose value is their mean: exactly so, and nearly so for nearly identical keys.
Math: each key of a new frame looks for the most similar key of the frame before; where the cosine reaches
    `threshold` it joins that one's group. A group is its latest key, at its latest place, the mean of its values, and
    log(size).
Cost: n products of d a head (the same place) or n^2 (anywhere), once when a frame leaves, not at a step.
Source: TempCache of FAST-AR, arXiv 2602.01801, section 4.1. Keys are compared as they are attended to, rotated to their
    own frames: a head that looks at one moment must not have two merged. How near is near enough depends on the model:
    the paper takes 0.9 for its own. Error of one forward of wan-causal-tiny against dense, one clip, 33 frames in: with
    0.98 0.04, a window of the same bytes 0.05; with 0.9 0.42, or with 0.99 and keys rotated to one time first 0.37,
    which is worse than to see no past at all, 0.29.
Limits: noise never merges, so there is room for a fixed number of groups; where it is full, those that have not grown
    for longest go. What the rollout's window would not show goes too: a group weighs no more than the window's frames.
    Shapes are fixed and nothing is read back.
"""

from __future__ import annotations

import torch

from ..streaming.kvcache import LayerCache
from .methods import TempCache


class MergedKeys:
    """Merged keys of one layer: the first `room` slots of its cache, used from the last one on.

    Args:
        layer: whose first `extra` slots they fill.
        settings: how they merge.
        tokens: of one frame.
        token_slots: (tokens,) places of the tokens among the slots of a frame; None where there are no holes.
        horizon: latest absorbed frames that are to be remembered; None remembers as many as there is room for.

    Attributes:
        size: (b * h, room) fp32, keys in each group; 0 where there is none.
    """

    def __init__(
        self,
        layer: LayerCache,
        settings: TempCache,
        tokens: int,
        token_slots: torch.Tensor | None = None,
        horizon: int | None = None,
    ) -> None:
        self.settings = settings
        self.layer = layer
        self._token_slots = token_slots
        self._horizon = horizon
        self._keys, self._values = (buffer[:, : layer.extra] for buffer in layer.buffers)
        batch, room, heads, _ = self._keys.shape
        rows, device = batch * heads, self._keys.device
        self.size = torch.zeros(rows, room, device=device)
        # Frames that a group was first and last seen in; -1 for none.
        self._oldest = torch.full((rows, room), -1, device=device)
        self._newest = torch.full((rows, room), -1, device=device)
        # Groups of the last frame, by place.
        self._at = torch.zeros(rows, tokens, dtype=torch.int64, device=device)
        self._is_empty = True

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
        k, v, kept_k, kept_v = (
            x.transpose(1, 2).flatten(0, 1).float() for x in (keys, values, self._keys, self._values)
        )
        joins, group = self._correspondence(k, kept_k)
        room = self.size.shape[1]
        # Groups that go on are not to be given away below. Index `room` is a place for what is written nowhere.
        newest = _padded(self._newest).scatter(1, torch.where(joins, group, room), number)[:, :room]
        # From the back, so that what was never used is in front, and need not be attended to.
        longest_ago = room - 1 - newest.flip(1).argsort(dim=1, stable=True)
        rank = ((~joins).cumsum(1) - 1).clamp(min=0)
        slot = torch.where(joins, group, longest_ago.gather(1, rank))
        begun = torch.where(joins, room, slot)
        oldest = _padded(self._oldest).scatter(1, begun, number)[:, :room]
        before = self._remembered(number, oldest)
        before = _padded(before).scatter(1, begun, 0.0)[:, :room]
        size = before.scatter_add(1, slot, torch.ones_like(slot, dtype=torch.float32))
        grown = torch.zeros_like(size, dtype=torch.bool).scatter(1, slot, True)[..., None]

        def mean(kept: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
            total = (kept * before[..., None]).scatter_add(1, slot[..., None].expand_as(new), new)
            return total / size.clamp(min=1e-6)[..., None]

        if self.settings.key == "mean":
            latest = mean(kept_k, k)
        else:
            place = torch.arange(k.shape[1], device=k.device).expand_as(slot)
            last = torch.zeros_like(newest).scatter_reduce(1, slot, place, "amax")
            latest = k.gather(1, last[..., None].expand(-1, -1, k.shape[-1]))
        kept_k, kept_v = torch.where(grown, latest, kept_k), torch.where(grown, mean(kept_v, v), kept_v)
        newest = newest.scatter(1, slot, number)
        if self._horizon is not None:
            size = torch.where(newest > number - self._horizon, size, 0.0)
        self.size.copy_(size)  # a captured CUDA graph reads it
        self._oldest, self._newest, self._at, self._is_empty = oldest, newest, slot, False
        heads = self._keys.shape[2]
        for buffer, new in ((self._keys, kept_k), (self._values, kept_v)):
            buffer.copy_(new.unflatten(0, (-1, heads)).transpose(1, 2))

    def snapshot(self) -> tuple[torch.Tensor, ...]:
        """Everything, to come back to."""
        state = (self.size, self._oldest, self._newest, self._at, torch.tensor(self._is_empty))
        return tuple(x.clone() for x in (*state, self._keys, self._values))

    def restore(self, snapshot: tuple[torch.Tensor, ...]) -> None:
        """Go back to a snapshot."""
        self.size.copy_(snapshot[0])
        self._oldest, self._newest, self._at = (x.clone() for x in snapshot[1:4])
        self._is_empty = bool(snapshot[4])
        self._keys.copy_(snapshot[5])
        self._values.copy_(snapshot[6])

    def _remembered(self, number: int, oldest: torch.Tensor) -> torch.Tensor:
        """(b * h, room) sizes before a frame; of a group that is longer than the horizon, what is inside of it."""
        if not self._horizon:
            return self.size
        share = (self._horizon - 1) / self._horizon
        return torch.where(number - oldest >= self._horizon, self.size * share, self.size)

    def _correspondence(self, k: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether each new key joins a group, and which: both (b * h, tokens)."""
        if self._is_empty:
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
