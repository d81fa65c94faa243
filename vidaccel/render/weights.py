"""A model's weights: checked before anything opens them, loaded, and told apart."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from .._samples.shared import shared_parts
from ..errors import ModelError, UsageError
from .models import Model
from .source import fetch, one_line, read_json

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def load(model: Model, dtype: torch.dtype, *, image: bool = False, video: bool = False) -> Any:
    """The pipeline, on the CPU.

    Wan's VAE computes in float32 whatever the dtype, as its authors have it. The others decode in tiles: whole videos
    would take more memory than their transformers.

    Raises:
        ModelError: weights that are missing, pickled or broken.
    """
    return load_as(model.pipeline_class(image=image, video=video), model, dtype)


def load_as(cls: Any, model: Model, dtype: torch.dtype, **settings: Any) -> Any:
    """As `load`, into a pipeline class that has the same parts.

    Raises:
        ModelError: weights that are missing, pickled or broken.
    """
    folder = fetch(model.reference, model.revision, weights=True) if model.kind == "hub" else model.folder
    check_weights(model, folder)
    wan = model.vae.get("_class_name") == "AutoencoderKLWan"
    dtypes = {"vae": torch.float32 if wan else dtype, "default": dtype}
    parts = shared_parts(folder) | settings
    try:
        pipe = cls.from_pretrained(str(folder), dtype=dtypes, use_safetensors=True, local_files_only=True, **parts)
    except Exception as error:
        raise ModelError(f"{model.reference} could not be loaded: {one_line(error)}") from error
    if not wan:
        pipe.vae.enable_tiling()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_weights(model: Model, folder: Path) -> None:
    """Refuse weights that are not safetensors, before anything opens them.

    Raises:
        UsageError: pickled weights, which run code when they are read, or none.
    """
    for name, entry in model.index.items():
        part = folder / name
        if not (isinstance(entry, list) and entry[1] and (part / "config.json").is_file()):
            continue
        if not any(part.glob("*.safetensors")):
            pickled = sorted(file.name for file in part.iterdir() if file.suffix in _PICKLES)
            found = (
                f"only pickled weights ({pickled[0]}), which run code when they are read" if pickled else "no weights"
            )
            raise UsageError(
                f"{model.reference}: {name} has {found}; "
                "vidaccel loads safetensors only: save it again with save_pretrained"
            )
        for shards in part.glob("*.safetensors.index.json"):
            files = read_json(shards, most=2**26).get("weight_map", {}).values()
            if not all(isinstance(file, str) and file.endswith(".safetensors") and "/" not in file for file in files):
                raise UsageError(
                    f"{model.reference}: {name}/{shards.name} names files that are no safetensors beside it"
                )


def fingerprint(model: Model) -> str:
    """16 hexadecimal digits that change when the model does.

    Cheap: JSON files whole; of weights their size, their first 64 KiB (names and shapes) and their last.
    """
    folder = fetch(model.reference, model.revision, weights=True) if model.kind == "hub" else model.folder
    parts = ["model_index.json"]
    for name, entry in sorted(model.index.items()):
        if isinstance(entry, list) and entry[1]:
            parts += sorted(
                f"{name}/{file.name}" for file in (folder / name).glob("*") if file.suffix in (".json", ".safetensors")
            )
    total = hashlib.sha256()
    for part in parts:
        with (folder / part).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            head = file.read(2**16 if part.endswith(".safetensors") else -1)
            file.seek(max(0, size - 2**16))
            total.update(f"{part} {size} ".encode() + head + file.read())
    return total.hexdigest()[:16]
