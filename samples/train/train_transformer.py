"""Trains the transformer of wan-tiny and its text encoder on encoded clips, by flow matching.

    python -m samples.train.train_transformer --latents build/latents --out build/wan --minutes 9

Each step draws latents x, noise e and a time s in [0, 1], and asks for the velocity e - x at (1 - s) x + s e. Captions
come in full or with parts unsaid, and are dropped at times, which makes guidance possible. Matrices inside the blocks
are trained by Muon, all else by AdamW. A checkpoint is written every minute; starting again goes on from it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from samples.train import loop
from samples.train.data import Latents
from samples.train.flow import flow_loss, held_loss
from samples.train.padding import SLOTS, PaddedTextProcessor, padding_bias
from samples.train.parts import build_text_encoder, build_tokenizer, build_transformer


class Denoiser(nn.Module):
    """Text encoder and transformer as one module: caption and noisy latents in, velocity out."""

    def __init__(self, vocabulary: int, heads: int = 3, layers: int = 6, ffn: int = 384) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(vocabulary)
        self.transformer = build_transformer(heads, layers, ffn)

    def forward(self, latents: Tensor, time: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the velocity, shaped as `latents` (b, c, f, h, w); `time` (b,) runs from 0 to 1000."""
        return self.transformer(latents, time, self.words(ids, mask), return_dict=False)[0]

    def words(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return what the pipeline hands to the transformer: one vector a token, zeros for the pads."""
        return self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]

    def pretend(self, bias: Tensor) -> None:
        """Make cross-attention weigh the pads by `bias`, a tensor to be rewritten before each step."""
        processor = PaddedTextProcessor(bias)
        processors = self.transformer.attn_processors
        self.transformer.set_attn_processor(
            {name: processor if ".attn2." in name else old for name, old in processors.items()}
        )


def main(words: list[str] | None = None) -> None:
    """Train until the budget is spent."""
    parser = loop.arguments(__doc__, "build/wan")
    parser.add_argument("--layers", type=int, default=6)
    args = parser.parse_args(words)
    device = loop.prepare(args.seed)
    tokenizer = build_tokenizer()
    data = Latents(args.latents, tokenizer, device, held=args.held)

    model = Denoiser(len(tokenizer), layers=args.layers).to(device)
    average = loop.resume(model, args.out)
    bias = torch.zeros(args.batch, 1, 1, SLOTS, device=device)
    model.pretend(bias)
    blocks = model.transformer.blocks
    loop.compile_blocks(blocks, args.eager)

    def loss(generator: torch.Generator, progress: float) -> Tensor:
        latents, ids, mask = data.batch(args.batch, generator, drop=0.12)
        bias.copy_(padding_bias(mask, text_lengths(args.batch, generator)))
        return flow_loss(lambda noisy, time: model(noisy, time * 1000, ids, mask), latents, generator)

    def held() -> float:
        # Always the same clips and noise; pads count as they are.
        latents, ids, mask = data.held(64)
        return held_loss(lambda noisy, time: average(noisy, time * 1000, ids, mask), latents)

    loop.fit(model, average, blocks, loss, held, args)


def text_lengths(batch: int, generator: torch.Generator) -> Tensor:
    """Draw padded text lengths: 64 half the time, 512 a quarter, else anything from 48 up."""
    device = generator.device
    any_length = torch.randint(48, 513, (batch,), generator=generator, device=device)
    pick = torch.rand(batch, generator=generator, device=device)
    return torch.where(pick < 0.5, 64, torch.where(pick < 0.75, 512, any_length))


if __name__ == "__main__":
    main()
