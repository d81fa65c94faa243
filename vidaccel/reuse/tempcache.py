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
        is_empty: nothing was absorbed so far.
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
        self.is_empty = True

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What it keeps beside the cache."""
        return self.size, self._oldest, self._newest, self._at

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """All that it writes; stays where it is."""
        return *self.tensors, self._keys, self._values

    def bias(self) -> torch.Tensor:
        """(b, h, room) fp32: the logarithm of each group's size; -inf where there is none."""
        batch, _, heads, _ = self._keys.shape
        bias: torch.Tensor = self.size.log().unflatten(0, (batch, heads))
        return bias

    def absorb(self, number: int | torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Merge one frame, later than those before it. Writes nothing but tensors that stay, as CUDA graphs need it.

        Args:
            number: of the frame, or () int64 with it; its keys are rotated to it.
            keys: (b, slots, h, d).
            values: (b, slots, h, d).
        """
        if self._token_slots is not None:
            keys, values = (x.index_select(1, self._token_slots) for x in (keys, values))
        k, v = keys.float(), values.float()
        joins, group = self._correspondence(k)
        room = self.size.shape[1]
        stamp = torch.zeros_like(group) + number
        # Groups that go on are not to be given away below. Index `room` is a place for what is written nowhere.
        newest = _padded(self._newest).scatter(1, torch.where(joins, group, room), stamp)[:, :room]
        # From the back, so that what was never used is in front, and need not be attended to.
        longest_ago = room - 1 - newest.flip(1).argsort(dim=1, stable=True)
        rank = ((~joins).cumsum(1) - 1).clamp(min=0)
        slot = torch.where(joins, group, longest_ago.gather(1, rank))
        begun = torch.where(joins, room, slot)
        oldest = _padded(self._oldest).scatter(1, begun, stamp)[:, :room]
        before = self._remembered(number, oldest)
        before = _padded(before).scatter(1, begun, 0.0)[:, :room]
        size = before.scatter_add(1, slot, torch.ones_like(slot, dtype=torch.float32))
        latest, total, last = self._of_groups(slot, k, v)
        place, was, now = (self._by_token(x) for x in (slot, before.gather(1, slot), size.gather(1, slot)))

        def mean(buffer: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
            return (buffer.gather(1, place.expand_as(new)).float() * was + new) / now

        if self.settings.key == "mean":
            latest = mean(self._keys, k if last is None else _sums(k, last))
        # Of several tokens of a group each writes the same.
        for buffer, new in ((self._values, mean(self._values, total)), (self._keys, latest)):
            buffer.scatter_(1, place.expand_as(new), new.to(buffer.dtype))
        newest = newest.scatter(1, slot, stamp)
        if self._horizon is not None:
            size = torch.where(newest > number - self._horizon, size, 0.0)
        for kept, new in ((self.size, size), (self._oldest, oldest), (self._newest, newest), (self._at, slot)):
            kept.copy_(new)
        self.is_empty = False

    def _of_groups(
        self, slot: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """For each token (b, tokens, h, d) the latest key of its group and the sum of its new values.

        And the last token of its group, (b, tokens, h, 1); None where each has a group of its own, as those have that
        are compared with the token at their own place.
        """
        if self.settings.match == "position":
            return k, v, None
        at = torch.arange(slot.shape[1], device=slot.device).expand_as(slot)
        found = torch.zeros(self.size.shape, dtype=torch.int64, device=slot.device).scatter_reduce(1, slot, at, "amax")
        last = self._by_token(found.gather(1, slot))
        return k.gather(1, last.expand_as(k)), _sums(v, last), last

    def _by_token(self, x: torch.Tensor) -> torch.Tensor:
        """(b * h, tokens) as (b, tokens, h, 1)."""
        batch, heads = self._keys.shape[0], self._keys.shape[2]
        folded: torch.Tensor = x.unflatten(0, (batch, heads))
        return folded.transpose(1, 2)[..., None]

    def snapshot(self) -> tuple[torch.Tensor, ...]:
        """Everything, to come back to."""
        return tuple(x.clone() for x in (*self.state, torch.tensor(self.is_empty)))

    def restore(self, snapshot: tuple[torch.Tensor, ...]) -> None:
        """Go back to a snapshot."""
        for kept, before in zip(self.state, snapshot, strict=False):
            kept.copy_(before)
        self.is_empty = bool(snapshot[-1])

    def _remembered(self, number: int | torch.Tensor, oldest: torch.Tensor) -> torch.Tensor:
        """(b * h, room) sizes before a frame; of a group that is longer than the horizon, what is inside of it."""
        if not self._horizon:
            return self.size
        share = (self._horizon - 1) / self._horizon
        return torch.where(number - oldest >= self._horizon, self.size * share, self.size)

    def _correspondence(self, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether each new key (b, tokens, h, d) joins a group, and which: both (b * h, tokens)."""
        if self.is_empty:
            return torch.zeros_like(self._at, dtype=torch.bool), self._at
        before = self._keys.gather(1, self._by_token(self._at).expand_as(k))
        unit, unit_before = (
            torch.nn.functional.normalize(x.float(), dim=-1).transpose(1, 2).flatten(0, 1) for x in (k, before)
        )
        if self.settings.match == "position":
            return (unit * unit_before).sum(-1) >= self.settings.threshold, self._at
        # One head at a time: a frame at 720p has 13 million pairs.
        best = [(new @ old.T).max(-1) for new, old in zip(unit, unit_before, strict=True)]
        group = torch.stack([self._at[row, found.indices] for row, found in enumerate(best)])
        return torch.stack([found.values for found in best]) >= self.settings.threshold, group


def _padded(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, 1))


def _sums(x: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """For each token the sum over its group (b, tokens, h, d), of which `last` (b, tokens, h, 1) is the last token."""
    index = last.expand_as(x)
    return torch.zeros_like(x).scatter_add(1, index, x).gather(1, index)
