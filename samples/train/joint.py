"""What the two models with joint attention share: the autoencoder of wan-tiny in a stock pipeline, and the export.

`HunyuanVideoPipeline` and `CogVideoXPipeline` scale latents by one number where `WanPipeline` has a mean and a standard
deviation a channel. Both sit beside a linear layer, so they go into the weights: the autoencoder then speaks normalised
latents, and the stock pipelines take it as it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline
from transformers import UMT5EncoderModel

from samples.models import path
from samples.train.budget import get_logger

log = get_logger("export")
SHORT = 5
"""Latent frames of a clip in the first part of the training, where a step costs less than half."""


def normalised_vae() -> AutoencoderKLWan:
    """Return wan-tiny's autoencoder, in float32, with its latents' mean and deviation inside its weights."""
    vae = AutoencoderKLWan.from_pretrained(path("wan-tiny") / "vae", dtype=torch.float32).eval()
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


def copy_text_encoder(target: UMT5EncoderModel) -> None:
    """Start from wan-tiny's text encoder: words and the first layers, as many as both have."""
    source = UMT5EncoderModel.from_pretrained(path("wan-tiny") / "text_encoder", dtype=torch.float32).state_dict()
    own = target.state_dict()
    for name, value in source.items():
        if name in own:
            own[name][: len(value)] = value


def write(pipe: DiffusionPipeline, folder: Path, defaults: dict[str, Any]) -> None:
    """Write the pipeline in bf16, its `defaults.json` and the licence of the data."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().to(torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    pipe.save_pretrained(folder, safe_serialization=True)
    (folder / "defaults.json").write_text(json.dumps(defaults, indent=2) + "\n")
    (folder / "LICENSE-DATA").write_text((path("wan-tiny") / "LICENSE-DATA").read_text())
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    log.info("%s: %.2f MiB", folder, size / 2**20)
