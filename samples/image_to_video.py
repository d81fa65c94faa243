r"""Image to video: the same call, another pipeline.

    python samples/image_to_video.py photo.png --prompt "the boat leaves" \
        --model Wan-AI/Wan2.1-I2V-14B-480P-Diffusers --size 480x832x81

The first frame is given, so a pattern that keeps it in sight (radial does) loses less.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import WanImageToVideoPipeline
from diffusers.utils import export_to_video
from PIL import Image

import vidaccel


def main(words: list[str] | None = None) -> None:
    """Render what follows an image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", help="the first frame")
    parser.add_argument("--model", default="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", help="a folder or a hub id")
    parser.add_argument("--prompt", default="")
    parser.add_argument("--size", default="480x832x81", help="height x width x frames")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", default="image_to_video.mp4")
    args = parser.parse_args(words)
    height, width, frames = map(int, args.size.split("x"))
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)

    pipe = WanImageToVideoPipeline.from_pretrained(args.model, dtype=dtype).to(device)
    image = Image.open(args.image).convert("RGB").resize((width, height))
    with vidaccel.accelerate(pipe, "radial", density=0.35) as run:
        video = pipe(
            image, args.prompt, height=height, width=width, num_frames=frames, num_inference_steps=args.steps,
            generator=torch.Generator().manual_seed(0),
        ).frames[0]  # fmt: skip
    export_to_video(video, args.output, fps=16)
    print(f"{args.output}; effective density {run.report().summary['effective_density']:.2f}")


if __name__ == "__main__":
    main()
