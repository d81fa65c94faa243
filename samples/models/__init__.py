"""Small trained models that ship with the package, and the world they were trained on.

`path("wan-tiny")` is a diffusers folder: `WanPipeline.from_pretrained(path("wan-tiny"), dtype=torch.float32)`. A folder
without `model_index.json` is a causal transformer alone, which shares all other parts with wan-tiny: no file is there
twice, and no link can break in a wheel. `vidaccel.render.stream.open_stream` puts them together.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["MODELS", "path"]

_HERE = Path(__file__).resolve().parent
_NAMES = {
    "wan-tiny": "wan-tiny",
    "wan-causal-tiny": "wan-causal-tiny",
    "hunyuan-tiny": "hunyuan-tiny",
    "cogvideox-tiny": "cogvideox-tiny",
    "sample-causal": "wan-causal-tiny",
    "sample-hunyuan": "hunyuan-tiny",
    "sample-cogvideox": "cogvideox-tiny",
}
MODELS = {name: folder for name, folder in _NAMES.items() if (_HERE / folder / "transformer" / "config.json").is_file()}
"""Every name of a model that is here, and its folder."""


def path(name: str) -> Path:
    """Return the folder of the shipped model `name`; raise `ValueError` for a name that is not in `MODELS`."""
    if name not in MODELS:
        raise ValueError(f"no sample model is called {name!r}; there are: {', '.join(MODELS)}")
    return _HERE / MODELS[name]
