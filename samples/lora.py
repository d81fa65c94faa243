"""A LoRA and sparse attention together: `accelerate` may come before or after `load_lora_weights`.

    python samples/lora.py --lora style.safetensors --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --size 480x832x81

vidaccel wraps attention processors and calls the layers' own projections, so whatever peft puts there takes part.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video

import vidaccel

SAMPLE = Path(__file__).parent / "models" / "wan-tiny"


def main(words: list[str] | None = None) -> None:
    """Render one prompt with a LoRA."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", required=True, help="a file, a folder or a hub id")
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--model", default=str(SAMPLE), help="a folder or a hub id; the sample model without it")
    parser.add_argument("--prompt", default="a red circle moves right")
    parser.add_argument("--size", default="256x256x33", help="height x width x frames")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="lora.mp4")
    args = parser.parse_args(words)
    height, width, frames = map(int, args.size.split("x"))
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)

    pipe = WanPipeline.from_pretrained(args.model, dtype=dtype).to(device)
    pipe.load_lora_weights(args.lora, adapter_name="style")
    pipe.set_adapters("style", args.strength)
    with vidaccel.accelerate(pipe, "radial", density=0.35) as run:
        video = pipe(
            args.prompt, height=height, width=width, num_frames=frames, num_inference_steps=args.steps,
            generator=torch.Generator().manual_seed(0),
        ).frames[0]  # fmt: skip
    export_to_video(video, args.output, fps=16)
    print(f"{args.output}; effective density {run.report().summary['effective_density']:.2f}")


if __name__ == "__main__":
    main()
