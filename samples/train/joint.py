"""What the two models with joint attention share: their teacher, how they begin, and the export.

Both are asked for the velocity that wan-tiny gives, not for noise - data. The data's velocity is the same on average,
but most of it is chance: at time 0.98 a caption's direction is worth 0.05 of wan-tiny's squared error of 0.38, and two
heads whose layers share one softmax over video and text did not find it in 8,000 steps. A teacher's answer holds what
can be known and nothing else (Hinton et al., "Distilling the knowledge in a neural network", 2015).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from samples.models import path
from samples.models.shared import leave_out
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


def guided(teacher: Teacher, latents: Tensor, time: Tensor, ids: Tensor, empty: Tensor, strength: Tensor) -> Tensor:
    """Return u + g (c - u), shaped as `latents`, at strengths g (b,); `empty` (slots,) are the ids of no caption."""
    both = teacher(torch.cat((latents, latents)), torch.cat((time, time)), torch.cat((ids, empty.expand_as(ids))))
    worded, without = both.chunk(2)
    return without + strength[:, None, None, None, None] * (worded - without)


def copy_text_encoder(target: UMT5EncoderModel) -> None:
    """Start from wan-tiny's text encoder: words and the first layers, as many as both have."""
    source = UMT5EncoderModel.from_pretrained(path("wan-tiny") / "text_encoder", dtype=torch.float32).state_dict()
    own = target.state_dict()
    for name, value in source.items():
        if name in own:
            own[name][: len(value)] = value


def write(pipe: DiffusionPipeline, folder: Path, defaults: dict[str, Any]) -> None:
    """Write the pipeline in bf16 without the autoencoder's weights, its `defaults.json` and the licence of the data."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().to(torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    pipe.save_pretrained(folder, safe_serialization=True)
    leave_out(folder)
    (folder / "defaults.json").write_text(json.dumps(defaults, indent=2) + "\n")
    (folder / "LICENSE-DATA").write_text((path("wan-tiny") / "LICENSE-DATA").read_text())
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    log.info("%s: %.2f MiB", folder, size / 2**20)
