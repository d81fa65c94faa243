"""FlashBlock's offline form: a table of the heads that recompute, from a few videos that are only watched.

Example:
    >>> flash = calibrated(pipe, ["a cat playing piano", "waves", "a street at night", "a dancer", "rain on a window"])
    >>> video = pipe("a dog", num_frames=241, methods=[flash]).frames[0]

The table holds for the rollout, the number of steps and the methods beside it that it was made with. Where no such
videos are at hand `FlashBlock()` measures its error online and needs none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import UsageError
from ..reuse import FlashBlock
from ..reuse.flashblock import Calibration
from .causal_wan import CausalWanPipeline


def calibrated(
    pipe: CausalWanPipeline,
    prompts: Sequence[str],
    *,
    cosine: float = 0.85,
    drift: float = 0.05,
    refresh: bool = False,
    num_frames: int = 81,
    methods: Iterable[Any] = (),
    **settings: Any,
) -> FlashBlock:
    """Make one video a prompt, and average how far each head's past moves from step to step.

    Source: FlashBlock, arXiv 2602.05305: five short prompts of 21 latent frames, cosine 0.85 and drift 0.05; its
    authors advise 0.9 for quality.

    Args:
        pipe: whose transformer is watched.
        prompts: one after the other.
        cosine: a head whose past's output turns further is recomputed.
        drift: a head whose past's log-sum-exp moves further, in nats, is recomputed.
        refresh: as in `FlashBlock`.
        num_frames: pixel frames of each video, more than one chunk.
        methods: others that will run beside it.
        settings: of `CausalWanPipeline.stream`.

    Raises:
        UsageError: no prompts, or videos in which no chunk has a past.
    """
    if not prompts or isinstance(prompts, str):
        raise UsageError(f"prompts {prompts!r} were given; a calibration takes a list with one or more")
    seen, beside = Calibration(cosine, drift), tuple(methods)
    for prompt in prompts:
        watched = [*beside, FlashBlock(refresh=refresh)]
        whole: dict[str, Any] = {"output_type": "latent", "even_if_slower": True} | settings
        stream = pipe.stream(prompt, num_frames=num_frames, methods=watched, **whole)
        for turn in stream.model.turns.values():
            turn.calibration = seen
        for _ in stream:
            pass
    if seen.is_empty:
        raise UsageError(
            f"videos of {num_frames} frames were asked for, in which no chunk reuses a past: ask for two chunks or "
            f"more, of {pipe.rollout.chunk} latent frames each, and two steps or more"
        )
    return FlashBlock(refresh=refresh, calibrated=seen.table())
