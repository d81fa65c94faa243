"""How a causal model rolls a video out: chunks, what of the past they see, where frames stand, and the noise steps.

Sources: Self-Forcing (arXiv 2506.08009), CausVid (arXiv 2412.07772), LongLive (arXiv 2509.22622), Light Forcing
(arXiv 2602.04789), Hybrid Forcing (arXiv 2604.10103): their released configurations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import UsageError

ROPES = ("absolute", "relative", "sink-shift")


@dataclass(frozen=True)
class Rollout:
    """How a causal model makes a video, chunk by chunk. Frames are latent frames.

    Attributes:
        chunk: frames that are denoised together.
        window: frames that a chunk sees, its own and the first ones included; None sees all.
        sink: first frames, which stay visible for ever.
        steps: noise levels of a chunk, in (0, 1000], falling. None leaves them to the pipeline's scheduler.
        shift: of the noise schedule; moves steps towards more noise where it is above 1.
        warp: `steps` are places in the schedule, to be shifted; otherwise they are its timesteps as they are.
        rope: where frames stand in time. "absolute": at their own number, so that the first frames move away for ever.
            "sink-shift": likewise, but the first frames are moved up to stand right before the window. "relative":
            frames are counted inside the window; as rotary logits depend on distances alone, these are the same logits
            as those of "sink-shift", and one mechanism serves both.
        context_noise: timestep of the pass that writes a finished chunk to the cache.
        lone_first: the first frame is a chunk of its own.
    """

    chunk: int = 3
    window: int | None = 21
    sink: int = 0
    steps: tuple[float, ...] | None = (1000, 750, 500, 250)
    shift: float = 5.0
    warp: bool = True
    rope: str = "absolute"
    context_noise: float = 0.0
    lone_first: bool = False

    def __post_init__(self) -> None:
        if self.steps is not None:
            object.__setattr__(self, "steps", tuple(self.steps))
            falling = all(a > b for a, b in zip(self.steps, self.steps[1:], strict=False))
            if not self.steps or not falling or not 0 < self.steps[-1] <= self.steps[0] <= 1000:
                raise UsageError(f"steps {self.steps} were asked for; they fall, and lie in (0, 1000]")
        if self.chunk < 1 or self.sink < 0:
            raise UsageError(f"chunk {self.chunk} and sink {self.sink} were asked for; they start at 1 and 0 frames")
        if self.window is not None and self.window < self.sink + self.chunk:
            raise UsageError(
                f"a window of {self.window} frames was asked for; it holds the {self.sink} first frames and a chunk of "
                f"{self.chunk}, so it starts at {self.sink + self.chunk}"
            )
        if self.rope not in ROPES:
            raise UsageError(f"rope {self.rope!r} was asked for; there are {', '.join(ROPES)}")
        if not 0 <= self.context_noise < 1000 or not self.shift > 0:
            raise UsageError(
                f"context_noise {self.context_noise} and shift {self.shift} were asked for; the first lies in "
                "[0, 1000), the second above 0"
            )

    @classmethod
    def of(cls, value: Rollout | str | Mapping[str, Any]) -> Rollout:
        """A rollout from a preset's name, from plain data, or as it is.

        Raises:
            UsageError: an unknown name or setting.
        """
        if isinstance(value, Rollout):
            return value
        if isinstance(value, str):
            if value not in ROLLOUTS:
                raise UsageError(f"rollout {value!r} was asked for; there are {', '.join(ROLLOUTS)}")
            return ROLLOUTS[value]
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(value) - known):
            raise UsageError(f"{unknown[0]!r} is no setting of a rollout; it has {', '.join(sorted(known))}")
        return cls(**value)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @property
    def moves_sink(self) -> bool:
        """The first frames stand right before the window, wherever it is."""
        return self.rope != "absolute"

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Timesteps of a chunk: t = 1000 shift s / (1 + (shift - 1) s) with s = step / 1000, where steps are warped."""
        if not self.warp:
            return self.steps or ()
        return tuple(self.shift * step / (1 + (self.shift - 1) * step / 1000) for step in self.steps or ())

    def chunks(self, frames: int | None, first: int = 0) -> Iterator[int]:
        """Lengths of the chunks that make `frames` frames, from frame `first` on; for ever where there is no end."""
        done = first
        while frames is None or done < frames:
            wanted = 1 if self.lone_first and done == 0 else self.chunk
            length = wanted if frames is None else min(wanted, frames - done)
            yield length
            done += length


ROLLOUTS = {
    "self-forcing": Rollout(),
    "causvid": Rollout(steps=(1000, 757, 522), shift=8.0, warp=False),
    "longlive": Rollout(window=12, sink=3),
    "light-forcing": Rollout(window=21),
    "light-forcing-long": Rollout(window=12, sink=1, rope="relative"),
    "hybrid-forcing": Rollout(window=9, sink=3, rope="relative"),
}
