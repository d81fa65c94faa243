"""Frames in the cache: what is seen, evicted, copied and gone back to."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from vidaccel.errors import StreamError
from vidaccel.streaming import CacheShape, KVCache

SHAPE = CacheShape(layers=2, batch=2, slots=3, heads=2, d=4, dtype=torch.float64)


def frame_values(number: int, own: int, shape: CacheShape = SHAPE) -> torch.Tensor:
    """(b, own slots, h, d): every element tells its frame."""
    frames = torch.arange(number, number + own, dtype=shape.dtype).repeat_interleave(shape.slots)
    return frames[None, :, None, None].expand(shape.batch, -1, shape.heads, shape.d).contiguous()


def add(cache: KVCache, own: int) -> list[int]:
    """Write a chunk of recognisable frames; returns the frames it saw, as the tensors say, sorted."""
    cache.begin(own)
    first = cache.start
    for number, layer in enumerate(cache.layers):
        layer.write(torch.full_like(frame_values(first, own), torch.nan), frame_values(first, own))
        keys, values = layer.write(frame_values(first, own) + 1000 * number, -frame_values(first, own))
        assert torch.equal(keys - 1000 * number, -values)
        seen = keys[0, :: SHAPE.slots, 0, 0] - 1000 * number
    cache.commit()
    return sorted(int(frame) for frame in seen)


# Sink, window, chunk index -> visible frames: section 1.2 of the specification, for chunks of 3.
TABLE = [
    (3, 12, 3, list(range(12))),
    (3, 12, 4, [0, 1, 2, *range(6, 15)]),
    (3, 12, 5, [0, 1, 2, *range(9, 18)]),
    (3, 9, 3, [0, 1, 2, *range(6, 12)]),
    (3, 9, 4, [0, 1, 2, *range(9, 15)]),
    (0, 21, 6, list(range(21))),
    (0, 21, 7, list(range(3, 24))),
]


@pytest.mark.parametrize(("sink", "window", "chunk", "visible"), TABLE)
def test_eviction_follows_the_published_table(sink: int, window: int, chunk: int, visible: list[int]) -> None:
    cache = KVCache(SHAPE, window=window, sink=sink)
    for _ in range(chunk):
        add(cache, 3)
    assert add(cache, 3) == visible


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=14), st.integers(0, 3), st.integers(0, 6), st.booleans())
def test_any_chunks_see_the_first_and_the_latest_frames(chunks: list[int], sink: int, more: int, host: bool) -> None:
    window = sink + max(chunks) + more
    cache = KVCache(SHAPE, window=window, sink=sink, host=host)
    done = 0
    for own in chunks:
        end = done + own
        expected = list(range(end)) if end <= window else [*range(sink), *range(end - window + sink, end)]
        # After a short chunk the window holds fewer old frames than it could: they were gone already.
        seen = add(cache, own)
        assert set(seen) <= set(expected)
        assert set(seen) >= {*range(min(sink, end)), *range(done, end)}
        assert len(seen) == len(set(seen)) <= window
        if len(set(chunks)) == 1:
            assert seen == expected
        done = end


@pytest.mark.parametrize("host", [False, True])
def test_without_a_window_all_frames_stay(host: bool) -> None:
    cache = KVCache(SHAPE, window=None, host=host)
    for chunk in range(9):
        assert add(cache, 2) == list(range(2 * chunk + 2))


def test_a_hard_cap_is_kept_and_says_what_to_do() -> None:
    cache = KVCache(SHAPE, window=None, max_bytes=8 * SHAPE.frame_bytes)
    for _ in range(2):
        add(cache, 3)
    with pytest.raises(StreamError, match="smaller window"):
        add(cache, 3)
    assert cache.bytes <= 8 * SHAPE.frame_bytes
    with pytest.raises(StreamError, match="max_bytes"):
        KVCache(SHAPE, window=9, max_bytes=8 * SHAPE.frame_bytes)


class Held(TorchDispatchMode):
    """Most bytes of buffers that were there at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._buffers: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.zeros.default, torch.ops.aten.new_zeros.default):
            self._buffers.append(weakref.ref(out))
            self.most = max(self.most, sum(x.nbytes for ref in self._buffers if (x := ref()) is not None))
        return out


@pytest.mark.parametrize("host", [False, True])
def test_a_cache_that_grows_fills_the_cap_and_never_passes_it(host: bool) -> None:
    shape = SHAPE._replace(layers=8)
    # On the host the device holds one layer more, and while it grows that and another one are there twice.
    most = (12 + 2 * host) * shape.frame_bytes
    with Held() as held:
        cache = KVCache(shape, window=None, sink=2, max_bytes=most, host=host)
        for _ in range(5):
            add(cache, 2)
        with pytest.raises(StreamError, match="smaller window"):
            add(cache, 2)
    assert cache.bytes < held.most <= most
    assert kept(cache) == cache.frames == list(range(10))


@pytest.mark.parametrize("host", [False, True])
def test_memory_that_runs_out_between_two_layers_loses_nothing(monkeypatch: pytest.MonkeyPatch, host: bool) -> None:
    cache = KVCache(SHAPE, window=None, host=host)
    add(cache, 3)
    with monkeypatch.context() as patch:
        patch.setattr(cache.layers[1], "move", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            add(cache, 6)
    assert add(cache, 3) == list(range(6))


def kept(cache: KVCache) -> list[int]:
    """Frames in the history, as its values say."""
    return [-int(x) for x in cache.layers[0].values[0, : len(cache.frames), 0, 0, 0]]


def test_keys_as_they_were_written_count_too() -> None:
    with pytest.raises(StreamError, match="max_bytes"):
        KVCache(SHAPE, window=6, sink=2, movable_sink=True, max_bytes=6 * SHAPE.frame_bytes)
    cache = KVCache(SHAPE, window=6, sink=2, movable_sink=True, max_bytes=7 * SHAPE.frame_bytes)
    for _ in range(4):
        add(cache, 2)
        assert cache.bytes == 7 * SHAPE.frame_bytes


def test_bytes_are_those_of_the_buffers() -> None:
    assert KVCache(SHAPE, window=9).bytes == 9 * SHAPE.frame_bytes == 9 * 2 * 2 * 2 * 3 * 2 * 4 * 8
    # On the host the device holds one layer more.
    assert KVCache(SHAPE, window=9, host=True).bytes == 9 * SHAPE.frame_bytes * 3 // 2


def test_a_window_too_small_for_a_chunk_is_an_error() -> None:
    cache = KVCache(SHAPE, window=5, sink=2)
    add(cache, 3)
    with pytest.raises(StreamError, match="window of 5"):
        cache.begin(4)


@pytest.mark.parametrize("host", [False, True])
def test_a_snapshot_brings_everything_back(host: bool) -> None:
    cache = KVCache(SHAPE, window=7, sink=1, host=host, movable_sink=True)
    for _ in range(3):
        add(cache, 2)
    moment = cache.snapshot()
    first = [add(cache, 2) for _ in range(4)]
    cache.restore(moment)
    assert [add(cache, 2) for _ in range(4)] == first


def test_the_sink_moves_from_where_it_was_written() -> None:
    cache = KVCache(SHAPE, window=6, sink=2, movable_sink=True)
    for _ in range(2):
        add(cache, 2)
    moves: list[int] = []

    def move(keys: torch.Tensor, by: int) -> torch.Tensor:
        moves.append(by)
        return keys + by

    for _ in range(3):
        cache.begin(2)
        cache.move_sink(move)
        keys, _ = cache.layers[0].write(frame_values(cache.start, 2), frame_values(cache.start, 2))
        by = moves[-1] if moves else 0
        assert keys[0, : 2 * SHAPE.slots : SHAPE.slots, 0, 0].tolist() == [by, 1 + by]
        cache.commit()
    # The first frames stand right before the oldest frame that is left: 2, then 4.
    assert moves == [2, 2, 4, 4]
    # Or before one that is remembered elsewhere, and back where they were written.
    for oldest, by in ((3, 1), (2, 0)):
        cache.move_sink(move, oldest)
        assert cache.layers[0].keys[0, :2, 0, 0, 0].tolist() == [by, 1 + by]


def test_forgetting_starts_again_behind_the_first_frames() -> None:
    cache = KVCache(SHAPE, window=8, sink=2)
    for _ in range(6):
        add(cache, 2)
    assert cache.forget() == [6, 7, 8, 9, 10, 11]
    assert add(cache, 2) == [0, 1, 6, 7]
