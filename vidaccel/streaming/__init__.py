"""Autoregressive video: how chunks follow each other, where frames stand, and what is remembered of them."""

from __future__ import annotations

from .kvcache import CacheShape, KVCache
from .replays import Replays
from .rollout import ROLLOUTS, Rollout
from .rope import VideoRope
from .sampler import FewStep, ManyStep, Sampler

__all__ = ["ROLLOUTS", "CacheShape", "FewStep", "KVCache", "ManyStep", "Replays", "Rollout", "Sampler", "VideoRope"]
