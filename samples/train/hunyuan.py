"""Trains hunyuan-tiny: joint attention over video and text, guidance as an input.

    python -m samples.train.hunyuan --latents build/latents --out build/hunyuan --minutes 8
    python -m samples.train.hunyuan --out build/hunyuan --export samples/models/hunyuan-tiny

Taught by wan-tiny, on its latents. HunyuanVideo takes the strength of guidance as an input and needs one call a step,
so it is asked for the teacher's guided velocity u + g (c - u) at random strengths g, where c and u are the velocities
with and without the caption (Meng et al., "On distillation of guided diffusion models", 2023, 3.1).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Tokenizer, normalizers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, UMT5EncoderModel

from samples.models.shared import autoencoder
from samples.train import flow, joint, loop
from samples.train.data import Latents
from samples.train.hints import Hints
from samples.train.packed import PackedAttention
from samples.train.parts import (
    FLOW_SHIFT,
    LATENT_CHANNELS,
    TEXT_WIDTH,
    build_text_encoder,
    build_tokenizer,
)

INSTRUCTION = "<instruction>"
CROP = int(DEFAULT_PROMPT_TEMPLATE["crop_start"])
"""Tokens of the stock template, which the pipeline cuts off the front of the text."""
UNREAD = 2
"""Last layers of the text encoder that run and that the pipeline does not read."""
STRENGTHS = (1.0, 5.0)
DEFAULTS = {
    "height": 256,
    "width": 256,
    "num_frames": 33,
    "fps": 16,
    "num_inference_steps": 30,
    "guidance_scale": 4.0,
    "max_sequence_length": 64,
}


class Denoiser(nn.Module):
    """Both text encoders and the transformer as one module: caption, strength and noisy latents in, velocity out."""

    def __init__(self, vocabulary: int, dual: int = 3, single: int = 4) -> None:
        super().__init__()
        # The pipeline reads the third hidden state from the end: two layers, and two more that nothing reads.
        self.text_encoder = build_text_encoder(vocabulary, layers=2 + UNREAD)
        joint.copy_text_encoder(self.text_encoder)
        for block in self.text_encoder.encoder.block[-UNREAD:]:
            for parameter in block.parameters():
                nn.init.zeros_(parameter)
        self.text_encoder_2 = build_pooled_encoder(vocabulary).requires_grad_(False)
        self.transformer = build_transformer(dual, single)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks with joint attention."""
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    def forward(self, latents: Tensor, time: Tensor, ids: Tensor, mask: Tensor, strength: Tensor) -> Tensor:
        """Return the velocity, shaped as `latents` (b, c, f, h, w), at times (b,) in [0, 1] and strengths (b,)."""
        return self.velocity(latents, time, self.words(ids), mask, self.summary(ids), strength)

    def summary(self, ids: Tensor) -> Tensor:
        """Return one vector a caption, for the modulation."""
        return self.text_encoder_2(ids).pooler_output

    def words(self, ids: Tensor) -> Tensor:
        """Return what the pipeline hands to the transformer: one vector a token."""
        mask = (ids != 0).long()
        instructions = torch.full((len(ids), CROP), self.text_encoder.config.vocab_size - 1, device=ids.device)
        return self.text_encoder(
            input_ids=torch.cat((instructions, ids), 1),
            attention_mask=torch.cat((torch.ones_like(instructions), mask), 1),
            output_hidden_states=True,
        ).hidden_states[-3][:, CROP:]

    def velocity(
        self, latents: Tensor, time: Tensor, words: Tensor, mask: Tensor, summary: Tensor, strength: Tensor
    ) -> Tensor:
        """Return what `forward` does, of captions already read."""
        return self.transformer(
            latents,
            time * 1000,
            words,
            mask,
            summary,
            guidance=strength * 1000,
            return_dict=False,
        )[0]


def build_transformer(dual: int, single: int) -> HunyuanVideoTransformer3DModel:
    """Build the transformer: two heads of 64, one token a latent place."""
    return HunyuanVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=2,
        attention_head_dim=64,
        num_layers=dual,
        num_single_layers=single,
        num_refiner_layers=1,
        mlp_ratio=3.0,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        rope_axes_dim=(16, 24, 24),
    )


def build_pooled_encoder(vocabulary: int) -> CLIPTextModel:
    """Build the encoder whose state at the last word goes to the modulation."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=TEXT_WIDTH,
            intermediate_size=128,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=77,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        )
    )


def build_template_tokenizer() -> PreTrainedTokenizerFast:
    """Build wan-tiny's tokenizer with one word more, which stands for a token of the stock pipeline's instructions.

    The pipeline wraps each prompt in instructions for a language model and cuts off as many tokens as Llama's tokenizer
    makes of them. This tokenizer makes as many, so the stock pipeline's defaults work.
    """
    before, after = str(DEFAULT_PROMPT_TEMPLATE["template"]).split("{}")
    backend = Tokenizer.from_str(build_tokenizer(INSTRUCTION).backend_tokenizer.to_str())
    backend.normalizer = normalizers.Sequence(
        [normalizers.Replace(before, f"{INSTRUCTION} " * CROP), normalizers.Replace(after, "")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=512,
    )


def main(words: list[str] | None = None) -> None:
    """Train until the budget is spent, or export what was trained."""
    parser = joint.arguments(__doc__, "build/hunyuan")
    parser.add_argument("--packed", action="store_true", help="attend without a mask, on a GPU; see packed.py")
    args = parser.parse_args(words)
    if args.export:
        joint.write(assemble(args.out / "ema.safetensors"), args.export, DEFAULTS, UNREAD)
    else:
        train(args)


def train(args: argparse.Namespace) -> None:
    """Train until the budget is spent."""
    device = loop.prepare(args.seed)
    tokenizer = build_tokenizer(INSTRUCTION)
    data = Latents(args.latents, tokenizer, device, held=args.held)
    model = Denoiser(len(tokenizer)).to(device)
    average = loop.resume(model, args.out)
    teacher = joint.Teacher().to(device)
    if args.packed:
        for block in model.blocks:
            block.attn.set_processor(PackedAttention())
    loop.compile_blocks([*model.blocks, *teacher.transformer.blocks], args.eager)
    hints = Hints(model.blocks, teacher.transformer.blocks, 128, 192).to(device)
    told, read = joint.table(teacher.words, data.ids), joint.table(model.words, data.ids)
    summaries, masks = joint.table(model.summary, data.ids), (data.ids != data.pad).float()

    def draw(generator: torch.Generator, progress: float) -> tuple[Tensor, ...]:
        latents, numbers = data.pick(args.batch, generator, drop=0.0)
        time = flow.times((args.batch,), generator)
        low, high = STRENGTHS
        strength = low + (high - low) * torch.rand(args.batch, generator=generator, device=device)
        inputs, _ = flow.noisy(latents, time[:, None, None, None, None], generator)
        weight = torch.full((), args.hints * (1 - progress), device=device)
        return inputs, time, told[numbers], strength, read[numbers], masks[numbers], summaries[numbers], weight

    def loss(*drawn: Tensor) -> Tensor:
        inputs, time, words, strength, own, mask, summary, weight = drawn
        target = joint.guided(teacher, inputs, time, words, told[-1], strength)
        # Errors grow with the strength; weighed evenly, the strongest would drown all others.
        found = model.velocity(inputs, time, own, mask, summary, strength).float()
        errors = (found - target).square().mean((1, 2, 3, 4))
        return joint.evened(errors / strength, time) + weight * hints()

    def held() -> float:
        latents, ids, mask = data.held(64)
        ones = torch.ones(len(ids), device=device)
        return flow.held_loss(lambda noisy, time: average(noisy, time, ids, mask, ones), latents)

    loop.fit(model, average, model.blocks, loss, held, args, draw, hints.parameters())


def assemble(weights: Path) -> HunyuanVideoPipeline:
    """Build the stock pipeline from a checkpoint."""
    tokenizer = build_template_tokenizer()
    denoiser = Denoiser(len(tokenizer))
    loop.load(denoiser, weights)
    text_encoder: UMT5EncoderModel = denoiser.text_encoder
    return HunyuanVideoPipeline(
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=denoiser.transformer,
        vae=autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
        text_encoder_2=denoiser.text_encoder_2,
        tokenizer_2=build_tokenizer(),
    )


if __name__ == "__main__":
    main()
