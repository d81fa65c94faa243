"""Where a model's files come from: JSON that is read with care, and the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .. import _samples
from ..errors import ModelError, UsageError

_MOST_JSON = 4 * 2**20


def fetch(reference: str, revision: str | None, *, weights: bool) -> Path:
    """Folder of a hub model in the hub's cache: its weights too, or only what says what it is.

    Raises:
        ModelError: the hub cannot be asked, or does not give it.
    """
    try:
        if weights:
            from diffusers import DiffusionPipeline

            return Path(DiffusionPipeline.download(reference, use_safetensors=True, revision=revision))
        from huggingface_hub import snapshot_download

        wanted = ["model_index.json", "defaults.json"]
        wanted += [f"{part}/config.json" for part in ("transformer", "vae", "text_encoder")]
        return Path(snapshot_download(reference, allow_patterns=wanted, revision=revision))
    except Exception as error:
        raise ModelError(
            f"model {reference!r} could not be had from the hub ({one_line(error)}); {possible()}"
        ) from error


def read_json(path: Path, most: int = _MOST_JSON) -> dict[str, Any]:
    """A JSON object from a file that somebody else may have written.

    Raises:
        UsageError: no such file, too large, or no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size <= most else None
    except (OSError, ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise UsageError(
            f"{path} is missing, too large, or not a JSON object; the model is not a complete diffusers pipeline"
        )
    return data


def possible() -> str:
    """The words of an error about what can be named."""
    return (
        f"possible: {', '.join(_samples.MODELS)} (shipped), a folder with a model_index.json, "
        "or a hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    )


def one_line(error: BaseException) -> str:
    """The kind of an error and the beginning of what it says."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'...' if len(text) > 200 else ''}"
