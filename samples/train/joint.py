"""What the two models with joint attention share: their teacher, how they train, and the export.

Both are asked for the velocity that wan-tiny gives, not for noise - data. The data's velocity is the same on average,
but most of it is chance: at time 0.98 a caption's direction is worth 0.05 of wan-tiny's squared error of 0.38, and two
heads whose layers share one softmax over video and text did not find it in 8,000 steps. A teacher's answer holds what
can be known and nothing else (Hinton et al., "Distilling the knowledge in a neural network", 2015). Their text encoders
are wan-tiny's and stay as they are, so every caption is read once, before the first step.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from samples.models import path
from samples.models.shared import leave_out
from samples.train import loop
from samples.train.budget import get_logger

log = get_logger("export")
TEACHER_SLOTS = 64
"""Text tokens, pads included, with which wan-tiny is asked: those of its `defaults.json`."""


class Teacher(nn.Module):
    """wan-tiny without its autoencoder: a caption's words and noisy latents in, velocity out."""

    def __init__(self) -> None:
        super().__init__()
        folder = path("wan-tiny")
        self.text_encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        self.transformer = WanTransformer3DModel.from_pretrained(folder / "transformer", dtype=torch.float32)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def words(self, ids: Tensor) -> Tensor:
        """Return what the pipeline makes of token ids (b, slots): (b, slots, channels), zeros for the pads."""
        mask = (ids != 0).float()
        return self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]

    @torch.no_grad()
    def forward(self, latents: Tensor, time: Tensor, words: Tensor) -> Tensor:
        """Return the velocity in float32, shaped as `latents` (b, c, f, h, w), at times (b,) in [0, 1]."""
        words = nn.functional.pad(words, (0, 0, 0, TEACHER_SLOTS - words.shape[1]))
        return self.transformer(latents, time * 1000, words, return_dict=False)[0].float()


def guided(teacher: Teacher, latents: Tensor, time: Tensor, words: Tensor, none: Tensor, strength: Tensor) -> Tensor:
    """Return u + g (c - u), shaped as `latents`, at strengths g (b,); `none` (slots, channels): no caption's words."""
    both = teacher(torch.cat((latents, latents)), torch.cat((time, time)), torch.cat((words, none.expand_as(words))))
    worded, without = both.chunk(2)
    return without + strength[:, None, None, None, None] * (worded - without)


def evened(errors: Tensor, time: Tensor) -> Tensor:
    """Return the mean of errors (b,), those at times (b,) near noise weighed less.

    Errors of a guided velocity grow about as 1 / (1 - time): measured on hunyuan-tiny 0.07 at 0.4, 0.09 at 0.6, 0.21 at
    0.8, 0.57 at 0.9, 1.8 at 0.97. Unweighed, the first steps of sampling, which decide on paths, leave little of the
    gradient to those that draw outlines. The root takes half of that back, on a scale of logarithms.
    """
    return (errors * (1.02 - time).sqrt()).mean()


@torch.no_grad()
def table(encode: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """Return what `encode` makes of every row of `ids` (captions, slots)."""
    return torch.cat([encode(part) for part in ids.split(2048)])


def arguments(doc: str | None, out: str) -> argparse.ArgumentParser:
    """Return a parser with the options of both models."""
    parser = loop.arguments(doc, out)
    parser.add_argument("--hints", type=float, default=1.0, help="weight of hints.py at the start; it falls to zero")
    parser.add_argument("--export", type=Path, help="write the pipeline to this folder and stop")
    return parser


def copy_text_encoder(target: UMT5EncoderModel) -> None:
    """Take wan-tiny's text encoder, words and the first layers, as many as both have, and let it stay as it is."""
    target.requires_grad_(False)
    source = UMT5EncoderModel.from_pretrained(path("wan-tiny") / "text_encoder", dtype=torch.float32).state_dict()
    own = target.state_dict()
    for name, value in source.items():
        if name in own:
            own[name][: len(value)] = value


def write(pipe: DiffusionPipeline, folder: Path, defaults: dict[str, Any], unread: int = 0) -> None:
    """Write the pipeline in bf16, less what `leave_out` leaves out, its `defaults.json` and the licence of the data."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().to(torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    pipe.save_pretrained(folder, safe_serialization=True)
    leave_out(folder, unread)
    (folder / "defaults.json").write_text(json.dumps(defaults, indent=2) + "\n")
    (folder / "LICENSE-DATA").write_text((path("wan-tiny") / "LICENSE-DATA").read_text())
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    log.info("%s: %.2f MiB", folder, size / 2**20)
