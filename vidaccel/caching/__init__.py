"""Features cached across denoising steps: indicator x gate x predictor, and one mechanism that installs them.

One policy a file; none of them knows a model or a GPU.
"""

from __future__ import annotations

from .cache import Cache, estimate_bytes
from .cg_taylor import CGTaylor
from .easycache import EasyCache
from .first_block import FirstBlock
from .magcache import MagCache
from .placement import Placed, placed
from .policy import CachePolicy
from .replay import Replay, recorded
from .taylorseer import TaylorSeer
from .teacache import TeaCache

POLICIES: dict[str, type[CachePolicy]] = {
    "cg-taylor": CGTaylor,
    "easycache": EasyCache,
    "first-block": FirstBlock,
    "magcache": MagCache,
    "placed": Placed,
    "replay": Replay,
    "taylorseer": TaylorSeer,
    "teacache": TeaCache,
}

__all__ = [
    "POLICIES",
    "CGTaylor",
    "Cache",
    "CachePolicy",
    "EasyCache",
    "FirstBlock",
    "MagCache",
    "Placed",
    "Replay",
    "TaylorSeer",
    "TeaCache",
    "estimate_bytes",
    "placed",
    "recorded",
]
