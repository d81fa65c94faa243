"""Small trained models that ship with the package, and the world they were trained on.

`path("wan-tiny")` is a diffusers folder: `WanPipeline.from_pretrained(path("wan-tiny"), dtype=torch.float32)`.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["MODELS", "path"]

MODELS = ("wan-tiny",)


def path(name: str) -> Path:
    """Return the folder of the shipped model `name`; raise `ValueError` for a name that is not in `MODELS`."""
    if name not in MODELS:
        raise ValueError(f"no sample model is called {name!r}; there are: {', '.join(MODELS)}")
    return Path(__file__).resolve().parent / name
