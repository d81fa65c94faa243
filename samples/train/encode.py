"""Encodes captioned clips once, so that the transformer trains on latents.

    python -m samples.train.encode --vae build/vae/vae.safetensors --out build/latents --clips 16000
    python -m samples.train.encode --vae samples/models/wan-tiny/vae --frames 69 --clips 8000   # for the causal sample

Writes shards of raw latent means with their captions, and `stats.json` with the mean and standard deviation of each
channel: those in the config of a finished autoencoder, else measured on the first shard, to become the config's. Shards
that exist are kept, so a stopped run goes on where it was; `--part 0/2` and `--part 1/2` split the shards over two
processes.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from samples.models import world
from samples.train import stream
from samples.train.budget import get_logger
from samples.train.clips import render
from samples.train.parts import build_vae
from samples.train.train_vae import last_channels

log = get_logger("encode")


def main() -> None:
    """Encode the shards of this part that are missing."""
    args = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    args.out.mkdir(parents=True, exist_ok=True)
    if args.vae.is_dir():
        vae = AutoencoderKLWan.from_pretrained(args.vae, dtype=torch.float32)
        stats = {"mean": vae.config.latents_mean, "std": vae.config.latents_std}
        (args.out / "stats.json").write_text(json.dumps(stats))
    else:
        vae = build_vae()
        vae.load_state_dict(load_file(args.vae))
    vae = last_channels(vae).to(device).eval()
    part, parts = (int(number) for number in args.part.split("/"))
    start = time.monotonic()
    for shard in range(part, args.clips // args.shard, parts):
        file = args.out / f"latents-{shard:04d}.safetensors"
        if not file.exists():
            encode_shard(vae, file, shard, args.shard, args.frames, args.batch, device)
            log.info("%s after %.0f s", file.name, time.monotonic() - start)
        if time.monotonic() - start > 60 * args.minutes:
            log.info("stopping at the time limit")
            break


@torch.no_grad()
def encode_shard(
    vae: AutoencoderKLWan, file: Path, shard: int, clips: int, frames: int, batch: int, device: torch.device
) -> None:
    """Render and encode one shard; its clips depend on the shard's number alone."""
    rng = random.Random(1000 + shard)
    scenes = [world.draw(rng) for _ in range(clips)]
    # Seeds far from those of the VAE's own pools, and none used twice.
    seeds = [1_000_000_000 + shard * clips + index for index in range(clips)]
    pieces = []
    for first in range(0, clips, batch):
        window = slice(first, first + batch)
        video = render(scenes[window], seeds[window], frames, device).permute(0, 4, 1, 2, 3) * 2 - 1
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            pieces.append(stream.encode(vae, video)[0].to(torch.bfloat16).cpu())
    latents = torch.cat(pieces).contiguous()
    if shard == 0 and not (file.parent / "stats.json").exists():
        values = latents.float()
        stats = {"mean": values.mean(dim=(0, 2, 3, 4)).tolist(), "std": values.std(dim=(0, 2, 3, 4)).tolist()}
        (file.parent / "stats.json").write_text(json.dumps(stats))
    captions = file.with_suffix(".json")
    captions.write_text(json.dumps([captions_of(scene, rng) for scene in scenes]))
    save_file({"latents": latents}, f"{file}.new")
    Path(f"{file}.new").replace(file)


def captions_of(scene: world.Scene, rng: random.Random) -> list[str]:
    """Return four ways to describe a scene: in full, and with parts unsaid."""
    omissions = [{part for part in world.PARTS if rng.random() < share} for share in (0.25, 0.5, 0.75)]
    return [scene.caption(), *(scene.caption(omit) for omit in omissions)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--vae",
        type=Path,
        default=Path("build/vae/vae.safetensors"),
        help="weights written by train_vae, or the folder of a finished autoencoder",
    )
    parser.add_argument("--out", type=Path, default=Path("build/latents"))
    parser.add_argument("--clips", type=int, default=16_000)
    parser.add_argument("--shard", type=int, default=1_000)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--minutes", type=float, default=9)
    return parser.parse_args()


if __name__ == "__main__":
    main()
