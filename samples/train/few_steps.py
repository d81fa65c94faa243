"""Teaches wan-causal-tiny to draw a chunk in a few steps, without guidance.

    python -m samples.train.few_steps --latents build/latents --start build/causal --out build/few --minutes 4

Consistency distillation with guidance inside (Luo et al., "Latent consistency models", 2023, section 4): a frozen
teacher, the model that `causal` trained, takes one small guided step from noise level s to s'; the student must predict
the same clean clip from both, where the prediction from s' is that of its own running average. Chunks, window and
history are those of `causal`. A clean clip is x - s v, so the student samples as Self-Forcing does: predict, add fresh
noise of the next level, predict again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from samples.train import causal, flow, loop
from samples.train.causal import CausalDenoiser
from samples.train.data import Latents
from samples.train.parts import FLOW_SHIFT, build_tokenizer

LEVELS = 32
"""Small steps of the teacher from noise to clip."""
TEXT = 64
"""Text slots, as in the pipeline's settings; the pads are zeros that nothing masks."""


def main(words: list[str] | None = None) -> None:
    """Distil until the budget is spent."""
    parser = loop.arguments(__doc__, "build/few")
    parser.set_defaults(batch=16, rate=2e-4, matrix_rate=1e-3, ema=0.99, warmup=50)
    parser.add_argument("--start", type=Path, default=Path("build/causal"), help="folder that `causal` wrote")
    parser.add_argument("--guidance", type=float, default=3.0)
    distil(parser.parse_args(words))


def distil(args: argparse.Namespace) -> None:
    """Distil until the budget is spent."""
    device = loop.prepare(args.seed)
    data = Latents(args.latents, build_tokenizer(), device, held=args.held, frames=causal.FRAMES)
    teacher, model = causal.untrained().to(device).requires_grad_(False), causal.untrained().to(device)
    loop.load(teacher, args.start / "ema.safetensors")
    loop.load(model, args.start / "ema.safetensors")
    average = loop.resume(model, args.out)
    for each in (teacher, model, average):
        loop.compile_blocks(each.transformer.blocks, args.eager)

    def loss(generator: torch.Generator, progress: float) -> Tensor:
        latents, ids, mask = data.batch(args.batch, generator, drop=0)
        text = padded(teacher, ids, mask)
        nothing = padded(teacher, data.empty[None], (data.empty != data.pad).float()[None]).expand_as(text)
        return consistency_loss(model, average, teacher, latents, text, nothing, args.guidance, generator)

    def held() -> float:
        # Not the loss of the training: that of flow matching at full noise, where a few steps begin.
        latents, ids, mask = data.held(args.batch)
        generator = torch.Generator(device).manual_seed(1)
        noise = torch.randn(latents.shape, generator=generator, device=device)
        levels = torch.ones(len(latents), latents.shape[2] // causal.CHUNK, device=device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=latents.is_cuda):
            velocity = average.both(latents, noise, (levels * 0, levels), padded(teacher, ids, mask))
        return float((velocity - (noise - latents)).square().mean())

    loop.fit(model, average, model.transformer.blocks, loss, held, args)


@torch.no_grad()
def padded(model: CausalDenoiser, ids: Tensor, mask: Tensor) -> Tensor:
    """Return text states (b, TEXT, channels) as the pipeline pads them."""
    words = model.words(ids, mask)
    return F.pad(words, (0, 0, 0, TEXT - words.shape[1]))


def consistency_loss(
    model: CausalDenoiser,
    average: CausalDenoiser,
    teacher: CausalDenoiser,
    latents: Tensor,
    text: Tensor,
    nothing: Tensor,
    guidance: float,
    generator: torch.Generator,
) -> Tensor:
    """Return how far the student's clean clip is from its average's one small step later, as a velocity.

    Args:
        model: The student.
        average: Its running average.
        teacher: Takes the small step, guided.
        latents: Clean clips, (b, c, f, h, w).
        text: Text states, (b, slots, channels).
        nothing: Those of no text, shaped alike.
        guidance: Strength of the teacher's guidance.
        generator: Of noise and levels.
    """
    shape = len(latents), latents.shape[2] // causal.CHUNK
    places = torch.randint(1, LEVELS + 1, shape, generator=generator, device=latents.device) / LEVELS
    level, after = (flow.shifted(place, FLOW_SHIFT) for place in (places, places - 1 / LEVELS))
    past = causal.history_levels(*shape, generator)
    history, _ = flow.noisy(latents, causal.frames_of(past), generator)
    noisy, _ = flow.noisy(latents, causal.frames_of(level), generator)
    wide, narrow = causal.frames_of(level), causal.frames_of(after)
    with torch.no_grad():
        worded = teacher.both(history, noisy, (past, level), text).float()
        wordless = teacher.both(history, noisy, (past, level), nothing).float()
        step = noisy + (narrow - wide) * (wordless + guidance * (worded - wordless))
        clean = step - narrow * average.both(history, step, (past, after), text).float()
        target = (noisy - clean) / wide
    return (model.both(history, noisy, (past, level), text).float() - target).square().mean()


if __name__ == "__main__":
    main()
