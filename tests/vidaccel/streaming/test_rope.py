"""Positions: the model's own table, and beyond its end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vidaccel.pipelines.rotary import rotate_pairs
from vidaccel.streaming import CacheShape, KVCache, VideoRope


def test_rotary_is_the_table_of_diffusers_to_the_last_bit() -> None:
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    stock = WanRotaryPosEmbed(128, (1, 2, 2), 1024)
    expected = stock(torch.zeros(1, 16, 40, 60, 104))
    rope = VideoRope((stock.t_dim, stock.h_dim, stock.w_dim))
    found = rope.rotary(17, 3, 30, 52)
    assert rope.channels == (44, 42, 42)
    for ours, table in zip(found, expected, strict=True):
        assert torch.equal(ours, table[:, 17 * 1560 : 20 * 1560])


def test_a_moved_key_is_one_rotated_at_its_new_place() -> None:
    rope = VideoRope((12, 6, 6))
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(2, 2 * 6, 3, 24, generator=generator, dtype=torch.float64)
    here, there = (rotate_pairs(raw, *rope.rotary(start, 2, 2, 3)) for start in (5, 1105))
    torch.testing.assert_close(rope.moved(here, 1100), there, atol=1e-6, rtol=0)


def test_products_depend_on_distance_alone_at_any_frame() -> None:
    rope = VideoRope((12, 6, 6))
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 6, 1, 24, generator=generator, dtype=torch.float64) for _ in range(2))

    def product(start: int) -> torch.Tensor:
        rotated_q, rotated_k = (rotate_pairs(x, *rope.rotary(start + n, 1, 2, 3)) for x, n in ((q, 4), (k, 0)))
        return rotated_q[0, :, 0] @ rotated_k[0, :, 0].T

    torch.testing.assert_close(product(0), product(50_000), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layers_share_the_angles_of_a_move(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rope, shape, asked = VideoRope((12, 6, 6)), CacheShape(3, 1, 6, 2, 24, dtype), []
    generator = torch.Generator().manual_seed(0)
    written = torch.randn(3, 1, 12, 2, 24, generator=generator).to(dtype)
    cache = KVCache(shape, window=6, sink=2, movable_sink=True)
    cache.begin(2)
    for layer, keys in zip(cache.layers, written, strict=True):
        layer.write(keys, keys)
    cache.commit()
    angles, high = VideoRope._angles, torch.promote_types(dtype, torch.float32)

    def counted(self: VideoRope, positions: torch.Tensor, channels: int) -> Any:
        asked.append(positions.tolist())
        return angles(self, positions, channels)

    monkeypatch.setattr(VideoRope, "_angles", counted)
    cache.move_sink(rope.moved, 2 + 4321)
    assert asked == [[4321]]
    for layer, keys in zip(cache.layers, written, strict=True):
        # To the last bit what a layer that computes its own angles has.
        angle = angles(rope, torch.tensor([4321]), 12)[0]
        cos, sin = angle.cos().to(high), angle.sin().to(high)
        time = keys[..., :12].to(high)
        turned = time * cos + torch.stack([-time[..., 1::2], time[..., 0::2]], -1).flatten(-2) * sin
        expected = torch.cat([turned.to(dtype), keys[..., 12:]], -1)
        assert torch.equal(layer.keys[:, :2].flatten(1, 2), expected)
