"""Chunk-aware growth: how dense each chunk of an autoregressive video attends.

Idea: early chunks shape everything that follows, and see little, so they attend densely; later ones may be sparse.
Math, for chunk i >= 1 after which F_i frames are made, kv_i = min(F_i, window) of them seen, a_i = 1 / sqrt(F_i):
    d_i = base + beta a_i,  with beta such that sum d_i kv_i = density sum kv_i over all chunks but the first
    Chunk 0 is dense. Past the end of the horizon, the last value stays.
Source: Light Forcing, arXiv 2602.04789, section 3.2, in densities rather than sparsities. A stream without an end takes
    beta from a horizon, since beta depends on the length.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import PatternError


@dataclass(frozen=True)
class Growth:
    """Densities of chunks.

    Attributes:
        density: wanted mean over the keys that chunks 1, 2, ... see.
        base: what the density falls towards.
        chunk: latent frames of a chunk.
        frames: latent frames of the video, or of the horizon that stands for an endless one.
        window: frames that a chunk sees, its own included; None for all.
    """

    density: float
    base: float
    chunk: int = 3
    frames: int = 63
    window: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.base <= self.density <= 1:
            raise PatternError(
                f"density {self.density} that falls towards {self.base} was asked for; both lie in (0, 1], and the "
                "second is no larger than the first"
            )

    @property
    def chunks(self) -> int:
        """Chunks of the horizon."""
        return max(2, self.frames // self.chunk)

    @property
    def beta(self) -> float:
        """How much of the density is shared out by age."""
        seen = [self._seen(number) for number in range(1, self.chunks)]
        share = [self._seen(number) * self._age(number) for number in range(1, self.chunks)]
        return (self.density - self.base) * sum(seen) / sum(share)

    def at(self, number: int) -> float:
        """Density of chunk `number`, in (0, 1]."""
        if number == 0:
            return 1.0
        return min(1.0, self.base + self.beta * self._age(min(number, self.chunks - 1)))

    def _seen(self, number: int) -> int:
        made = (number + 1) * self.chunk
        return made if self.window is None else min(made, self.window)

    def _age(self, number: int) -> float:
        return float(((number + 1) * self.chunk) ** -0.5)
