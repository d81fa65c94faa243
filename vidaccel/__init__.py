"""Sparse attention and feature caching for video diffusion in Hugging Face diffusers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Acceleration, accelerate, attn_processors, remove
    from .errors import VidaccelError
    from .grid import VideoGrid
    from .parallel import cp_plan, enable_parallelism
    from .recipe import Recipe, presets
    from .report import Report
    from .schedule import Schedule

__version__ = "0.1.0"

__all__ = [
    "Acceleration",
    "Recipe",
    "Report",
    "Schedule",
    "VidaccelError",
    "VideoGrid",
    "accelerate",
    "attn_processors",
    "cp_plan",
    "enable_parallelism",
    "presets",
    "remove",
]

# Public names are loaded when they are first used, so that `vidaccel --help` need not wait for torch.
_HOME = {
    "Acceleration": "api",
    "Recipe": "recipe",
    "Report": "report",
    "Schedule": "schedule",
    "VidaccelError": "errors",
    "VideoGrid": "grid",
    "accelerate": "api",
    "attn_processors": "api",
    "cp_plan": "parallel",
    "enable_parallelism": "parallel",
    "presets": "recipe",
    "remove": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
