"""Quality against closed forms and against torchmetrics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vidaccel.errors import VideoError
from vidaccel.report import quality


def noise(seed: int, frames: int = 3, height: int = 24, width: int = 32) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def test_psnr_and_ssim_as_torchmetrics_has_them() -> None:
    from torchmetrics.functional import image as functional

    a = noise(0)
    b = np.clip(a.astype(int) + noise(1) // 8, 0, 255).astype(np.uint8)
    one, other = (torch.from_numpy(x).permute(0, 3, 1, 2).float() for x in (a, b))
    for n in range(3):
        pair = one[n : n + 1], other[n : n + 1]
        expected = functional.peak_signal_noise_ratio(*pair, data_range=255.0)
        assert quality.psnr(a, b)[n] == pytest.approx(float(expected), abs=1e-3)
        similar = functional.structural_similarity_index_measure(*pair, data_range=255.0)
        assert quality.ssim(a, b)[n] == pytest.approx(float(similar), abs=1e-4)


def test_equal_videos() -> None:
    found = quality.measure(noise(0), noise(0))
    assert found["psnr"] == [100.0] * 3
    assert found["mean"]["ssim"] == pytest.approx(1)
    assert found["mean"]["motion_ratio"] == pytest.approx(1)
    assert found["broken_frames"] == []


def test_psnr_of_a_known_error() -> None:
    a = np.full((1, 8, 8, 3), 100, np.uint8)
    assert quality.psnr(a, a + 5)[0] == pytest.approx(10 * np.log10(255**2 / 25))


def test_ssim_of_flat_pictures() -> None:
    a, b = (np.full((1, 16, 16, 3), level, np.uint8) for level in (100, 110))
    c1 = (0.01 * 255) ** 2
    assert quality.ssim(a, b)[0] == pytest.approx((2 * 100 * 110 + c1) / (100**2 + 110**2 + c1), rel=1e-4)


def test_motion_and_flicker_of_ramps_and_flashes() -> None:
    def grey(levels: list[int]) -> Any:
        return np.broadcast_to(np.array(levels, np.uint8)[:, None, None, None], (len(levels), 4, 4, 3))

    ramp, flash = grey([10, 20, 30, 40]), grey([10, 20, 10, 20])
    assert quality.motion(ramp) == pytest.approx([10] * 3, rel=1e-4)
    assert quality.motion(flash) == pytest.approx([10] * 3, rel=1e-4)
    assert quality.flicker(ramp) == pytest.approx([0, 0], abs=1e-3)
    assert quality.flicker(flash) == pytest.approx([10, 10], rel=1e-4)


def test_broken_frames() -> None:
    video = noise(0, frames=4)
    video[1] = 0
    video[3] = (200, 10, 10)
    assert quality.broken(video) == [1, 3]


def test_every_kind_of_video_is_the_same_video() -> None:
    video = noise(0)
    floats = video / 255.0
    kinds = [
        video,
        floats,
        torch.from_numpy(floats).permute(0, 3, 1, 2),
        torch.from_numpy(video),
        torch.from_numpy(video).permute(0, 3, 1, 2),
        [Image.fromarray(frame) for frame in video],
    ]
    for kind in kinds:
        assert (quality.frames_of(kind) == video).all()


def test_what_is_no_video() -> None:
    with pytest.raises(VideoError, match="shape"):
        quality.frames_of(np.zeros((4, 4, 3)))
    with pytest.raises(VideoError, match="a video of int64 was given"):
        quality.frames_of(noise(0).astype(np.int64))
    with pytest.raises(VideoError, match="1 of 2 frames"):
        quality.frames_of(np.stack([np.zeros((4, 4, 3)), np.full((4, 4, 3), np.nan)]))
    with pytest.raises(VideoError, match="must agree"):
        quality.measure(noise(0), noise(0, frames=2))
