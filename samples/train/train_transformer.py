"""Trains the transformer and its text encoder on encoded clips, by flow matching.

    python -m samples.train.train_transformer --latents build/latents --out build/wan --minutes 9

Each step draws latents x, noise e and a time s in [0, 1], and asks for the velocity e - x at (1 - s) x + s e. Captions
come in full or with parts unsaid, and are dropped at times, which makes guidance possible. Matrices inside the blocks
are trained by Muon, all else by AdamW. A checkpoint is written every minute; starting again goes on from it.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from samples.train.budget import Budget, get_logger
from samples.train.data import Latents
from samples.train.muon import Muon
from samples.train.padding import SLOTS, PaddedTextProcessor, padding_bias
from samples.train.parts import FLOW_SHIFT, build_text_encoder, build_tokenizer, build_transformer, count

log = get_logger("transformer")


class Denoiser(nn.Module):
    """Text encoder and transformer as one module: caption and noisy latents in, velocity out."""

    def __init__(self, vocabulary: int, heads: int = 3, layers: int = 6, ffn: int = 384) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(vocabulary)
        self.transformer = build_transformer(heads, layers, ffn)

    def forward(self, latents: Tensor, time: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the velocity, shaped as `latents` (b, c, f, h, w); `time` (b,) runs from 0 to 1000."""
        hidden = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.transformer(latents, time, hidden * mask[..., None], return_dict=False)[0]

    def pretend(self, bias: Tensor) -> None:
        """Make cross-attention weigh the pads by `bias`, a tensor to be rewritten before each step."""
        processor = PaddedTextProcessor(bias)
        processors = self.transformer.attn_processors
        self.transformer.set_attn_processor(
            {name: processor if ".attn2." in name else old for name, old in processors.items()}
        )


def main() -> None:
    """Train until the budget is spent."""
    args = _arguments()
    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    device = accelerator.device
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = build_tokenizer()
    data = Latents(args.latents, tokenizer, device, held=args.held)
    budget = Budget(args.minutes, args.steps)

    model = Denoiser(len(tokenizer), layers=args.layers).to(device)
    if (args.out / "model.safetensors").exists():
        model.load_state_dict(load_file(args.out / "model.safetensors"), strict=False)
        log.info("resumed from %s", args.out)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    if (args.out / "ema.safetensors").exists():
        average.load_state_dict(load_file(args.out / "ema.safetensors"), strict=False)
    bias = torch.zeros(args.batch, 1, 1, SLOTS, device=device)
    model.pretend(bias)
    matrices = [p for name, p in model.transformer.blocks.named_parameters() if p.ndim == 2 and "table" not in name]
    chosen = {id(p) for p in matrices} if args.optimizer == "muon" else set()
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=args.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=device.type == "cuda")
    ]
    optimizers += [Muon(matrices, lr=args.matrix_rate)] if chosen else []
    if (args.out / "optimizer.pt").exists():
        states = torch.load(args.out / "optimizer.pt", weights_only=True, map_location=device)
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(state)
    if device.type == "cuda" and not args.eager:
        model.transformer.compile_repeated_blocks(fullgraph=True)
    log.info("%d parameters, %d clips", count(model), len(data))
    trained = accelerator.prepare(model)

    generator = torch.Generator(device).manual_seed(args.seed + accelerator.process_index)
    number, saved, total = 0, 0.0, torch.zeros((), device=device)
    pairs = [(e, p) for e, p in zip(average.parameters(), model.parameters(), strict=True)]
    while budget.progress(number) < 1:
        for optimizer, rate in zip(optimizers, (args.rate, args.matrix_rate), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = rate * budget.rate(number, args.warmup)
        latents, ids, mask = data.batch(args.batch, generator, drop=0.12)
        bias.copy_(padding_bias(mask, text_lengths(args.batch, generator)))
        loss = flow_loss(trained, latents, ids, mask, generator)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(args.ema, (1 + number) / (10 + number))
        with torch.no_grad():
            torch._foreach_lerp_([e for e, _ in pairs], [p for _, p in pairs], 1 - decay)
        total += loss.detach()
        number += 1
        if number % args.log_every == 0:
            held = validate(average, data)
            log.info(
                "step %d, %.0f s: loss %.4f held-out %.4f", number, budget.elapsed, total.item() / args.log_every, held
            )
            total.zero_()
            if accelerator.is_main_process and budget.elapsed - saved > args.save_every:
                saved = budget.elapsed
                save(args.out, model, average, optimizers)
    if accelerator.is_main_process:
        save(args.out, model, average, optimizers)
        report = {"steps": number, "seconds": round(budget.elapsed), "batch": args.batch, "seed": args.seed}
        report |= {"held_out_loss": validate(average, data), "parameters": count(model), "clips": len(data)}
        (args.out / "training.json").write_text(json.dumps(report, indent=1))
        log.info("finished: %s", report)


def flow_loss(model: nn.Module, latents: Tensor, ids: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Return the mean squared error of the velocity at random times, spread evenly over the batch."""
    batch = len(latents)
    spread = torch.randperm(batch, generator=generator, device=latents.device)
    even = (spread + torch.rand(batch, generator=generator, device=latents.device)) / batch
    # Later steps of the sampler are few: its shift moves training towards noise in the same way.
    share = FLOW_SHIFT * even / (1 + (FLOW_SHIFT - 1) * even)
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    s = share[:, None, None, None, None]
    velocity = model(latents * (1 - s) + noise * s, share * 1000, ids, mask)
    return (velocity.float() - (noise - latents)).square().mean()


def text_lengths(batch: int, generator: torch.Generator) -> Tensor:
    """Draw padded text lengths: 64 half the time, 512 a quarter, else anything from 48 up."""
    device = generator.device
    any_length = torch.randint(48, 513, (batch,), generator=generator, device=device)
    pick = torch.rand(batch, generator=generator, device=device)
    return torch.where(pick < 0.5, 64, torch.where(pick < 0.75, 512, any_length))


@torch.no_grad()
def validate(average: Denoiser, data: Latents, clips: int = 64) -> float:
    """Return the loss on held clips, with the same noise each time; pads count as they are."""
    latents, ids, mask = data.held(clips)
    generator = torch.Generator(latents.device).manual_seed(1)
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=latents.is_cuda):
        return float(flow_loss(average, latents, ids, mask, generator))


def save(out: Path, model: Denoiser, average: Denoiser, optimizers: list[torch.optim.Optimizer]) -> None:
    """Write weights, averaged weights and optimizer state, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    for name, module in (("model", model), ("ema", average)):
        weights = {
            key.replace("_orig_mod.", ""): value.detach().float().cpu().contiguous()
            for key, value in module.named_parameters()
        }
        save_file(weights, out / f"{name}.safetensors.new")
        (out / f"{name}.safetensors.new").replace(out / f"{name}.safetensors")
    torch.save([optimizer.state_dict() for optimizer in optimizers], out / "optimizer.pt.new")
    (out / "optimizer.pt.new").replace(out / "optimizer.pt")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=Path, default=Path("build/latents"))
    parser.add_argument("--out", type=Path, default=Path("build/wan"))
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=2e-3, help="of AdamW")
    parser.add_argument("--matrix-rate", type=float, default=6e-3, help="of Muon")
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--held", type=int, default=128, help="clips kept for the held-out loss")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--save-every", type=float, default=60, help="seconds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
