"""Merged keys: the lemma, groups over time, the hard cap."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from vidaccel.errors import UsageError
from vidaccel.kernels.attention import attention
from vidaccel.pipelines.rotary import rotate_pairs
from vidaccel.reuse import TempCache
from vidaccel.reuse.tempcache import MergedKeys
from vidaccel.streaming import VideoRope
from vidaccel.streaming.kvcache import LayerCache

# Rotated by place alone, so that what is still has equal keys; and by time alone.
PLACE, TIME = VideoRope((0, 12, 12)), VideoRope((24, 0, 0))
GRID, HEADS, D = (3, 4), 2, 24
TOKENS = GRID[0] * GRID[1]


def build(room: int = 4, horizon: int | None = None, **settings: Any) -> tuple[LayerCache, MergedKeys]:
    buffers = [torch.zeros(1, room * TOKENS, HEADS, D) for _ in range(2)]
    layer = LayerCache(buffers[0], buffers[1], room * TOKENS, TOKENS)
    return layer, MergedKeys(layer, TempCache(frames=room, **settings), TOKENS, horizon=horizon)


def frames(count: int, moving: int = 0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated keys and values (frames, 1, tokens, h, d); the first `moving` tokens are new in every frame."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(1, TOKENS, HEADS, D, generator=generator).repeat(count, 1, 1, 1)
    raw[:, :moving] = torch.randn(count, moving, HEADS, D, generator=generator)
    values = torch.randn(count, 1, TOKENS, HEADS, D, generator=generator)
    keys = torch.stack([rotate_pairs(frame[None], *PLACE.rotary(n, 1, *GRID)) for n, frame in enumerate(raw)])
    return keys, values


def queries(seed: int = 3) -> torch.Tensor:
    return torch.randn(1, 20, HEADS, D, generator=torch.Generator().manual_seed(seed))


def seen(merged: MergedKeys, layer: LayerCache, q: torch.Tensor, bias: bool = True) -> torch.Tensor:
    weight = merged.bias()
    if not bias:
        weight = torch.where(weight.isfinite(), 0.0, weight)
    return attention(q, layer.k, layer.v, key_bias=weight)[0]


def test_identical_keys_are_one_key_with_the_logarithm_of_their_number() -> None:
    """The lemma: exactly equal to attention over all copies."""
    layer, merged = build(room=2)
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, TOKENS, HEADS, D, generator=generator)
    values = torch.randn(6, 1, TOKENS, HEADS, D, generator=generator)
    for number in range(6):
        merged.absorb(number, key, values[number])
    q = queries()
    expected, _ = attention(q, key.repeat(1, 6, 1, 1), values.transpose(0, 1).flatten(1, 2))
    torch.testing.assert_close(seen(merged, layer, q), expected, atol=1e-6, rtol=0)
    assert int((merged.size > 0).sum()) == HEADS * TOKENS
    # Beside other keys the size of a group matters; among equal sizes it cannot.
    merged.absorb(6, -key, values[0])
    pairs = torch.cat([key.repeat(1, 6, 1, 1), -key], 1)
    expected, _ = attention(q, pairs, torch.cat([values.transpose(0, 1).flatten(1, 2), values[0]], 1))
    torch.testing.assert_close(seen(merged, layer, q), expected, atol=1e-6, rtol=0)
    assert (seen(merged, layer, q, bias=False) - expected).abs().max() > 0.05


@pytest.mark.parametrize("match", ["position", "nearest"])
def test_still_things_merge_and_moving_ones_do_not(match: str) -> None:
    _, merged = build(room=6, match=match)
    keys, values = frames(5, moving=4)
    for number in range(5):
        merged.absorb(number, keys[number], values[number])
    sizes = merged.size[merged.size > 0]
    assert sorted(set(sizes.tolist())) == [1, 5]
    assert int((sizes == 5).sum()) == HEADS * (TOKENS - 4)
    assert int(merged.size.sum()) == HEADS * 5 * TOKENS


def test_a_group_stands_at_its_latest_place() -> None:
    layer, merged = build()
    keys, values = frames(4)
    for number in range(4):
        merged.absorb(number, keys[number], values[number])
    torch.testing.assert_close(layer.k.flip(1)[:, :TOKENS], keys[3], atol=1e-5, rtol=0)
    torch.testing.assert_close(layer.v.flip(1)[:, :TOKENS], values.mean(0), atol=1e-5, rtol=0)
    assert layer.k[:, :-TOKENS].abs().max() == 0


def test_a_mean_key_is_the_mean_of_the_keys() -> None:
    layer, merged = build(key="mean", threshold=0.5)
    keys, values = frames(2)
    noisy = keys[1] + 0.1 * torch.randn(keys[1].shape, generator=torch.Generator().manual_seed(4))
    merged.absorb(0, keys[0], values[0])
    merged.absorb(1, noisy, values[1])
    torch.testing.assert_close(layer.k.flip(1)[:, :TOKENS], (keys[1] + noisy) / 2, atol=1e-5, rtol=0)


@pytest.mark.parametrize("match", ["position", "nearest"])
def test_a_head_that_tells_moments_apart_keeps_them_apart(match: str) -> None:
    """A still thing has other keys in each frame where time turns them; queries see the difference, so it counts."""
    still = torch.randn(1, TOKENS, HEADS, D, generator=torch.Generator().manual_seed(0)).sign()
    # From one frame to the next their cosine is 0.95: the mean over frequencies of cos(frequency).
    keys = [rotate_pairs(still, *TIME.rotary(number, 1, *GRID)) for number in range(4)]
    for threshold, groups in ((0.98, 4), (0.9, 1)):
        _, merged = build(threshold=threshold, match=match)
        for number in range(4):
            merged.absorb(number, keys[number], still)
        assert int((merged.size > 0).sum()) == groups * HEADS * TOKENS, threshold


def test_what_the_window_would_not_show_is_forgotten() -> None:
    """Three frames are to be seen: moving tokens of older ones go, still ones never count more than three."""
    layer, merged = build(room=8, horizon=3)
    keys, values = frames(9, moving=5)
    for number in range(9):
        merged.absorb(number, keys[number], values[number])
        assert merged.size.amax() <= 3
        assert int(merged.size.sum()) == HEADS * TOKENS * min(number + 1, 3)
    q = queries()
    moving = [x[6:, 0, :5].flatten(0, 1) for x in (keys, values)]
    # A still token's value is a mean over all frames, older ones fading.
    fading = values[0, 0, 5:]
    for number in range(1, 9):
        fading = fading + (values[number, 0, 5:] - fading) / min(number + 1, 3)
    k = torch.cat([moving[0], keys[8, 0, 5:].repeat(3, 1, 1)])[None]
    v = torch.cat([moving[1], fading.repeat(3, 1, 1)])[None]
    torch.testing.assert_close(seen(merged, layer, q), attention(q, k, v)[0], atol=1e-5, rtol=0)


def test_a_window_that_needs_no_memory_has_none() -> None:
    _, merged = build(horizon=0)
    keys, values = frames(3)
    for number in range(3):
        merged.absorb(number, keys[number], values[number])
        assert merged.size.amax() == 0


def test_a_threshold_beyond_one_keeps_every_key() -> None:
    layer, merged = build(room=4, threshold=1.01)
    keys, values = frames(4)
    for number in range(4):
        merged.absorb(number, keys[number], values[number])
    q = queries()
    expected, _ = attention(q, keys[:, 0].flatten(0, 1)[None], values[:, 0].flatten(0, 1)[None])
    torch.testing.assert_close(seen(merged, layer, q), expected, atol=1e-5, rtol=0)


def test_noise_fills_the_room_and_no_more_and_what_is_still_stays() -> None:
    layer, merged = build(room=2)
    keys, values = frames(30, moving=6)
    for number in range(30):
        merged.absorb(number, keys[number], values[number])
        assert layer.k.isfinite().all()
    assert int((merged.size > 0).sum()) == HEADS * 2 * TOKENS
    assert int((merged.size == 30).sum()) == HEADS * (TOKENS - 6)
    # The others are the latest moving tokens: those of the last three frames.
    others = merged._newest[merged.size == 1]
    assert others.min() >= 27


def test_several_keys_may_join_one_group_and_all_count() -> None:
    _, merged = build(match="nearest", threshold=0.99)
    keys, values = frames(2)
    same = keys[1].clone()
    same[:, 1] = same[:, 0]
    merged.absorb(0, keys[0], values[0])
    merged.absorb(1, same, values[1])
    assert int(merged.size.sum()) == HEADS * 2 * TOKENS
    assert float(merged.size.max()) == 3


def test_going_back() -> None:
    layer, merged = build(room=3)
    keys, values = frames(6, moving=5)
    for number in range(3):
        merged.absorb(number, keys[number], values[number])
    moment, q = merged.snapshot(), queries()
    results = []
    for _ in range(2):
        for number in range(3, 6):
            merged.absorb(number, keys[number], values[number])
        results.append(seen(merged, layer, q))
        merged.restore(moment)
    assert torch.equal(*results)


@pytest.mark.parametrize("given", [{"match": "far"}, {"key": "best"}, {"frames": 0}, {"threshold": math.nan}])
def test_settings_that_cannot_be(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="TempCache"):
        TempCache(**given)
