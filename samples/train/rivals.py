"""Other people's caches on the same pipelines: those of diffusers, and cache-dit where it is installed."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig

Install = Callable[[Any], contextlib.AbstractContextManager[None]]
_FIRST_BLOCK = (0.1, 0.4, 0.02, 0.2, 0.05)
_TAYLORSEER = (4, 8, 2, 6)
_BROADCAST = (2, 4)
_CACHE_DIT = (0.12, 0.24, 0.06)


def cells(place: int, steps: int) -> list[tuple[str, dict[str, Any], Install]]:
    """Return name, description and installation of what there is to compare with.

    Args:
        place: Which threshold of each method, counted from 0.
        steps: Denoising steps of a clip.
    """
    found: list[tuple[str, dict[str, Any], Install]] = []
    if place < len(_FIRST_BLOCK):
        threshold = _FIRST_BLOCK[place]
        config: Any = FirstBlockCacheConfig(threshold=threshold)
        found.append(_diffusers("first-block", {"threshold": threshold}, lambda pipe, config=config: config))
    if place < len(_TAYLORSEER):
        interval = _TAYLORSEER[place]
        config = TaylorSeerCacheConfig(cache_interval=interval, disable_cache_before_step=3, use_lite_mode=True)
        found.append(_diffusers("taylorseer", {"interval": interval}, lambda pipe, config=config: config))
    if place < len(_BROADCAST):
        skipped = _BROADCAST[place]
        found.append(
            _diffusers("broadcast", {"interval": skipped}, lambda pipe, skipped=skipped: _broadcast(pipe, skipped))
        )
    if place < len(_CACHE_DIT) and importlib.util.find_spec("cache_dit"):
        threshold = _CACHE_DIT[place]
        about = {"cache": "cache-dit", "threshold": threshold}
        found.append((f"cache-dit threshold {threshold}", about, lambda pipe: _cache_dit(pipe, threshold)))
    return found


def _diffusers(name: str, about: dict[str, Any], config: Callable[[Any], Any]) -> tuple[str, dict[str, Any], Install]:
    ((parameter, value),) = about.items()

    @contextlib.contextmanager
    def installed(pipe: Any) -> Iterator[None]:
        pipe.transformer.enable_cache(config(pipe))
        try:
            yield
        finally:
            pipe.transformer.disable_cache()

    return f"diffusers {name} {parameter} {value}", {"cache": f"diffusers {name}"} | about, installed


def _broadcast(pipe: Any, skipped: int) -> PyramidAttentionBroadcastConfig:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=skipped,
        spatial_attention_timestep_skip_range=(100, 950),
        spatial_attention_block_identifiers=("blocks", "transformer_blocks", "single_transformer_blocks"),
        current_timestep_callback=lambda: pipe._current_timestep,
    )


@contextlib.contextmanager
def _cache_dit(pipe: Any, threshold: float) -> Iterator[None]:
    import cache_dit

    # Its default computes the first eight layers always, which is all that a sample model has.
    config = cache_dit.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=threshold)
    cache_dit.enable_cache(pipe, cache_config=config)
    try:
        yield
    finally:
        cache_dit.disable_cache(pipe)
