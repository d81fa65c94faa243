"""What samples leave out of their folders: the autoencoder, whose weights lie in wan-tiny's alone, and layers of zeros.

`HunyuanVideoPipeline` and `CogVideoXPipeline` scale latents by one number where `WanPipeline` has a mean and a standard
deviation a channel. Both sit beside a linear layer, so they go into the weights: the autoencoder then speaks normalised
latents. HunyuanVideo reads the third hidden state of its text encoder from the end, so that two layers run which
nothing reads; hunyuan-tiny's are zeros, and are made instead of stored. The stock pipelines take both as they are:

    folder = path("hunyuan-tiny")
    pipe = HunyuanVideoPipeline.from_pretrained(folder, **shared_parts(folder), dtype=torch.float32)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import path

__all__ = ["OWNER", "autoencoder", "leave_out", "shared_parts", "text_encoder"]

OWNER = "wan-tiny"
_MARK = "shared_with"
_UNREAD = "unread_layers"


def shared_parts(folder: Path) -> dict[str, Any]:
    """Return what `from_pretrained(folder)` has to be given: the parts that the folder leaves out.

    Args:
        folder: Of a pipeline; `vae/config.json` names the owner of weights that are not there, and
            `text_encoder/config.json` how many layers of zeros are not.
    """
    parts: dict[str, Any] = {"vae": autoencoder()} if _config(folder, "vae").get(_MARK) == OWNER else {}
    return parts | ({"text_encoder": text_encoder(folder)} if _UNREAD in _config(folder, "text_encoder") else {})


def leave_out(folder: Path, unread: int = 0) -> None:
    """Take the autoencoder's weights and the text encoder's layers of zeros out of a saved pipeline, and say so there.

    Args:
        folder: As `save_pretrained` wrote it; its weights, in one file a part, are changed in place.
        unread: How many last layers of the text encoder hold zeros, because nothing reads them.
    """
    from safetensors.torch import load_file, save_file

    for file in (folder / "vae").glob("*.safetensors"):
        file.unlink()
    _note(folder / "vae" / "config.json", {_MARK: OWNER})
    _note(folder / "model_index.json", {"vae": [None, None]})
    if unread:
        file = folder / "text_encoder" / "model.safetensors"
        heads = _heads(_config(folder, "text_encoder")["num_layers"], unread)
        kept = {name: weight for name, weight in load_file(file).items() if not name.startswith(heads)}
        save_file(kept, file, {"format": "pt"})
        _note(folder / "text_encoder" / "config.json", {_UNREAD: unread})
        _note(folder / "model_index.json", {"text_encoder": [None, None]})


def text_encoder(folder: Path) -> Any:
    """Return the text encoder of a folder, in float32, with the layers of zeros that its file leaves out."""
    import torch
    from safetensors.torch import load_file
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config.from_pretrained(folder / "text_encoder")
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    first = "encoder.block.0."
    like = {name.removeprefix(first): tensor for name, tensor in weights.items() if name.startswith(first)}
    for head in _heads(config.num_layers, getattr(config, _UNREAD)):
        weights |= {head + rest: torch.zeros_like(tensor) for rest, tensor in like.items()}
    return UMT5EncoderModel.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32).eval()


def autoencoder() -> Any:
    """Return wan-tiny's autoencoder, in float32, with its latents' mean and deviation inside its weights."""
    import torch
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(path(OWNER) / "vae", dtype=torch.float32).eval()
    mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    channels = len(mean)
    with torch.no_grad():
        # decoder(W (std z + mean) + b), and (W x + b - mean) / std for the first half of the encoder's moments.
        weight, bias = vae.post_quant_conv.weight, vae.post_quant_conv.bias
        bias += weight.flatten(1) @ mean
        weight *= std[None, :, None, None, None]
        weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
        weight[:channels] /= std[:, None, None, None, None]
        bias[:channels] = (bias[:channels] - mean) / std
        bias[channels:] -= 2 * std.log()
    ones = {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
    # Names under which the two pipelines look for the scale factors.
    known = {"scaling_factor": 1.0, "temporal_compression_ratio": 4, "block_out_channels": [16] * 5}
    vae.register_to_config(**ones, **known)
    return vae


def _config(folder: Path, part: str) -> dict[str, Any]:
    file = folder / part / "config.json"
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def _note(file: Path, change: dict[str, Any]) -> None:
    settings = json.loads(file.read_text()) | change
    settings.pop("_name_or_path", None)  # where the part was loaded from, on the machine that wrote the file
    file.write_text(json.dumps(settings, indent=2) + "\n")


def _heads(layers: int, unread: int) -> tuple[str, ...]:
    """Return how the names of the last layers' weights begin."""
    return tuple(f"encoder.block.{layer}." for layer in range(layers - unread, layers))
