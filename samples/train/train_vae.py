"""Trains the video autoencoder on rendered clips.

    python -m samples.train.train_vae --out build/vae --minutes 8

The encoder's mean is decoded with a little noise on it, sized by the latents' own spread, instead of a sample: from
scratch, sampling at full width drowns the signal for long. Besides the pixels, the loss compares differences of
neighbouring pixels, in space and in time, which keeps edges and motion sharp. A step is many small launches, so on a
GPU one step is captured as a CUDA graph and replayed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from samples.train import stream
from samples.train.budget import Budget, get_logger
from samples.train.graph import capture
from samples.train.parts import build_vae, count
from samples.train.pool import clip_pool, crops
from samples.train.sheet import contact_sheet

log = get_logger("vae")
NOISE = 0.1
OBJECT_WEIGHT = 4.0


def main() -> None:
    """Train, save `vae.safetensors` every half minute, and end with a score on clips never trained on."""
    args = _arguments()
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = build_vae()
    file = args.out / "vae.safetensors"
    if file.exists():
        vae.load_state_dict(load_file(file))
        log.info("resumed from %s", file)
    vae = last_channels(vae).to(device).train()
    log.info("%d parameters on %s", count(vae), device)
    pool = clip_pool(args.pool, 33, args.seed, device)
    budget = Budget(args.minutes, args.steps)

    rate = torch.tensor(0.0, device=device)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, capturable=device.type == "cuda"
    )
    average = {name: value.detach().clone() for name, value in vae.named_parameters()}
    shape = (args.batch, 3, args.frames, args.crop, args.crop)
    batch = torch.empty(shape, device=device)
    losses = torch.zeros(3, device=device)

    def step() -> None:
        vae.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            parts = losses_of(vae, batch)
        parts.sum().backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        losses.copy_(parts.detach())

    generator = torch.Generator().manual_seed(args.seed)
    crops(pool, batch, generator)
    run = capture(step) if device.type == "cuda" else step
    number, saved = 0, 0.0
    while budget.progress(number) < 1:
        rate.fill_(args.rate * budget.rate(number))
        crops(pool, batch, generator)
        run()
        with torch.no_grad():
            decay = min(0.998, (1 + number) / (10 + number))
            torch._foreach_lerp_(list(average.values()), list(vae.parameters()), 1 - decay)
        number += 1
        if number % args.log_every == 0:
            pixels, edges, spread = losses.tolist()
            log.info("step %d, %.0f s: L1 %.4f edges %.4f latent %.4f", number, budget.elapsed, pixels, edges, spread)
            if budget.elapsed - saved > 30:
                saved = budget.elapsed
                save(average, file)
    save(average, file)
    vae.load_state_dict(average, strict=False)
    finish(vae.eval(), args.out, device, args.check)


def losses_of(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Return the three losses of a batch (b, 3, f, h, w) in [-1, 1]: pixels, edges, latents."""
    mean, variance = (part.float() for part in stream.encode(vae, video))
    width = NOISE * mean.detach().std(dim=(0, 2, 3, 4), keepdim=True)
    decoded = stream.decode(vae, mean + width * torch.randn_like(mean)).float()
    # Objects cover few pixels, and they are what a clip is about.
    chroma = video.amax(1, keepdim=True) - video.amin(1, keepdim=True)
    weight = 1 + OBJECT_WEIGHT * F.max_pool3d((chroma > 0.4).float(), (1, 9, 9), 1, (0, 4, 4))
    pixels = ((decoded - video).abs() * weight).mean()
    edges = torch.stack([((decoded - video).diff(dim=axis).abs() * _part(weight, axis)).mean() for axis in (2, 3, 4)])
    # The written-out variance tells users of `sample()` how much noise the decoder stands.
    written = (variance - 2 * width.clamp(min=1e-3).log()).square().mean()
    return torch.stack((pixels, edges.sum(), 1e-4 * mean.square().mean() + 1e-4 * written))


def _part(weight: Tensor, axis: int) -> Tensor:
    return weight.narrow(axis, 1, weight.shape[axis] - 1)


def last_channels(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Lay convolution weights out channels-last, in which half-precision convolutions are fast."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in vae.parameters():
        if parameter.ndim in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.ndim])
    return vae


def save(weights: dict[str, Tensor], file: Path) -> None:
    """Write a checkpoint, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().contiguous().cpu() for name, value in weights.items()}, f"{file}.new")
    Path(f"{file}.new").replace(file)


@torch.no_grad()
def finish(vae: AutoencoderKLWan, out: Path, device: torch.device, clips: int) -> float:
    """Score 33-frame clips that training never saw, and draw them beside their reconstructions."""
    pool = clip_pool(clips, 33, 10_000_019, device)
    errors, pictures = [], []
    for clip in pool:
        video = clip[None].permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            decoded = vae.decode(vae.encode(video).latent_dist.mean).sample
        errors.append(F.mse_loss(decoded.float() / 2, video / 2))
        if len(pictures) < 12:
            pictures += [video[0].permute(1, 2, 3, 0) / 2 + 0.5, decoded[0].float().permute(1, 2, 3, 0) / 2 + 0.5]
    psnr = float((-10 * torch.stack(errors).log10()).mean())
    contact_sheet(pictures, out / "vae.png")
    log.info("PSNR %.2f dB over %d unseen clips of 33 frames", psnr, len(pool))
    return psnr


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/vae"))
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument(
        "--matrix-rate", type=float, default=5e-3, help="of Muon, for convolutions; 0 gives all to AdamW"
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--frames", type=int, default=17, help="frames a crop, 4 n + 1; under 9, long clips decode badly"
    )
    parser.add_argument("--crop", type=int, default=128, help="side of a crop, in pixels")
    parser.add_argument("--pool", type=int, default=1024, help="clips rendered before training")
    parser.add_argument("--check", type=int, default=16, help="unseen clips of the final score")
    parser.add_argument("--log-every", type=int, default=200)
    return parser.parse_args()


if __name__ == "__main__":
    main()
