"""Rotary positions of video tokens at any frame number, and keys that move in time after they were stored.

Math: a token at (t, y, x) is rotated by t f_t, y f_y and x f_x, each on its own channels, f = theta^(-2i / channels).
    A product of a rotated query and a rotated key depends on the difference of their places alone. So a stored key that
    is to stand `by` frames later needs one more rotation of its temporal channels, and nothing else.
Source: RoFormer (arXiv 2104.09864) on three axes, as Wan has it. Angles are computed in fp64 for any frame: a table
    with 1,024 rows ends after four minutes of video.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class VideoRope:
    """Rotary embedding on interleaved pairs of channels: first those of time, then height, then width.

    Attributes:
        channels: of one head, along (t, y, x).
        theta: base of the frequencies.
    """

    channels: tuple[int, int, int]
    theta: float = 10000.0

    def rotary(
        self, start: int, frames: int, y: int, x: int, device: torch.device | str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the tokens of some frames, each (1, frames * y * x, 1, d) fp32, every value twice."""
        sides = (torch.arange(start, start + frames), torch.arange(y), torch.arange(x))
        shape = (frames, y, x)
        cos, sin = [], []
        for axis, (positions, channels) in enumerate(zip(sides, self.channels, strict=True)):
            angle = self._angles(positions, channels)
            view = [1, 1, 1, channels]
            view[axis] = shape[axis]
            cos.append(angle.cos().float().view(view).expand(*shape, -1))
            sin.append(angle.sin().float().view(view).expand(*shape, -1))
        tables = (torch.cat(part, -1).reshape(1, frames * y * x, 1, -1) for part in (cos, sin))
        first, second = (table.to(device) for table in tables)
        return first, second

    @staticmethod
    def unrotated(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Rotated queries or keys (b, l, h, d) as they were before `rotary` turned them."""
        cos, sin = rotary
        high = torch.promote_types(x.dtype, torch.float32)
        swapped = torch.stack([x[..., 1::2], -x[..., 0::2]], -1).flatten(-2)
        return (x.to(high) * cos + swapped.to(high) * sin).to(x.dtype)

    def moved(self, k: torch.Tensor, by: int) -> torch.Tensor:
        """Rotated keys (..., d) as if they stood `by` frames later."""
        channels = self.channels[0]
        high = torch.promote_types(k.dtype, torch.float32)
        cos, sin = _turn(self, by, k.device, high)
        time = k[..., :channels].to(high)
        swapped = torch.stack([-time[..., 1::2], time[..., 0::2]], -1).flatten(-2)
        return torch.cat([(time * cos + swapped * sin).to(k.dtype), k[..., channels:]], -1)

    def _angles(self, positions: torch.Tensor, channels: int) -> torch.Tensor:
        """(positions, channels) fp64."""
        frequency = 1.0 / self.theta ** (torch.arange(0, channels, 2, dtype=torch.float64) / channels)
        return torch.outer(positions, frequency).repeat_interleave(2, dim=1)


# Every layer of a chunk asks for the same.
@lru_cache(maxsize=4)
def _turn(rope: VideoRope, by: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    angle = rope._angles(torch.tensor([by]), rope.channels[0])[0]
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)
