"""Keys and values of past frames, counted in frames.

Idea: each layer has one buffer [history | own chunk]. Every forward writes the own chunk behind the history, over what
    the step before wrote there, and attends to the whole range: nothing is concatenated, and an unfinished chunk never
    becomes history. When a chunk is finished, its last forward has written the clean keys, and `commit` only counts.
Eviction: a new chunk of m frames needs len(history) + m <= window. The oldest frames that are no sink go; frames behind
    them move into the holes, so at most m frames are copied a chunk. Softmax does not mind the order of keys, so frames
    stand in any order; `frames` tells which one stands where.
Cost: window x slots x heads x d x 2 elements a layer; 1.3B at 480p with 12 frames in bf16 is 3.2 GiB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..errors import StreamError

# (layer, frame numbers, keys, values)
OnEvict = Callable[[int, list[int], torch.Tensor, torch.Tensor], None]


class CacheShape(NamedTuple):
    """What one frame takes.

    Attributes:
        layers: attention layers.
        batch: samples.
        slots: of one frame in kernel order; its tokens, where the order has no holes.
        heads: attention heads.
        d: channels of a head.
        dtype: of keys and values.
        device: where attention runs.
    """

    layers: int
    batch: int
    slots: int
    heads: int
    d: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"

    @property
    def frame_bytes(self) -> int:
        """Keys and values of one frame in all layers."""
        return 2 * self.layers * self.batch * self.slots * self.heads * self.d * self.dtype.itemsize


class LayerCache:
    """One layer's part of a `KVCache`: what its attention processor holds.

    Attributes:
        buffers: keys and values, each (b, extra + frames * slots, h, d).
        keys: (b, frames, slots, h, d), one place for each frame.
        values: likewise.
        k: (b, extra + history + own slots, h, d), keys of the open chunk and of all that it sees.
        v: their values.
        own: slots of the open chunk, at the end of `k`.
        extra: slots before the frames, for keys that stand for evicted ones.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor, extra: int, slots: int) -> None:
        self.buffers = (k, v)
        self.keys, self.values = (buffer[:, extra:].unflatten(1, (-1, slots)) for buffer in (k, v))
        self.extra = extra
        self.k, self.v = k[:, :extra], v[:, :extra]
        self.own = 0

    @property
    def bytes(self) -> int:
        """What its buffers take."""
        first, second = self.buffers
        return int(first.nbytes + second.nbytes)

    def open(self, history: int, own: int) -> None:
        """Point at `history` frames and `own` frames behind them."""
        slots = self.keys.shape[2]
        self.k, self.v = (buffer[:, : self.extra + (history + own) * slots] for buffer in self.buffers)
        self.own = own * slots

    def write(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the own chunk's keys and values (b, own slots, h, d) in their place. Returns `k` and `v`."""
        start = self.k.shape[1] - k.shape[1]
        self.k[:, start:].copy_(k)
        self.v[:, start:].copy_(v)
        return self.k, self.v

    def history(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of what stands before the open chunk, (b, slots, h, d)."""
        end = self.k.shape[1] - self.own
        return self.k[:, :end], self.v[:, :end]


class HostLayerCache(LayerCache):
    """A layer whose frames live in host memory and visit the device, one layer at a time, when they are attended to.

    `room` is the one buffer pair on the device that all layers of a cache share.
    """

    def __init__(
        self, k: torch.Tensor, v: torch.Tensor, extra: int, slots: int, room: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        super().__init__(k, v, extra, slots)
        self._room = room
        self._host = (self.k, self.v)

    def open(self, history: int, own: int) -> None:
        """See `LayerCache`."""
        super().open(history, own)
        self._host = (self.k, self.v)
        self.k, self.v = (room[:, : self.k.shape[1]] for room in self._room)

    def write(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `LayerCache`."""
        start = self.k.shape[1] - k.shape[1]
        self.history()
        for room, host, own in ((self.k, self._host[0], k), (self.v, self._host[1], v)):
            room[:, start:].copy_(own)
            host[:, start:].copy_(own, non_blocking=True)
        return self.k, self.v

    def history(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See `LayerCache`; fetches them."""
        end = self.k.shape[1] - self.own
        for room, host in zip((self.k, self.v), self._host, strict=True):
            room[:, :end].copy_(host[:, :end], non_blocking=True)
        return self.k[:, :end], self.v[:, :end]


class Snapshot(NamedTuple):
    """A cache at one moment.

    Attributes:
        frames: as `KVCache.frames`.
        start: as `KVCache.start`.
        tensors: copies of the history, layer after layer.
        sink: copies of the first frames' keys as they were written.
    """

    frames: tuple[int, ...]
    start: int
    tensors: list[tuple[torch.Tensor, torch.Tensor]]
    sink: list[torch.Tensor]


class KVCache:
    """Frames that later chunks see.

    Args:
        shape: what one frame takes.
        window: most frames a chunk sees, its own included; None keeps all.
        sink: first frames, never evicted.
        max_bytes: buffers never take more.
        extra: slots of each layer for keys that stand for evicted frames.
        host: keep frames in (pinned) host memory; the device holds those of one layer at a time.
        movable_sink: keep the first frames' keys as they were written too, for `move_sink`.

    Attributes:
        frames: number of the frame in each place of the history.
        start: number of the next new frame.
        layers: one `LayerCache` a layer.

    Raises:
        StreamError: a window that `max_bytes` cannot hold.
    """

    def __init__(
        self,
        shape: CacheShape,
        *,
        window: int | None,
        sink: int = 0,
        max_bytes: int | None = None,
        extra: int = 0,
        host: bool = False,
        movable_sink: bool = False,
    ) -> None:
        self.shape = shape
        self.window = window
        self.sink = sink
        self.frames: list[int] = []
        self.start = 0
        self.layers: list[LayerCache] = []
        self._max_bytes = max_bytes
        self._extra = extra
        self._host = host
        self._movable_sink = movable_sink
        self._sink_keys: list[torch.Tensor] = []
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None
        self._capacity = 0
        self._own = 0
        if window is not None:
            self._allocate(window)

    @property
    def bytes(self) -> int:
        """What all buffers take, on the device and in host memory."""
        others = [*self._sink_keys, *(self._room or ())]
        return sum(layer.bytes for layer in self.layers) + int(sum(x.nbytes for x in others))

    def begin(self, own: int, on_evict: OnEvict | None = None) -> list[int]:
        """Open a chunk of `own` frames: evict what no longer fits.

        Args:
            own: latent frames.
            on_evict: called before frames go, with each layer's number, their numbers, and copies of their keys and
                values (b, frames, slots, h, d).

        Returns:
            Numbers of the frames that were evicted.

        Raises:
            StreamError: more frames than the window or `max_bytes` allows.
        """
        evicted: list[int] = []
        if self.window is not None:
            room = self.window - own
            if room < min(self.sink, len(self.frames)):
                raise StreamError(
                    f"a chunk of {own} frames does not fit a window of {self.window} beside {self.sink} first frames; "
                    "take a larger window or smaller chunks"
                )
            if len(self.frames) > room:
                evicted = self._evict(len(self.frames) - room, on_evict)
        elif len(self.frames) + own > self._capacity:
            self._allocate(max(len(self.frames) + own, self._capacity + self._capacity // 2))
        self._own = own
        for layer in self.layers:
            layer.open(len(self.frames), own)
        return evicted

    def commit(self) -> None:
        """The open chunk, as its last forward wrote it, becomes history."""
        first = self.start
        self.frames += range(first, first + self._own)
        self.start += self._own
        self._own = 0
        for layer in self.layers:
            layer.open(len(self.frames), 0)
        if self._movable_sink and first < self.sink:
            self._synchronize()
            self._sink_keys = [layer.keys[:, : min(self.sink, self.start)].clone() for layer in self.layers]

    def move_sink(self, move: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
        """Let the first frames stand right before the oldest other frame that is seen.

        Args:
            move: gives keys (..., d) as if they stood some frames later.
        """
        others = [frame for frame in self.frames if frame >= self.sink]
        by = min(others, default=self.start) - self.sink
        if by > 0 and self._sink_keys:
            for layer, keys in zip(self.layers, self._sink_keys, strict=True):
                layer.keys[:, : keys.shape[1]] = move(keys, by)

    def forget(self, keep_sink: bool = True) -> list[int]:
        """Drop the history but for the first frames. Returns the numbers of the frames dropped; they come next again.

        Frames between the first ones and the oldest dropped one stay forgotten.
        """
        dropped = sorted(frame for frame in self.frames if not (keep_sink and frame < self.sink))
        self.frames = [frame for frame in self.frames if keep_sink and frame < self.sink]
        self.start = dropped[0] if dropped else self.start
        return dropped

    def snapshot(self) -> Snapshot:
        """A copy of the history, to come back to; taken between chunks."""
        self._synchronize()
        used = len(self.frames)
        tensors = [(layer.keys[:, :used].clone(), layer.values[:, :used].clone()) for layer in self.layers]
        return Snapshot(tuple(self.frames), self.start, tensors, [keys.clone() for keys in self._sink_keys])

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this cache."""
        self.frames, self.start = list(snapshot.frames), snapshot.start
        if len(self.frames) > self._capacity:
            self._allocate(len(self.frames))
        for layer, (keys, values) in zip(self.layers, snapshot.tensors, strict=True):
            layer.keys[:, : len(self.frames)] = keys
            layer.values[:, : len(self.frames)] = values
        self._sink_keys = [keys.clone() for keys in snapshot.sink]

    def _evict(self, count: int, on_evict: OnEvict | None) -> list[int]:
        gone = sorted(frame for frame in self.frames if frame >= self.sink)[:count]
        left = len(self.frames) - count
        holes = [place for place, frame in enumerate(self.frames) if frame in gone and place < left]
        movers = [place for place, frame in enumerate(self.frames) if frame not in gone and place >= left]
        self._synchronize()
        if on_evict is not None:
            places = [self.frames.index(frame) for frame in gone]
            for number, layer in enumerate(self.layers):
                on_evict(number, gone, layer.keys[:, places], layer.values[:, places])
        for hole, mover in zip(holes, movers, strict=True):
            self.frames[hole] = self.frames[mover]
            for layer in self.layers:
                layer.keys[:, hole] = layer.keys[:, mover]
                layer.values[:, hole] = layer.values[:, mover]
        del self.frames[left:]
        return gone

    def _allocate(self, capacity: int) -> None:
        shape = self.shape
        frames = capacity + self._extra / shape.slots
        needed = frames * shape.frame_bytes * (1 + self._host / shape.layers)
        if self._max_bytes is not None and needed > self._max_bytes:
            raise StreamError(
                f"{capacity} frames in the cache need {needed / 2**20:.0f} MiB, and max_bytes allows "
                f"{self._max_bytes / 2**20:.0f}; take a smaller window (one frame takes "
                f"{shape.frame_bytes / 2**20:.1f} MiB), or host=True and a larger max_bytes"
            )
        size = (shape.batch, self._extra + capacity * shape.slots, shape.heads, shape.d)
        pinned = self._host and torch.device(shape.device).type == "cuda"
        device = "cpu" if self._host else shape.device
        if self._host:
            first, second = (torch.zeros(size, dtype=shape.dtype, device=shape.device) for _ in range(2))
            self._room = (first, second)
        before, used = self.layers, len(self.frames)
        self.layers = []
        for number in range(shape.layers):
            k, v = (torch.zeros(size, dtype=shape.dtype, device=device, pin_memory=pinned) for _ in range(2))
            layer = (
                LayerCache(k, v, self._extra, shape.slots)
                if self._room is None
                else HostLayerCache(k, v, self._extra, shape.slots, self._room)
            )
            if before:
                layer.keys[:, :used], layer.values[:, :used] = (
                    before[number].keys[:, :used],
                    before[number].values[:, :used],
                )
            self.layers.append(layer)
        self._capacity = capacity

    def _synchronize(self) -> None:
        """Host copies are written behind the device's back; once a chunk it must have caught up."""
        if self._host and torch.device(self.shape.device).type == "cuda":
            torch.cuda.current_stream(self.shape.device).synchronize()
