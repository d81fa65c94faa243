"""What a causal stream keeps of frames that have left the window: merged keys, a linear state, or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import UsageError
from ..reuse.linear_state import LinearState
from ..reuse.plan import ChunkPlanner
from ..reuse.tempcache import MergedKeys
from ..streaming import KVCache, Replays, VideoRope


class Evicted:
    """What remembers the evicted frames of one branch, layer by layer.

    Args:
        cache: what they leave.
        planner: of the stream, with its methods and the grid of a frame.
        rope: its positions.
        branch: name of the branch.
        replays: plays the merging of a frame back (CUDA graphs); None computes it.

    Attributes:
        merged: of each layer; None where frames are not merged.
        linear: of each layer; None where frames are not summed up.

    Raises:
        UsageError: a linear state without a trained projection for each layer.
    """

    def __init__(
        self, cache: KVCache, planner: ChunkPlanner, rope: VideoRope, branch: str, replays: Replays | None
    ) -> None:
        self._planner = planner
        self._rope = rope
        self._branch = branch
        self._replays = replays
        self._device = torch.device(cache.shape.device)
        # Positions of the frames that leave, the same for all layers.
        self._rotary: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.merged: list[MergedKeys | None] = [None] * len(cache.layers)
        self.linear: list[LinearState | None] = [None] * len(cache.layers)
        merge, hybrid = planner.merge, planner.methods.hybrid
        if merge is not None:
            tokens, slots, horizon = planner.grid[0] * planner.grid[1], planner.token_slots, planner.horizon
            self.merged = [MergedKeys(layer, merge, tokens, slots, horizon) for layer in cache.layers]
        elif hybrid is not None and hybrid.linear is not None:
            trained, d = hybrid.linear, cache.shape.d
            self.linear = [
                LinearState(*_projection(trained, layer, d, self._device), rope) for layer in range(len(cache.layers))
            ]

    @property
    def forgets(self) -> bool:
        """Nothing is kept."""
        return not self._states

    @property
    def _states(self) -> list[MergedKeys | LinearState]:
        return [state for state in (*self.merged, *self.linear) if state is not None]

    def advance(self, start: int) -> None:
        """A chunk begins at frame `start`; called before frames leave for it."""
        for linear in self.linear:
            if linear is not None:
                linear.advance(start)

    def absorb(self, layer: int, frames: list[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Remember frames of one layer.

        Args:
            layer: which.
            frames: their numbers.
            keys: (b, frames, slots, h, d), rotated; of a cache in host memory, there.
            values: likewise.
        """
        merged, linear = self.merged[layer], self.linear[layer]
        keys, values = keys.to(self._device), values.to(self._device)
        for place, frame in enumerate(frames):
            k, v = keys[:, place], values[:, place]
            if merged is not None:
                self._merge(merged, layer, frame, k, v)
            elif linear is not None:
                if self._planner.token_slots is not None:
                    k, v = (x.index_select(1, self._planner.token_slots) for x in (k, v))
                if frame not in self._rotary:
                    grid, device = self._planner.grid, self._device
                    self._rotary = {number: self._rope.rotary(number, 1, *grid, device=device) for number in frames}
                linear.absorb(k, self._rope.unrotated(k, self._rotary[frame]), v)

    def snapshot(self) -> list[Any]:
        """A copy of all layers' states, to come back to."""
        return [state.snapshot() for state in self._states]

    def restore(self, snapshot: list[Any]) -> None:
        """Go back to a snapshot."""
        for state, kept in zip(self._states, snapshot, strict=True):
            state.restore(kept)

    def _merge(self, merged: MergedKeys, layer: int, frame: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Absorb a frame; played back where forwards are, as it is some fifty small kernels a layer."""
        if self._replays is None:
            merged.absorb(frame, k, v)
            return

        def absorb(number: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            merged.absorb(number, k, v)
            return number

        number = torch.full((), frame, device=self._device)
        kind = ("merge", self._branch, layer)
        self._replays.run(kind, (merged.state, merged.is_empty), absorb, number, k, v)


def _projection(
    trained: Mapping[str, torch.Tensor], layer: int, d: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    found = [trained.get(f"{layer}.{part}") for part in ("weight", "bias")]
    if [None if x is None else tuple(x.shape) for x in found] != [(d, d), (d,)]:
        raise UsageError(f"hybrid memory was given no projection of {d} x {d} with its bias for layer {layer}")
    weight, bias = (x.to(device) for x in found if x is not None)
    return weight, bias
