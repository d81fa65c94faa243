"""What a chunk of an autoregressive video must compute, and how long that takes at the rates this machine reaches.

Math: of a chunk of l tokens over n seen, in each of its forwards and each layer of width w and feed-forward width f:
    linear = 2 l w (6 w + 2 f): four projections of self-attention, two of cross-attention, two of the feed-forward
    attention = 4 l n w density, of which reused parts of the past are not computed;  prompt = 4 l text w
    bound = linear / rate of a matrix product alone + (attention + prompt) / rate of dense attention alone
Limits: norms, RoPE, choosing blocks, merging, copies into the cache and launches are left out: it is a bound, not a
    time. Sparse kernels reach less than the rate of dense attention.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch

from ..render.dense import why_not
from ..reuse import Methods
from .causal_cases import Case
from .timing import synchronize


class Flops(NamedTuple):
    """Floating-point operations of one chunk."""

    linear: float
    attention: float
    prompt: float


def chunk_flops(transformer: Any, case: Case, density: float, reuse: float | None, methods: Methods) -> Flops:
    """Of a chunk in the steady state.

    Args:
        transformer: a Wan transformer.
        case: size and rollout.
        density: of its attention, as planned, without reuse.
        reuse: fraction of heads that take the past's part from an earlier step; None for none.
        methods: whether the clean pass reuses too.
    """
    config, rollout = transformer.config, case.rollout
    width, patch = config.num_attention_heads * config.attention_head_dim, config.patch_size[1]
    frame = (case.height // 8 // patch) * (case.width // 8 // patch)
    own, seen = rollout.chunk * frame, (rollout.window or rollout.chunk) * frame
    forwards = len(rollout.timesteps) + 1
    each = config.num_layers * own * width
    pairs = seen * density * forwards
    if reuse is not None and methods.flash is not None:
        # The first forward fills the store, and the clean pass uses it only where that is asked for.
        reusing = forwards - 1 - (not methods.flash.refresh)
        pairs -= reusing * reuse * max(0.0, seen * density - own)
    return Flops(
        2.0 * each * (6 * width + 2 * config.ffn_dim) * forwards, 4.0 * each * pairs, 4.0 * each * case.text * forwards
    )


@dataclass(frozen=True)
class Rates:
    """Operations a second.

    Attributes:
        linear: of the feed-forward's first matrix product.
        attention: of dense self-attention of a chunk over its window.
        backend: diffusers' name of what computes that; None is its default.
    """

    linear: float
    attention: float
    backend: str | None

    @classmethod
    def measured(
        cls, transformer: Any, case: Case, backends: Sequence[str | None], device: torch.device, dtype: torch.dtype
    ) -> Rates:
        """Time both alone; of several backends that run here, the fastest counts."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        config = transformer.config
        heads, d, patch = config.num_attention_heads, config.attention_head_dim, config.patch_size[1]
        frame = (case.height // 8 // patch) * (case.width // 8 // patch)
        own, seen = case.rollout.chunk * frame, (case.rollout.window or case.rollout.chunk) * frame
        x = torch.randn(own, heads * d, device=device, dtype=dtype)
        weight = torch.randn(config.ffn_dim, heads * d, device=device, dtype=dtype)
        q, kv = (torch.randn(1, length, heads, d, device=device, dtype=dtype) for length in (own, seen))
        linear = _seconds(lambda: torch.nn.functional.linear(x, weight), device)
        times = {
            name: _seconds(partial(dispatch_attention_fn, q, kv, kv, backend=name), device)
            for name in backends
            if len(backends) == 1 or name is None or why_not(name, device, dtype, d) is None
        }
        best = min(times, key=times.__getitem__)
        return cls(2.0 * x.numel() * config.ffn_dim / linear, 4.0 * q.numel() * seen / times[best], best)

    def milliseconds(self, flops: Flops) -> float:
        """The least time for so many operations."""
        return 1e3 * (flops.linear / self.linear + (flops.attention + flops.prompt) / self.attention)

    def __str__(self) -> str:
        name = self.backend or "diffusers' default"
        return f"{self.linear / 1e12:.3g} and {self.attention / 1e12:.3g} TFLOP/s ({name})"


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call; several in a row, so that launches hide behind each other."""
    times = []
    for _ in range(4):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(5):
            call()
        synchronize(device)
        times.append((time.perf_counter() - start) / 5)
    return median(times[1:])
