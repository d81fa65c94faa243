"""Trains cogvideox-tiny: joint attention with the text in front, guidance by two samples a call.

    python -m samples.train.cogvideox --latents build/latents --out build/cogvideox --minutes 8
    python -m samples.train.cogvideox --out build/cogvideox --export samples/models/cogvideox-tiny

Taught by wan-tiny, on its latents, with its sampler: the stock pipeline takes any scheduler. What it learns for a
caption is guided already, by BAKED; the pipeline guides it further, to wan-tiny's strength. A caption then says more,
and a small model's errors are raised by 1.6 instead of by 4. CogVideoX masks no pads, neither in the text encoder nor
in the transformer, so the text has always the same number of tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn

from samples.models.shared import autoencoder
from samples.train import flow, joint, loop
from samples.train.data import Latents
from samples.train.hints import Hints
from samples.train.padding import SLOTS
from samples.train.parts import (
    LATENT_CHANNELS,
    TEXT_WIDTH,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
)

SIDE = 16
"""Rows and columns of the latents."""
BAKED = 2.5
"""Strength of the guidance within the weights; the pipeline's multiplies it."""
DEFAULTS = {
    "height": 256,
    "width": 256,
    "num_frames": 33,
    "fps": 16,
    "num_inference_steps": 20,
    "guidance_scale": 1.6,
    "max_sequence_length": SLOTS,
}


class Denoiser(nn.Module):
    """Text encoder and transformer as one module: caption and noisy latents in, velocity out."""

    def __init__(self, vocabulary: int, layers: int = 8) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(vocabulary)
        joint.copy_text_encoder(self.text_encoder)
        self.transformer = build_transformer(layers)

    def forward(self, latents: Tensor, time: Tensor, ids: Tensor) -> Tensor:
        """Return the velocity, shaped as `latents` (b, c, f, h, w); `time` (b,) lies in [0, 1]."""
        return self.velocity(latents, time, self.words(ids))

    def words(self, ids: Tensor) -> Tensor:
        """Return what the pipeline hands to the transformer: one vector a token, pads too."""
        return self.text_encoder(ids).last_hidden_state

    def velocity(self, latents: Tensor, time: Tensor, words: Tensor) -> Tensor:
        """Return what `forward` does, of captions already read."""
        velocity = self.transformer(
            latents.transpose(1, 2),
            words,
            time * 1000,
            image_rotary_emb=rotary(latents),
            return_dict=False,
        )[0]
        return velocity.transpose(1, 2)


def build_transformer(layers: int) -> CogVideoXTransformer3DModel:
    """Build the transformer: two heads of 64, one token a latent place, rotary positions as in the 5b."""
    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        time_embed_dim=64,
        text_embed_dim=TEXT_WIDTH,
        num_layers=layers,
        sample_width=SIDE,
        sample_height=SIDE,
        sample_frames=33,
        patch_size=1,
        max_text_seq_length=SLOTS,
        use_rotary_positional_embeddings=True,
    )


def rotary(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rotary embedding that the pipeline makes for latents (b, c, f, h, w) of the trained size."""
    frames, height, width = latents.shape[2:]
    return get_3d_rotary_pos_embed(
        embed_dim=64,
        crops_coords=((0, 0), (height, width)),
        grid_size=(height, width),
        temporal_size=frames,
        device=latents.device,
    )


def main(words: list[str] | None = None) -> None:
    """Train until the budget is spent, or export what was trained."""
    args = joint.arguments(__doc__, "build/cogvideox").parse_args(words)
    if args.export:
        joint.write(assemble(args.out / "ema.safetensors"), args.export, DEFAULTS)
    else:
        train(args)


def train(args: argparse.Namespace) -> None:
    """Train until the budget is spent."""
    device = loop.prepare(args.seed)
    tokenizer = build_tokenizer()
    data = Latents(args.latents, tokenizer, device, held=args.held)
    model = Denoiser(len(tokenizer)).to(device)
    average = loop.resume(model, args.out)
    blocks = model.transformer.transformer_blocks
    teacher = joint.Teacher().to(device)
    loop.compile_blocks([*blocks, *teacher.transformer.blocks], args.eager)
    hints = Hints(blocks, teacher.transformer.blocks, 128, 192).to(device)
    told, read = joint.table(teacher.words, data.ids), joint.table(model.words, data.ids)
    # An empty caption's guided velocity is its plain one, whatever the strength.
    strength = torch.full((args.batch,), BAKED, device=device)

    def draw(generator: torch.Generator, progress: float) -> tuple[Tensor, ...]:
        latents, numbers = data.pick(args.batch, generator, drop=0.12)
        time = flow.times((args.batch,), generator)
        inputs, _ = flow.noisy(latents, time[:, None, None, None, None], generator)
        weight = torch.full((), args.hints * (1 - progress), device=device)
        return inputs, time, told[numbers], read[numbers], weight

    def loss(inputs: Tensor, time: Tensor, words: Tensor, own: Tensor, weight: Tensor) -> Tensor:
        target = joint.guided(teacher, inputs, time, words, told[-1], strength)
        errors = (model.velocity(inputs, time, own).float() - target).square().mean((1, 2, 3, 4))
        return joint.evened(errors, time) + weight * hints()

    def held() -> float:
        latents, ids, _ = data.held(64)
        return flow.held_loss(lambda noisy, time: average(noisy, time, ids), latents)

    loop.fit(model, average, blocks, loss, held, args, draw, hints.parameters())


def assemble(weights: Path) -> CogVideoXPipeline:
    """Build the stock pipeline from a checkpoint."""
    tokenizer = build_tokenizer()
    denoiser = Denoiser(len(tokenizer))
    loop.load(denoiser, weights)
    return CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=denoiser.text_encoder,
        vae=autoencoder(),
        transformer=denoiser.transformer,
        scheduler=build_scheduler(),
    )


if __name__ == "__main__":
    main()
