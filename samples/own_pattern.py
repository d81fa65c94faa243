"""A pattern of one's own, from Python: `patterns/checkerboard.py` says what it keeps, and nothing has to be registered.

    python samples/own_pattern.py
    PYTHONPATH=samples vidaccel render -a patterns.checkerboard:Checkerboard -p "a red circle moves right"

`vidaccel.attn_processors` is the diffusers way: a complete dict of processors that you set yourself.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video
from patterns.checkerboard import Checkerboard

import vidaccel

SAMPLE = Path(__file__).parent / "models" / "wan-tiny"


def main(words: list[str] | None = None) -> None:
    """Render one prompt with a pattern that vidaccel does not know."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SAMPLE), help="a folder or a hub id; the sample model without it")
    parser.add_argument("--prompt", default="a red circle moves right")
    parser.add_argument("--size", default="256x256x33", help="height x width x frames")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--output", default="own_pattern.mp4")
    args = parser.parse_args(words)
    height, width, frames = map(int, args.size.split("x"))
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)

    pipe = WanPipeline.from_pretrained(args.model, dtype=dtype).to(device)
    pattern = Checkerboard(block=args.block)
    pipe.transformer.set_attn_processor(vidaccel.attn_processors(pipe.transformer, pattern))
    video = pipe(
        args.prompt, height=height, width=width, num_frames=frames, num_inference_steps=args.steps,
        generator=torch.Generator().manual_seed(0),
    ).frames[0]  # fmt: skip
    vidaccel.remove(pipe.transformer)
    export_to_video(video, args.output, fps=16)
    print(args.output)


if __name__ == "__main__":
    main()
