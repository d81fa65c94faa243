"""Several prompts with one acceleration, and what it cost: each video beside the one that dense attention makes.

    python samples/several_prompts.py prompts.txt --output out
    vidaccel compare out/dense out/sparse      # one page: players, differences, means with intervals

Plans and caches belong to the acceleration, so the second prompt finds them ready. `vidaccel render --prompts` does
this from the shell, and goes on where it was interrupted.
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
    """Render every prompt, densely and sparsely."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help="a file with a prompt a line")
    parser.add_argument("--model", default=str(SAMPLE), help="a folder or a hub id; the sample model without it")
    parser.add_argument("--size", default="256x256x33", help="height x width x frames")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("out"))
    args = parser.parse_args(words)
    height, width, frames = map(int, args.size.split("x"))
    prompts = [line.strip() for line in args.prompts.read_text().splitlines() if line.strip()]
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = WanPipeline.from_pretrained(args.model, dtype=dtype).to(device)

    def render(folder: str) -> list[object]:
        (args.output / folder).mkdir(parents=True, exist_ok=True)
        videos = []
        for number, prompt in enumerate(prompts):
            # The same noise in both runs, so that videos are pairs.
            generator = torch.Generator().manual_seed(number)
            video = pipe(
                prompt, height=height, width=width, num_frames=frames, num_inference_steps=args.steps,
                generator=generator,
            ).frames[0]  # fmt: skip
            videos.append(video)
            export_to_video(video, str(args.output / folder / f"{number:03d}.mp4"), fps=16)
        return videos

    dense = render("dense")
    with vidaccel.accelerate(pipe, "radial", density=0.35) as run:
        sparse = render("sparse")
    for prompt, video, reference in zip(prompts, sparse, dense, strict=True):
        mean = run.report(video, against=reference).data["quality"]["mean"]
        print(f"{mean['psnr_db']:5.1f} dB, motion x {mean['motion_ratio'] or 0:.2f}: {prompt}")


if __name__ == "__main__":
    main()
