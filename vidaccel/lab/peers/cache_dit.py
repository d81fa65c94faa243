"""cache-dit (vipshop/cache-dit): DBCache, a gate on the first layers' residual."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ...grid import VideoGrid
from .peer import Peer


@contextlib.contextmanager
def cache_dit(pipe: Any, grid: VideoGrid, threshold: float, first: int, last: int, warmup: int) -> Iterator[None]:
    """Its settings: residual_diff_threshold, Fn_compute_blocks, Bn_compute_blocks, max_warmup_steps."""
    import cache_dit

    config = cache_dit.DBCacheConfig(
        residual_diff_threshold=threshold, Fn_compute_blocks=first, Bn_compute_blocks=last, max_warmup_steps=warmup
    )
    # It patches the pipeline's class, so nobody else may run before it is switched off, however far it came.
    try:
        cache_dit.enable_cache(pipe, cache_config=config)
        yield
    finally:
        cache_dit.disable_cache(pipe)


CACHE_DIT = Peer(
    "cache-dit", "cache", "cache_dit", cache_dit, {"threshold": 0.08, "first": 8, "last": 0, "warmup": 8}, whole=True
)
