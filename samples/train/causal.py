"""Trains wan-causal-tiny: wan-tiny's transformer, one layer shorter, made to go on from what it has drawn.

    python -m samples.train.causal --latents build/latents --out build/causal --minutes 9
    python -m samples.train.causal --out build/causal --export samples/models/wan-causal-tiny

Teacher forcing: a clip goes in twice, clean and noisy, with the same positions. A chunk of three latent frames sees
itself and the clean chunks before it, as far back as the window reaches; each chunk has a noise level of its own. So
one pass trains all of them, on exactly what a key-value cache holds when the model generates (Zhou et al., "MAGI",
2025; a level for each chunk as in Chen et al., "Diffusion forcing", 2024). What the model drew is never as clean as
what it was taught on, so half of the clips have a little noise on their history, and the model is told how much.
Autoencoder, words and text encoder stay those of wan-tiny.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import UMT5EncoderModel

from samples.models import path
from samples.train import flow, loop
from samples.train.data import Latents
from samples.train.padding import SLOTS, padding_bias
from samples.train.parts import FLOW_SHIFT, build_tokenizer, count
from samples.train.train_transformer import Denoiser, text_lengths

log = loop.get_logger("causal")
CHUNK = 3
"""Latent frames that are drawn together."""
WINDOW = 12
"""Latent frames that a chunk sees, its own among them."""
FRAMES = 18
"""Latent frames of a clip: six chunks, of which the last three see a full window."""
HISTORY_NOISE = 0.2
SETTINGS = {
    "height": 256,
    "width": 256,
    "num_frames": 241,
    "fps": 16,
    "guidance_scale": 1.0,
    "max_sequence_length": 64,
}
ROLLOUT = {
    "chunk": CHUNK,
    "window": WINDOW,
    "sink": 0,
    "steps": (1000, 800, 600, 400, 200),
    "shift": FLOW_SHIFT,
    "context_noise": 0.0,
}
"""As `vidaccel.streaming.Rollout` takes it; positions are absolute, as rotary logits depend on distances alone."""


class CausalDenoiser(Denoiser):
    """wan-tiny's denoiser on a clip and its noisy twin."""

    def __init__(self, vocabulary: int, layers: int) -> None:
        super().__init__(vocabulary, layers=layers)
        self.text_encoder.requires_grad_(False)
        self.transformer.rope = TwiceRope(self.transformer.rope)
        stock = self.transformer.attn_processors
        self.transformer.set_attn_processor(
            {name: ChunkProcessor() if ".attn1." in name else stock[name] for name in stock}
        )

    def both(self, clean: Tensor, noisy: Tensor, levels: tuple[Tensor, Tensor], words: Tensor) -> Tensor:
        """Return the velocity of the noisy clip.

        Args:
            clean: The history, (b, c, f, h, w), with or without a little noise.
            noisy: The clip to denoise, shaped alike.
            levels: Noise of either, (b, chunks) in [0, 1].
            words: Text states, (b, slots, channels).
        """
        tokens = CHUNK * clean.shape[3] * clean.shape[4]
        time = torch.cat(levels, 1).mul(1000).repeat_interleave(tokens, 1)
        inputs = torch.cat((clean, noisy), 2)
        return self.transformer(inputs, time, words, return_dict=False)[0][:, :, clean.shape[2] :]


class TwiceRope(nn.Module):
    """Rotary positions of a clip that comes twice: those of the first half, two times over."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, each (1, l, 1, d)."""
        cosines, sines = self.inner(hidden_states[:, :, : hidden_states.shape[2] // 2])
        return torch.cat((cosines, cosines), 1), torch.cat((sines, sines), 1)


class ChunkProcessor:
    """Self-attention of [clean | noisy]: a chunk sees itself and the clean chunks before it, within the window."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, chunks: int = FRAMES // CHUNK, window: int = WINDOW // CHUNK) -> None:
        self.chunks = chunks
        self.window = window

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend chunk by chunk; a chunk and its noisy twin see equally many keys and go in one call."""
        assert rotary_emb is not None
        query, key, value = (
            states.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for states in (
                attn.norm_q(attn.to_q(hidden_states)),
                attn.norm_k(attn.to_k(hidden_states)),
                attn.to_v(hidden_states),
            )
        )
        query, key = rotate(query, *rotary_emb).type_as(value), rotate(key, *rotary_emb).type_as(value)
        half = query.shape[2] // 2
        size = half // self.chunks
        outputs: list[list[Tensor]] = [[], []]
        for start in range(0, half, size):
            end, low = start + size, max(0, start + size - size * self.window)
            queries = torch.cat((query[:, :, start:end], query[:, :, half + start : half + end]))
            keys, values = (
                torch.cat((x[:, :, low:end], torch.cat((x[:, :, low:start], x[:, :, half + start : half + end]), 2)))
                for x in (key, value)
            )
            parts = F.scaled_dot_product_attention(queries, keys, values).chunk(2)
            outputs[0].append(parts[0])
            outputs[1].append(parts[1])
        mixed = torch.cat(outputs[0] + outputs[1], 2)
        return attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2)))


def rotate(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn pairs of neighbouring channels of (b, heads, l, d) by the angles of their places, (1, l, 1, d)."""
    real, imaginary = states.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = cosines.transpose(1, 2)[..., 0::2], sines.transpose(1, 2)[..., 1::2]
    return torch.stack((real * cosine - imaginary * sine, real * sine + imaginary * cosine), -1).flatten(-2)


def main(words: list[str] | None = None) -> None:
    """Train until the budget is spent, or export what was trained."""
    parser = loop.arguments(__doc__, "build/causal")
    parser.set_defaults(batch=16, rate=5e-4, matrix_rate=2e-3)
    parser.add_argument("--drop", type=int, help="layer of wan-tiny to leave out; else the one missed least")
    parser.add_argument("--export", type=Path, help="write the transformer to this folder and stop")
    args = parser.parse_args(words)
    if args.export:
        export(args.out / "ema.safetensors", args.export)
    else:
        train(args)


def train(args: argparse.Namespace) -> None:
    """Train until the budget is spent."""
    device = loop.prepare(args.seed)
    tokenizer = build_tokenizer()
    data = Latents(args.latents, tokenizer, device, held=args.held, frames=FRAMES)
    model = (untrained() if (args.out / "model.safetensors").exists() else start(data, args.drop, device)).to(device)
    average = loop.resume(model, args.out)
    bias = torch.zeros(args.batch, 1, 1, SLOTS, device=device)
    model.pretend(bias)
    blocks = model.transformer.blocks
    loop.compile_blocks(blocks, args.eager)

    def loss(generator: torch.Generator, progress: float) -> Tensor:
        latents, ids, mask = data.batch(args.batch, generator, drop=0.12)
        bias.copy_(padding_bias(mask, text_lengths(args.batch, generator)))
        return forcing_loss(model, latents, ids, mask, generator)

    def held() -> float:
        return held_loss(average, data, 16)

    loop.fit(model, average, blocks, loss, held, args)


def forcing_loss(
    model: CausalDenoiser, latents: Tensor, ids: Tensor, mask: Tensor, generator: torch.Generator
) -> Tensor:
    """Return the mean squared error of the velocity of every chunk, each at its own level."""
    history, levels, noisy, target = draw(latents, generator)
    return (model.both(history, noisy, levels, model.words(ids, mask)).float() - target).square().mean()


def draw(latents: Tensor, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
    """Return history, levels of history and clip, the noisy clip and its velocity."""
    batch, chunks = len(latents), latents.shape[2] // CHUNK
    own = flow.times((batch, chunks), generator)
    past = history_levels(batch, chunks, generator)
    history, _ = flow.noisy(latents, frames_of(past), generator)
    noisy, target = flow.noisy(latents, frames_of(own), generator)
    return history, (past, own), noisy, target


def history_levels(batch: int, chunks: int, generator: torch.Generator) -> Tensor:
    """Draw the noise of the history, (b, chunks): none for half of the clips, a little for the others."""
    few = torch.rand(batch, 2, generator=generator, device=generator.device)
    return torch.where(few[:, :1] < 0.5, 0.0, HISTORY_NOISE * few[:, 1:]).expand(-1, chunks)


def frames_of(levels: Tensor) -> Tensor:
    """Spread levels (b, chunks) over latents, (b, 1, f, 1, 1)."""
    return levels.repeat_interleave(CHUNK, 1)[:, None, :, None, None]


@torch.no_grad()
def held_loss(model: CausalDenoiser, data: Latents, clips: int) -> float:
    """Return the loss of held clips, with the same noise and levels at each call."""
    latents, ids, mask = data.held(clips)
    generator = torch.Generator(latents.device).manual_seed(1)
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=latents.is_cuda):
        return float(forcing_loss(model, latents, ids, mask, generator))


def start(data: Latents, drop: int | None, device: torch.device) -> CausalDenoiser:
    """Return a model with wan-tiny's weights, without the layer whose absence costs the least, or without `drop`."""
    transformer = WanTransformer3DModel.from_pretrained(path("wan-tiny") / "transformer", dtype=torch.float32)
    encoder = UMT5EncoderModel.from_pretrained(path("wan-tiny") / "text_encoder", dtype=torch.float32)
    layers = transformer.config.num_layers
    whole = CausalDenoiser(encoder.config.vocab_size, layers)
    whole.transformer.load_state_dict(transformer.state_dict(), strict=False)
    whole.text_encoder.load_state_dict(encoder.state_dict())
    whole.to(device)
    if drop is None:
        losses = [held_loss(without(whole, layer), data, 16) for layer in range(layers)]
        drop = min(range(layers), key=losses.__getitem__)
        log.info("loss without each layer of wan-tiny: %s", [round(loss, 4) for loss in losses])
    log.info("left out: layer %d", drop)
    return without(whole, drop)


def without(whole: CausalDenoiser, layer: int) -> CausalDenoiser:
    """Return a copy of the model that lacks one layer."""
    kept = [block for number, block in enumerate(whole.transformer.blocks) if number != layer]
    short = CausalDenoiser(whole.text_encoder.config.vocab_size, len(kept))
    short.text_encoder.load_state_dict(whole.text_encoder.state_dict())
    state = {k: v for k, v in whole.transformer.state_dict().items() if not k.startswith("blocks.")}
    for number, block in enumerate(kept):
        state |= {f"blocks.{number}.{key}": value for key, value in block.state_dict().items()}
    short.transformer.load_state_dict(state)
    return short.to(next(whole.parameters()).device)


def untrained() -> CausalDenoiser:
    """Return a model of the shape that `start` makes, without its weights."""
    encoder = json.loads((path("wan-tiny") / "text_encoder" / "config.json").read_text())
    layers = json.loads((path("wan-tiny") / "transformer" / "config.json").read_text())["num_layers"] - 1
    return CausalDenoiser(encoder["vocab_size"], layers)


def export(weights: Path, folder: Path) -> None:
    """Write the transformer in bf16 as a stock one, how it rolls out, and the settings that suit it.

    Without a `model_index.json` it shares all other parts with wan-tiny; see `vidaccel.render.stream.open_stream`.
    """
    model = untrained()
    loop.load(model, weights)
    layers = len(model.transformer.blocks)
    plain = Denoiser(model.text_encoder.config.vocab_size, layers=layers).transformer
    plain.load_state_dict({k: v for k, v in model.transformer.state_dict().items() if "rope" not in k}, strict=False)
    plain.to(torch.bfloat16).save_pretrained(folder / "transformer")
    (folder / "defaults.json").write_text(json.dumps(SETTINGS, indent=2) + "\n")
    (folder / "rollout.json").write_text(json.dumps(ROLLOUT, indent=2) + "\n")
    (folder / "LICENSE-DATA").write_text((path("wan-tiny") / "LICENSE-DATA").read_text())
    log.info("%s: %d parameters", folder, count(plain))


if __name__ == "__main__":
    main()
