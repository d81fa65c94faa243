"""How alike two clips are, and how sure a share of right answers is.

Math: PSNR = -10 log10 mean (x - y)^2, a frame at a time, then the mean over frames. SSIM with a Gaussian window of 11
pixels and sigma 1.5, c1 = 0.01^2, c2 = 0.03^2 (Wang et al., "Image quality assessment", 2004), a channel at a time.
Intervals: Wilson's score interval of a share; Agresti and Min's adjusted Wald interval of a paired difference (2005).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_WINDOW, _SIGMA = 11, 1.5


def psnr(clip: Tensor, other: Tensor) -> Tensor:
    """Return the PSNR of each frame, (f,) in dB, of clips (f, h, w, 3) in [0, 1]; equal frames give 100."""
    errors = (clip - other).square().mean((1, 2, 3))
    return -10 * errors.clamp(min=1e-10).log10()


def ssim(clip: Tensor, other: Tensor) -> Tensor:
    """Return the SSIM of each frame, (f,), of clips (f, h, w, 3) in [0, 1]."""
    down, across = (_bell(size, clip) for size in clip.shape[1:3])

    def blur(images: Tensor) -> Tensor:
        # Products of matrices, not convolutions: with one channel those are slow, and on a GPU they round to TF32,
        # which is too coarse for the small differences of squares below.
        return down @ images.movedim(-1, 1) @ across.T

    x, y = blur(clip), blur(other)
    xx, yy, xy = blur(clip * clip) - x * x, blur(other * other) - y * y, blur(clip * other) - x * y
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * x * y + c1) * (2 * xy + c2) / ((x * x + y * y + c1) * (xx + yy + c2))
    return score.mean((1, 2, 3))


def _bell(size: int, like: Tensor) -> Tensor:
    """Return the rows (size - 10, size) of a Gaussian that slides along an axis, wherever all of it lies inside."""
    place = torch.arange(size, device=like.device, dtype=like.dtype)
    centre = place[_WINDOW // 2 : size - _WINDOW // 2, None]
    bell = torch.exp(-(place - centre).square() / (2 * _SIGMA**2)) * ((place - centre).abs() <= _WINDOW // 2)
    return bell / bell.sum(1, keepdim=True)


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return the interval, of 95 % by default, of a share of which `right` of `total` were seen."""
    share, square = right / total, z * z / total
    centre = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / total + square / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired(one: Sequence[bool], other: Sequence[bool], z: float = 1.96) -> tuple[float, float, float]:
    """Return the difference of two shares on the same prompts, `one` minus `other`, and its interval."""
    total = len(one)
    won = sum(a and not b for a, b in zip(one, other, strict=True))
    lost = sum(b and not a for a, b in zip(one, other, strict=True))
    # Half a case more in each of the four cells keeps the interval honest where hardly any case differs.
    centre = (won - lost) / (total + 2)
    spread = math.sqrt(max(0.0, won + lost + 1 - (won - lost) ** 2 / (total + 2))) / (total + 2)
    return (won - lost) / total, centre - z * spread, centre + z * spread
