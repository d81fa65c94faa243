"""What a video lost: PSNR and SSIM of each frame against a reference, flicker, motion, and frames that are broken.

Math: PSNR = 10 log10(255^2 / mean squared error), a frame at a time, then the mean over frames; equal frames count 100.
    SSIM of a window = (2 m_a m_b + c1)(2 s_ab + c2) / ((m_a^2 + m_b^2 + c1)(s_a^2 + s_b^2 + c2)), m, s under a Gaussian
    of 1.5 pixels with mirrored borders, mean over windows and channels, as torchmetrics has it. Of luminance y: motion
    |y_t+1 - y_t|, flicker |y_t+1 - 2 y_t + y_t-1| / 2, which motion at an even pace leaves nearly alone.
Source: Wang et al. 2004 for SSIM; caches lose motion first, so motion stands beside the rest.
Limits: paired videos show the same prompt and seed; a video that is as good but different scores low. LPIPS stands
    beside the rest where its weights are (`lpips.py`); where they are not, the notes say so.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from ..errors import VideoError
from . import lpips

Frames = npt.NDArray[np.uint8]

IDENTICAL_DB = 100.0
NAMES = {
    "psnr_db": "PSNR, dB",
    "psnr_db_worst": "worst frame, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "motion_ratio": "motion, x reference",
    "flicker_ratio": "flicker, x reference",
}
"""What people call the means of `measure`."""
BLACK = 4
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def frames_of(video: Any) -> Frames:
    """(f, h, w, 3) bytes from what pipelines give: arrays or tensors, in [0, 1] or bytes, or a list of images.

    Raises:
        VideoError: no video, or a value that is no finite number.
    """
    if isinstance(video, (list, tuple)):
        video = np.stack([np.asarray(frame) for frame in video])
    if isinstance(video, torch.Tensor):
        video = video.detach().cpu()
        video = (video if video.dtype == torch.uint8 else video.float()).numpy()
        # Tensors are (f, c, h, w); arrays are (f, h, w, c).
        video = video.transpose(0, 2, 3, 1) if video.ndim == 4 and video.shape[1] == 3 else video
    video = np.asarray(video)
    if video.ndim != 4 or video.shape[-1] != 3 or not len(video):
        raise VideoError(f"a video of shape {video.shape} was given; it has (frames, height, width, 3)")
    if video.dtype == np.uint8:
        return np.asarray(video, np.uint8)
    if video.dtype.kind != "f":
        raise VideoError(f"a video of {video.dtype} was given; it holds bytes (uint8), or floats in [0, 1]")
    if not np.isfinite(video).all():
        broken = int((~np.isfinite(video)).any(axis=(1, 2, 3)).sum())
        raise VideoError(f"{broken} of {len(video)} frames hold values that are no finite numbers")
    return np.asarray((video * 255).round().clip(0, 255), np.uint8)


def psnr(a: Frames, b: Frames) -> list[float]:
    """Decibels of each frame."""
    found = []
    for one, other in zip(a, b, strict=True):
        error = float(np.square(one.astype(np.float32) - other).mean(dtype=np.float64))
        found.append(min(IDENTICAL_DB, 10 * np.log10(255.0**2 / error)) if error else IDENTICAL_DB)
    return found


def ssim(a: Frames, b: Frames) -> list[float]:
    """Structural similarity of each frame, at most 1."""
    half = min(5, *(side - 1 for side in a.shape[1:3]))
    offsets = torch.arange(-half, half + 1, dtype=torch.float32)
    gauss = torch.exp(-(offsets**2) / (2 * 1.5**2))
    weights: list[float] = (gauss / gauss.sum()).tolist()

    def along(images: torch.Tensor, dim: int) -> torch.Tensor:
        # Shifted sums: on a CPU more than twice as fast as a convolution of one channel.
        length = images.shape[dim] - 2 * half
        total = images.narrow(dim, 0, length) * weights[0]
        for shift, weight in enumerate(weights[1:], 1):
            total.add_(images.narrow(dim, shift, length), alpha=weight)
        return total

    found = []
    for pair in zip(a, b, strict=True):
        one, other = (torch.from_numpy(frame.transpose(2, 0, 1).astype(np.float32)) for frame in pair)
        images = torch.stack([one, other, one**2, other**2, one * other])
        m_a, m_b, *squares = along(along(functional.pad(images, (half,) * 4, mode="reflect"), 2), 3)
        s_a, s_b, s_ab = squares[0] - m_a**2, squares[1] - m_b**2, squares[2] - m_a * m_b
        score = (2 * m_a * m_b + _C1) * (2 * s_ab + _C2) / ((m_a**2 + m_b**2 + _C1) * (s_a + s_b + _C2))
        found.append(float(score.mean()))
    return found


def motion(frames: Frames) -> list[float]:
    """Mean change of luminance from each frame to the next, in levels of 255."""
    luma = frames @ _LUMA
    return [float(np.abs(after - before).mean()) for before, after in itertools.pairwise(luma)]


def flicker(frames: Frames) -> list[float]:
    """Mean change of that change, around each frame but the first and the last."""
    luma = frames @ _LUMA
    around = zip(luma, luma[1:], luma[2:], strict=False)
    return [float(np.abs(after - 2 * now + before).mean()) / 2 for before, now, after in around]


def broken(frames: Frames) -> list[int]:
    """Numbers of frames that are black, or one flat colour."""
    low, high = (each.reshape(len(frames), -1, 3) for each in (frames.min((1, 2)), frames.max((1, 2))))
    flat = (high.astype(int) - low).max((1, 2)) <= 1
    return [int(n) for n in np.nonzero((high.max((1, 2)) <= BLACK) | flat)[0]]


def measure(video: Any, against: Any) -> dict[str, Any]:
    """Everything about a pair of videos, as plain data.

    Args:
        video: the one that is judged.
        against: the reference: same prompt and seed, without what is judged.

    Raises:
        VideoError: frames, height or width differ.
    """
    if video is None or against is None:
        raise VideoError(
            f"no {'video' if video is None else 'reference'} was given; quality is measured between two: the video "
            "that was made, and that of the same prompt and seed made densely, as in report(frames, against=dense)"
        )
    a, b = frames_of(video), frames_of(against)
    if a.shape != b.shape:
        raise VideoError(f"videos of {a.shape} and {b.shape} were compared; frames, height and width must agree")
    lacking = lpips.missing()
    if lacking is None and min(a.shape[1:3]) < lpips.SMALLEST:
        lacking = f"frames of {a.shape[1]}x{a.shape[2]} are too small for it"
    found: dict[str, Any] = {
        "frames": len(a),
        "psnr": psnr(a, b),
        "ssim": ssim(a, b),
        "lpips": None if lacking else lpips.lpips(a, b),
        "motion": motion(a),
        "motion_reference": motion(b),
        "flicker": flicker(a),
        "flicker_reference": flicker(b),
        "broken_frames": broken(a),
        "notes": [f"LPIPS was not computed: {lacking}"] if lacking else [],
    }
    still = sum(found["motion_reference"])
    found["mean"] = {
        "psnr_db": _mean(found["psnr"]),
        "psnr_db_worst": min(found["psnr"]),
        "ssim": _mean(found["ssim"]),
        "lpips": None if lacking else _mean(found["lpips"]),
        "motion_ratio": sum(found["motion"]) / still if still else None,
        "flicker_ratio": sum(found["flicker"]) / total if (total := sum(found["flicker_reference"])) else None,
    }
    return found


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
