"""The training loop that all transformers share: Muon and AdamW, an average of the weights, checkpoints, a log.

A model says what its loss is; the loop says when to stop, how fast to learn and what to write. Starting again with the
same folder goes on from its checkpoint. Where batches are drawn apart from their loss, nothing in a step is random, and
steps are replayed as a CUDA graph.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from samples.train.budget import Budget, get_logger
from samples.train.graph import capture
from samples.train.muon import Muon
from samples.train.parts import count

log = get_logger("train")
Loss = Callable[..., Tensor]
"""Returns the loss of what a `Draw` drew; without one, draws a batch itself: it is given the generator and how much of
the budget is spent, in [0, 1]."""
Draw = Callable[[torch.Generator, float], tuple[Tensor, ...]]
"""Draws all that changes from step to step, given the same two; always the same shapes."""


def arguments(doc: str | None, out: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every training has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=Path, default=Path("build/latents"), help="folder that `encode` wrote")
    parser.add_argument("--out", type=Path, default=Path(out), help="checkpoints and log")
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=2e-3, help="of AdamW")
    parser.add_argument("--matrix-rate", type=float, default=6e-3, help="of Muon; 0 gives all weights to AdamW")
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--held", type=int, default=128, help="clips kept for the held-out loss")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--save-every", type=float, default=60, help="seconds")
    return parser


def prepare(seed: int) -> torch.device:
    """Seed torch, allow TF32, and return the device to train on."""
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resume(model: nn.Module, out: Path) -> nn.Module:
    """Load the checkpoint of `out` into `model`, where there is one, and return the average of its weights."""
    if (out / "model.safetensors").exists():
        load(model, out / "model.safetensors")
        log.info("resumed from %s", out)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    if (out / "ema.safetensors").exists():
        load(average, out / "ema.safetensors")
    return average


def load(model: nn.Module, file: Path) -> None:
    """Load weights that `save` wrote.

    Raises:
        ValueError: the file does not fit the model; tied copies alone may be missing from it.
    """
    missing, unexpected = model.load_state_dict(load_file(file), strict=False)
    names = {name for name, _ in model.named_parameters()}
    if unexpected or names & set(missing):
        raise ValueError(f"{file} does not fit the model: missing {missing}, unexpected {unexpected}")


def compile_blocks(blocks: Iterable[nn.Module], eager: bool) -> None:
    """Compile each block on a GPU; equal blocks share one graph, each shape has its own."""
    if torch.cuda.is_available() and not eager:
        for block in blocks:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)


def fit(
    model: nn.Module,
    average: nn.Module,
    blocks: Iterable[nn.Module],
    loss: Loss,
    held: Callable[[], float],
    args: argparse.Namespace,
    draw: Draw | None = None,
    helpers: Iterable[nn.Parameter] = (),
) -> None:
    """Train until the budget is spent, and write weights, average, optimizer state and `training.json` to `args.out`.

    Args:
        model: What is trained.
        average: Its running average, which is exported.
        blocks: The transformer's blocks: their matrices go to Muon, all else to AdamW.
        loss: Draws a batch; see `Loss`.
        held: The average's loss on clips that are never drawn.
        args: From `arguments`.
        draw: Draws for `loss`.
        helpers: Parameters that are trained along and thrown away.
    """
    device = next(model.parameters()).device
    budget = Budget(args.minutes, args.steps)
    optimizers, rates = _optimizers(model, blocks, helpers, args, device)
    if (args.out / "optimizer.pt").exists():
        states = torch.load(args.out / "optimizer.pt", weights_only=True, map_location=device)
        for optimizer, state in zip(optimizers, states, strict=True):
            given = [group["lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(state)
            for group, lr in zip(optimizer.param_groups, given, strict=True):
                group["lr"] = lr
    log.info("%d parameters on %s", count(model), device)

    generator = torch.Generator(device).manual_seed(args.seed)
    number, saved, total = 0, 0.0, torch.zeros((), device=device)
    pairs = [(e, p) for e, p in zip(average.parameters(), model.parameters(), strict=True) if p.requires_grad]
    value = torch.zeros((), device=device)
    drawn: tuple[Any, ...] = draw(generator, 0.0) if draw else ()

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        # Casts that are kept for later would be missing from a replay.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            found = loss(*drawn)
        found.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        value.copy_(found.detach())

    run = capture(step) if draw and device.type == "cuda" and not args.eager else step
    while (progress := budget.progress(number)) < 1:
        for optimizer, rate in zip(optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"].fill_(rate * budget.rate(number, args.warmup))
        if draw:
            for place, fresh in zip(drawn, draw(generator, progress), strict=True):
                place.copy_(fresh)
        else:
            drawn = (generator, progress)
        run()
        decay = min(args.ema, (1 + number) / (10 + number))
        with torch.no_grad():
            torch._foreach_lerp_([e for e, _ in pairs], [p for _, p in pairs], 1 - decay)
        total += value
        number += 1
        if number % args.log_every == 0:
            mean = total.item() / args.log_every
            log.info("step %d, %.0f s: loss %.4f held-out %.4f", number, budget.elapsed, mean, held())
            total.zero_()
            if budget.elapsed - saved > args.save_every:
                saved = budget.elapsed
                save(args.out, model, average, optimizers)
    save(args.out, model, average, optimizers)
    report = {"steps": number, "seconds": round(budget.elapsed), "batch": args.batch, "seed": args.seed}
    report |= {"held_out_loss": held(), "parameters": count(model)}
    report["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    log.info("finished: %s", report)


def _optimizers(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    helpers: Iterable[nn.Parameter],
    args: argparse.Namespace,
    device: torch.device,
) -> tuple[list[torch.optim.Optimizer], list[float]]:
    # Modulation is a table or a projection of the time embedding: it sets sizes, and orthogonal updates do not suit it.
    matrices = [
        p
        for block in blocks
        for name, p in block.named_parameters()
        if p.ndim == 2 and "table" not in name and "norm" not in name and p.requires_grad and args.matrix_rate
    ]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen] + list(helpers)
    gpu = device.type == "cuda"
    rate = torch.zeros((), device=device)
    adam = torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=gpu, capturable=gpu)
    if not matrices:
        return [adam], [args.rate]
    return [adam, Muon(matrices, lr=rate.clone())], [args.rate, args.matrix_rate]


def save(out: Path, model: nn.Module, average: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
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
