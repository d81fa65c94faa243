"""The caches of diffusers itself: first block cache, TaylorSeer in its lite mode, pyramid attention broadcast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ...grid import VideoGrid
from .peer import Peer


@contextlib.contextmanager
def _enabled(pipe: Any, config: Any) -> Iterator[None]:
    experts = [module for name in ("transformer", "transformer_2") if (module := getattr(pipe, name, None)) is not None]
    with contextlib.ExitStack() as undo:
        for module in experts:
            module.enable_cache(config)
            undo.callback(module.disable_cache)
        yield


def first_block(pipe: Any, grid: VideoGrid, threshold: float) -> Any:
    """Reuse what the other layers add while the first one adds nearly the same."""
    from diffusers import FirstBlockCacheConfig

    return _enabled(pipe, FirstBlockCacheConfig(threshold=threshold))


def taylorseer(pipe: Any, grid: VideoGrid, interval: int) -> Any:
    """Forecast between every n-th step. Its default mode does nothing on Wan and CogVideoX; the lite mode does."""
    from diffusers import TaylorSeerCacheConfig

    config = TaylorSeerCacheConfig(cache_interval=interval, disable_cache_before_step=3, use_lite_mode=True)
    return _enabled(pipe, config)


def broadcast(pipe: Any, grid: VideoGrid, interval: int) -> Any:
    """Reuse attention's outputs for a few steps."""
    from diffusers import PyramidAttentionBroadcastConfig

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=interval,
        spatial_attention_timestep_skip_range=(100, 950),
        spatial_attention_block_identifiers=("blocks", "transformer_blocks", "single_transformer_blocks"),
        current_timestep_callback=lambda: pipe._current_timestep,
    )
    return _enabled(pipe, config)


FIRST_BLOCK = Peer("diffusers first-block", "cache", "diffusers", first_block, {"threshold": 0.05})
TAYLORSEER = Peer("diffusers taylorseer", "cache", "diffusers", taylorseer, {"interval": 4})
BROADCAST = Peer("diffusers broadcast", "cache", "diffusers", broadcast, {"interval": 2}, whole=True)
