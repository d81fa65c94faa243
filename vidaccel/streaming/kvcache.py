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
        self.extra = extra
        self.own = 0
        self._slots = slots
        self._hold(k, v)

    def _hold(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.buffers = (k, v)
        self.keys, self.values = (buffer[:, self.extra :].unflatten(1, (-1, self._slots)) for buffer in (k, v))
        self.k, self.v = k[:, : self.extra], v[:, : self.extra]

    @property
    def bytes(self) -> int:
        """What its buffers take."""
        first, second = self.buffers
        return int(first.nbytes + second.nbytes)

    def move(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Live in larger buffers from now on, with what is there."""
        for new, old in zip((k, v), self.buffers, strict=True):
            new[:, : old.shape[1]] = old[:, : new.shape[1]]
        self._hold(k, v)

    def open(self, history: int, own: int) -> None:
        """Point at `history` frames and `own` frames behind them."""
        end = self.extra + (history + own) * self._slots
        self.k, self.v = (buffer[:, :end] for buffer in self.buffers)
        self.own = own * self._slots

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

    `room` is the one list of two buffers on the device that all layers of a cache share.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor, extra: int, slots: int, room: list[torch.Tensor]) -> None:
        super().__init__(k, v, extra, slots)
        self._room = room

    def _hold(self, k: torch.Tensor, v: torch.Tensor) -> None:
        super()._hold(k, v)
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
        sink: copies of the first frames' keys as they were written, layer after layer.
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
        max_bytes: buffers never take more, also while they grow, when one layer at a time is there twice.
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
        self._room: list[torch.Tensor] = []
        self._own = 0
        kept = sink if movable_sink else 0
        self._sink_bytes = kept * shape.frame_bytes // 2
        self._make_room(window or 0)
        size = (shape.batch, kept, shape.slots, shape.heads, shape.d)
        self._sink_keys = [layer.keys.new_zeros(size) for layer in self.layers] if kept else []

    @property
    def _capacity(self) -> int:
        """Frames that every layer has room for: memory may run out between two of them, and the next call grows on."""
        return min((layer.keys.shape[1] for layer in self.layers), default=0)

    @property
    def bytes(self) -> int:
        """What all buffers take, on the device and in host memory."""
        others = [*self._sink_keys, *self._room]
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
            self._make_room(len(self.frames) + own)
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
        if self._sink_keys and first < self.sink:
            self._synchronize()
            end = min(self.sink, self.start)
            for layer, kept in zip(self.layers, self._sink_keys, strict=True):
                kept[:, first:end] = layer.keys[:, first:end]

    def move_sink(self, move: Callable[[torch.Tensor, int], torch.Tensor], oldest: int | None = None) -> None:
        """Let the first frames stand right before the oldest other frame that is seen.

        Args:
            move: gives keys (..., d) as if they stood some frames later.
            oldest: that frame's number; None takes the oldest one here.
        """
        if not self._sink_keys:
            return
        if oldest is None:
            oldest = min((frame for frame in self.frames if frame >= self.sink), default=self.start)
        by, count = max(0, oldest - self.sink), min(self.sink, self.start)
        self._synchronize()
        for layer, kept in zip(self.layers, self._sink_keys, strict=True):
            layer.keys[:, :count] = move(kept[:, :count], by) if by else kept[:, :count]

    def forget(self) -> list[int]:
        """Drop the history but for the first frames. Returns the numbers of the frames dropped; they come next again.

        Frames between the first ones and the oldest dropped one stay forgotten.
        """
        dropped = sorted(frame for frame in self.frames if frame >= self.sink)
        self.frames = [frame for frame in self.frames if frame < self.sink]
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
        self._synchronize()
        self.frames, self.start = list(snapshot.frames), snapshot.start
        for layer, (keys, values) in zip(self.layers, snapshot.tensors, strict=True):
            layer.keys[:, : len(self.frames)] = keys
            layer.values[:, : len(self.frames)] = values
        for kept, keys in zip(self._sink_keys, snapshot.sink, strict=True):
            kept.copy_(keys)

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

    def _make_room(self, least: int) -> None:
        """Buffers for `least` frames, or for half as many again as before, where `max_bytes` allows it."""
        shape = self.shape
        wanted = max(least, self._capacity + self._capacity // 2)
        limit = self._needed(wanted) if self._max_bytes is None else self._max_bytes
        capacity = next((frames for frames in range(wanted, least, -1) if self._needed(frames) <= limit), least)
        if (needed := self._needed(capacity)) > limit:
            raise StreamError(
                f"{capacity} frames in the cache need {needed / 2**20:.1f} MiB, and max_bytes allows "
                f"{limit / 2**20:.1f}; take a smaller window (one frame takes {shape.frame_bytes / 2**20:.1f} MiB), or "
                "allow more"
            )
        self._synchronize()
        if self._host:
            self._room[:] = self._buffers(shape.device, capacity)
        home = "cpu" if self._host else shape.device
        if not self.layers:
            made = [self._buffers(home, capacity) for _ in range(shape.layers)]
            self.layers = [
                HostLayerCache(k, v, self._extra, shape.slots, self._room)
                if self._host
                else LayerCache(k, v, self._extra, shape.slots)
                for k, v in made
            ]
            return
        for layer in self.layers:
            layer.move(*self._buffers(home, capacity))

    def _buffers(self, device: torch.device | str, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer's frames; pinned, where they wait in host memory for a GPU."""
        shape = self.shape
        size = (shape.batch, self._extra + frames * shape.slots, shape.heads, shape.d)
        on_gpu = [torch.device(x).type == "cuda" for x in (shape.device, device)]
        first, second = (
            torch.zeros(size, dtype=shape.dtype, device=device, pin_memory=on_gpu == [True, False]) for _ in range(2)
        )
        return first, second

    def _needed(self, frames: int) -> int:
        """Most bytes that are held while buffers for so many frames take the place of those there are."""
        shape = self.shape
        layer = (frames * shape.slots + self._extra) * shape.frame_bytes // (shape.layers * shape.slots)
        before = self.layers[0].bytes if self.layers else 0
        return layer * (shape.layers + self._host) + before * (1 + self._host) + self._sink_bytes

    def _synchronize(self) -> None:
        """Host copies are written behind the device's back; once a chunk it must have caught up."""
        if self._host and torch.device(self.shape.device).type == "cuda":
            torch.cuda.current_stream(self.shape.device).synchronize()
