"""The encoded clips in memory, and batches of them with tokenised captions."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import T5Tokenizer

from samples.train.padding import SLOTS


class Latents:
    """All shards of a folder, normalised by the folder's `stats.json`.

    `ids` (captions + 1, slots) holds every clip's captions, one clip after the other, and last the empty one.

    Args:
        folder: What `encode` wrote.
        tokenizer: For the captions.
        device: Where all of it is kept.
        held: Clips, the last ones, that `batch` never draws.
        frames: Latent frames to keep of each clip; the autoencoder is causal, so they are those of a shorter clip.
    """

    def __init__(
        self, folder: Path, tokenizer: T5Tokenizer, device: torch.device, held: int = 128, frames: int | None = 9
    ) -> None:
        files = sorted(folder.glob("latents-*.safetensors"))
        if not files:
            raise FileNotFoundError(f"no latents in {folder}: run `python -m samples.train.encode` first")
        stats = json.loads((folder / "stats.json").read_text())
        self.mean = torch.tensor(stats["mean"], device=device)[:, None, None, None]
        self.std = torch.tensor(stats["std"], device=device)[:, None, None, None]
        self.latents = torch.cat([load_file(file)["latents"][:, :, :frames].to(device) for file in files])
        captions = [line for file in files for line in json.loads(file.with_suffix(".json").read_text())]
        self.variants = len(captions[0])
        flat = [caption for line in captions for caption in line] + [""]
        tokens = tokenizer(flat, padding="max_length", max_length=SLOTS, truncation=True)
        self.ids = torch.tensor(tokens["input_ids"], device=device)
        self.empty = self.ids[-1]
        self.pad = tokenizer.pad_token_id
        self.count = len(self.latents) - held

    def __len__(self) -> int:
        return self.count

    def batch(self, size: int, generator: torch.Generator, drop: float) -> tuple[Tensor, Tensor, Tensor]:
        """Draw clips: latents (b, c, f, h, w) in float32, token ids (b, slots), mask (b, slots)."""
        latents, numbers = self.pick(size, generator, drop)
        ids = self.ids[numbers]
        return latents, ids, (ids != self.pad).float()

    def pick(self, size: int, generator: torch.Generator, drop: float) -> tuple[Tensor, Tensor]:
        """Draw clips: latents (b, c, f, h, w) in float32, and which of the `ids` are their captions (b,)."""
        device = generator.device
        rows = torch.randint(self.count, (size,), generator=generator, device=device)
        variant = torch.randint(self.variants, (size,), generator=generator, device=device)
        dropped = torch.rand(size, generator=generator, device=device) < drop
        return self._latents(rows), torch.where(dropped, len(self.ids) - 1, rows * self.variants + variant)

    def held(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return clips that `batch` never draws, with their full captions."""
        rows = torch.arange(self.count, min(self.count + size, len(self.latents)), device=self.latents.device)
        ids = self.ids[rows * self.variants]
        return self._latents(rows), ids, (ids != self.pad).float()

    def _latents(self, rows: Tensor) -> Tensor:
        return (self.latents[rows].float() - self.mean) / self.std
