"""Puts trained weights together as a diffusers folder, in bf16.

python -m samples.train.export --vae build/vae/vae.safetensors --out samples/models/wan-tiny
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import WanPipeline
from safetensors.torch import load_file

from samples.train.budget import get_logger
from samples.train.parts import build_scheduler, build_tokenizer, build_vae
from samples.train.train_transformer import Denoiser

log = get_logger("export")

DEFAULTS = {
    "height": 256,
    "width": 256,
    "num_frames": 33,
    "fps": 16,
    "num_inference_steps": 20,
    "guidance_scale": 4.0,
    "max_sequence_length": 64,
}
"""The settings that suit the sample model; the pipeline's own are those of the large models."""


def main() -> None:
    """Write the folder and its `defaults.json`."""
    args = _arguments()
    pipe = assemble(args.vae, args.stats, args.weights, args.layers)
    args.out.mkdir(parents=True, exist_ok=True)
    pipe.save_pretrained(args.out, safe_serialization=True)
    (args.out / "defaults.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n")
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    log.info("%s: %.2f MiB", args.out, size / 2**20)


def assemble(vae_file: Path, stats_file: Path, weights: Path, layers: int = 6) -> WanPipeline:
    """Build the pipeline in bf16 from the checkpoints of the two trainings."""
    tokenizer = build_tokenizer()
    vae = build_vae()
    vae.load_state_dict(load_file(vae_file))
    stats = json.loads(stats_file.read_text())
    rounded = {name: [round(value, 5) for value in stats[name]] for name in ("mean", "std")}
    vae.register_to_config(latents_mean=rounded["mean"], latents_std=rounded["std"])
    denoiser = Denoiser(len(tokenizer), layers=layers)
    missing, unexpected = denoiser.load_state_dict(load_file(weights), strict=False)
    if unexpected or [name for name in missing if "embed_tokens" not in name]:
        raise ValueError(f"{weights} does not fit the model: missing {missing}, unexpected {unexpected}")
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=denoiser.text_encoder.eval().to(torch.bfloat16),
        vae=vae.eval().to(torch.bfloat16),
        transformer=denoiser.transformer.eval().to(torch.bfloat16),
        scheduler=build_scheduler(),
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, default=Path("build/vae/vae.safetensors"))
    parser.add_argument("--stats", type=Path, default=Path("build/latents/stats.json"))
    parser.add_argument("--weights", type=Path, default=Path("build/wan/ema.safetensors"))
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("samples/models/wan-tiny"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
