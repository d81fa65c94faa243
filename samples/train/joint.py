"""What the two models with joint attention share: their teacher, the autoencoder in a stock pipeline, and the export.

Both are asked for the velocity that wan-tiny gives, not for noise - data. The data's velocity is the same on average,
but most of it is chance: at time 0.98 a caption's direction is worth 0.05 of wan-tiny's squared error of 0.38, and two
heads whose layers share one softmax over video and text did not find it in 8,000 steps. A teacher's answer holds what
can be known and nothing else (Hinton et al., "Distilling the knowledge in a neural network", 2015).

`HunyuanVideoPipeline` and `CogVideoXPipeline` scale latents by one number where `WanPipeline` has a mean and a standard
deviation a channel. Both sit beside a linear layer, so they go into the weights: the autoencoder then speaks normalised
latents, and the stock pipelines take it as it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from samples.models import path
from samples.train.budget import get_logger

log = get_logger("export")
TEACHER_SLOTS = 64
"""Text tokens, pads included, with which wan-tiny is asked: those of its `defaults.json`."""


class Teacher(nn.Module):
    """wan-tiny without its autoencoder: caption and noisy latents in, velocity out."""

    def __init__(self) -> None:
        super().__init__()
        folder = path("wan-tiny")
        self.text_encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        self.transformer = WanTransformer3DModel.from_pretrained(folder / "transformer", dtype=torch.float32)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, latents: Tensor, time: Tensor, ids: Tensor) -> Tensor:
        """Return the velocity in float32, shaped as `latents` (b, c, f, h, w), at times (b,) in [0, 1]."""
        mask = (ids != 0).float()
        words = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
        words = nn.functional.pad(words, (0, 0, 0, TEACHER_SLOTS - ids.shape[1]))
        return self.transformer(latents, time * 1000, words, return_dict=False)[0].float()


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
