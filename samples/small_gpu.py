"""A large model on a small GPU: weights wait in main memory, and come layer by layer.

    python samples/small_gpu.py --model Wan-AI/Wan2.1-T2V-14B-Diffusers --size 480x832x81

diffusers moves the weights, vidaccel the attention: neither knows of the other. With `use_stream` the next layer's
weights come while this one computes, which sparse attention leaves less time for: look at the report before you trust a
speed-up. Before a long run, `vidaccel estimate -m wan2.1-14b -a radial -d 0.35` tells what it needs.
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
    """Render one prompt with weights in main memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SAMPLE), help="a folder or a hub id; the sample model without it")
    parser.add_argument("--prompt", default="a red circle moves right")
    parser.add_argument("--size", default="256x256x33", help="height x width x frames")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="small_gpu.mp4")
    args = parser.parse_args(words)
    height, width, frames = map(int, args.size.split("x"))
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)

    pipe = WanPipeline.from_pretrained(args.model, dtype=dtype)
    pipe.enable_group_offload(
        onload_device=torch.device(device), offload_type="leaf_level", use_stream=device == "cuda"
    )
    pipe.vae.enable_tiling()
    with vidaccel.accelerate(pipe, "radial", density=0.35) as run:
        video = pipe(
            args.prompt, height=height, width=width, num_frames=frames, num_inference_steps=args.steps,
            generator=torch.Generator().manual_seed(0),
        ).frames[0]  # fmt: skip
    export_to_video(video, args.output, fps=16)
    print(f"{args.output}; report: {run.report().save(Path(args.output).with_suffix(''))}")


if __name__ == "__main__":
    main()
