"""Sparse attention and feature caching for video diffusion in Hugging Face diffusers."""

from __future__ import annotations

from .api import Acceleration, accelerate, attn_processors, remove
from .errors import VidaccelError
from .grid import VideoGrid
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
    "presets",
    "remove",
]
