"""What `bench causal` runs: each method at its published setting, and the models, sizes and lengths it runs on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from ..reuse import AnnCross, CausalAnn, CausalLightForcing, FlashBlock, Methods, TempCache
from ..streaming import ROLLOUTS, Rollout


@dataclass(frozen=True)
class Rival:
    """One way to make the video.

    Attributes:
        name: as printed.
        methods: for the stream.
        reuse: fraction of heads that FlashBlock reuses, set by a calibrated table, as random weights drift at random.
    """

    name: str
    methods: tuple[Any, ...] = ()
    reuse: float | None = None

    def methods_for(self, steps: int, layers: int, heads: int, frames: int) -> Methods:
        """Its methods, tables and horizons filled in."""
        found = []
        for method in self.methods:
            if isinstance(method, FlashBlock) and self.reuse is not None:
                # As many of all as asked; other heads in every layer, so that no layer has it easier.
                share = (1 - self.reuse) * heads
                ends = [round(share * number) for number in range(layers * steps + 1)]
                table = tuple(
                    tuple(
                        tuple((head + layer) % heads < ends[at + 1] - ends[at] for head in range(heads))
                        for layer, at in enumerate(range(step, layers * steps, steps))
                    )
                    for step in range(steps)
                )
                method = FlashBlock(calibrated=table, refresh=method.refresh)
            found.append(method)
        # What is to be timed runs, even if it is slower.
        return Methods.of(found, math.inf)


def rivals(frames: int) -> list[Rival]:
    """Dense first; then each method alone, at its published setting, and together."""
    # Published for 63 latent frames; from there on the density stays.
    light = CausalLightForcing(density=0.15, base_density=0.05, frames=min(frames, 63))
    return [
        Rival("dense"),
        Rival("flashblock, reuse 0.65", (FlashBlock(),), 0.65),
        Rival("flashblock, reuse 0.65, clean pass too", (FlashBlock(refresh=True),), 0.65),
        Rival("flashblock, probed", (FlashBlock(),)),
        Rival("light-forcing 0.15", (light,)),
        # Published blocks have 64 tokens; kernels are faster on these.
        Rival("light-forcing 0.15, blocks of 128", (replace(light, block=128),)),
        Rival("ann 0.3", (CausalAnn(0.3),)),
        Rival("tempcache 3", (TempCache(frames=3),)),
        Rival("ann-cross 0.5", (AnnCross(0.5),)),
        Rival("light-forcing 0.15 + flashblock 0.65", (light, FlashBlock()), 0.65),
        Rival("tempcache 3 + flashblock 0.65", (TempCache(frames=3), FlashBlock()), 0.65),
    ]


@dataclass(frozen=True)
class Case:
    """A model, a size and a length.

    Attributes:
        name: as printed.
        height, width: pixels.
        frames: latent frames; chunks beyond those that fill the window are timed.
        rollout: chunks and window.
        transformer: settings of `WanTransformer3DModel`; default Wan 2.1 1.3B.
        text: prompt tokens.
        vae: settings of `AutoencoderKLWan`, for the time of decoding; None leaves it out.
        compiled: compile the transformer's blocks and the decoder.
        graphs: play forwards back that come again, as CUDA graphs.
        dense: diffusers' names of backends for dense self-attention; None is its default. The fastest is taken.
        alone: rivals run alone, beside nothing, and are compared with dense as it ran before them.
    """

    name: str
    height: int
    width: int
    frames: int = 240
    rollout: Rollout = ROLLOUTS["longlive"]
    transformer: dict[str, Any] = field(
        default_factory=lambda: {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30, "text_dim": 4096}
    )
    text: int = 512
    vae: dict[str, Any] | None = field(default_factory=dict)
    compiled: bool = False
    graphs: bool = False
    dense: tuple[str | None, ...] = (None,)
    alone: bool = False

    def chunks(self) -> list[int]:
        """Lengths of its chunks."""
        return list(self.rollout.chunks(self.frames))

    @property
    def steady(self) -> int:
        """The first chunk that is timed: the window is full, every forward has come twice, one more for luck."""
        return -(-(self.rollout.window or self.rollout.chunk) // self.rollout.chunk) + 2


SIZES = {"480p": (480, 832), "720p": (720, 1280)}
# Fast backends of diffusers for dense attention, where they run.
DENSE = (None, "_native_cudnn", "_flash_3", "flash")
