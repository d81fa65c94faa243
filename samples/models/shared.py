"""The autoencoder that samples share with wan-tiny: its weights lie in that folder alone.

`HunyuanVideoPipeline` and `CogVideoXPipeline` scale latents by one number where `WanPipeline` has a mean and a standard
deviation a channel. Both sit beside a linear layer, so they go into the weights: the autoencoder then speaks normalised
latents, and the stock pipelines take it as it is:

    folder = path("hunyuan-tiny")
    pipe = HunyuanVideoPipeline.from_pretrained(folder, **shared_parts(folder), dtype=torch.float32)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import path

__all__ = ["OWNER", "autoencoder", "leave_out", "shared_parts"]

OWNER = "wan-tiny"
_MARK = "shared_with"


def shared_parts(folder: Path) -> dict[str, Any]:
    """Return what `from_pretrained(folder)` has to be given: the autoencoder, where the folder leaves it out.

    Args:
        folder: Of a pipeline; `vae/config.json` names the owner of weights that are not there.
    """
    config = folder / "vae" / "config.json"
    return {"vae": autoencoder()} if config.is_file() and json.loads(config.read_text()).get(_MARK) == OWNER else {}


def leave_out(folder: Path) -> None:
    """Take the autoencoder's weights out of a saved pipeline and write down whose they are."""
    for file in (folder / "vae").glob("*.safetensors"):
        file.unlink()
    for file, change in (
        (folder / "model_index.json", {"vae": [None, None]}),
        (folder / "vae" / "config.json", {_MARK: OWNER}),
    ):
        file.write_text(json.dumps(json.loads(file.read_text()) | change, indent=2) + "\n")


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
