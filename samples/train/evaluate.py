"""Measures a sample model: what share of unseen prompts it gets right, dense or accelerated.

    python -m samples.train.evaluate --model samples/models/wan-tiny --report report.json
    python -m samples.train.evaluate --attention dense radial random first-frame --density 0.35

`checker.check` reads the answers off the frames. The 64 one-object prompts name triples of colour, shape and direction
that training never showed; `--two` adds prompts with two objects, for the record. Sparse clips are also compared with
the dense clips of the same noise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from samples.models import checker, world
from samples.models.world import Scene
from samples.train.budget import get_logger
from samples.train.sheet import contact_sheet

log = get_logger("evaluate")
ASPECTS = ("colour", "shape", "direction", "right", "speed", "texture", "camera")


def main() -> None:
    """Generate, check, report."""
    args = _arguments()
    diffusers_logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = WanPipeline.from_pretrained(args.model, dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    settings = json.loads((args.model / "defaults.json").read_text())
    settings.pop("fps")
    settings |= {"num_inference_steps": args.steps} if args.steps else {}
    settings |= {"guidance_scale": args.guidance} if args.guidance is not None else {}
    settings |= {"max_sequence_length": args.text_length} if args.text_length else {}

    sets = {"unseen one-object": world.unseen()[:: args.stride]}
    if args.two:
        rng = random.Random(2)
        sets["two objects"] = [world.draw(rng, things=2) for _ in range(args.two)]
    report: dict[str, Any] = {"settings": settings, "density": args.density, "torch": torch.__version__}
    report["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    pictures: list[Tensor] = []
    for name, scenes in sets.items():
        dense: list[Tensor] = []
        for attention in args.attention:
            start = time.monotonic()
            with accelerated(pipe, attention, args.density):
                clips = list(generate(pipe, scenes, settings, args.batch, args.seed))
            seconds = round(time.monotonic() - start, 1)
            verdicts = [checker.check(clip, scene) for clip, scene in zip(clips, scenes, strict=True)]
            result = {"clips": len(scenes), "seconds": seconds} | score(verdicts)
            if attention == "dense":
                dense = clips
            elif dense:
                result["psnr_to_dense"] = fidelity(clips, dense)
            report.setdefault(name, {})[attention] = result
            log.info("%s, %s: %s", name, attention, result)
            wrong = [scene.caption() for scene, verdict in zip(scenes, verdicts, strict=True) if not verdict.right]
            log.info("not right: %s", wrong[:12])
            pictures += clips[: args.rows]
    if args.report:
        args.report.parent.mkdir(parents=True, exist_ok=True)
        args.report.write_text(json.dumps(report, indent=1) + "\n")
    if args.sheet:
        contact_sheet(pictures, args.sheet)


@torch.no_grad()
def generate(
    pipe: WanPipeline, scenes: Sequence[Scene], settings: dict[str, Any], batch: int, seed: int
) -> Iterator[Tensor]:
    """Yield a clip (f, h, w, 3) for each scene; its noise depends on `seed` and its place alone."""
    for first in range(0, len(scenes), batch):
        window = scenes[first : first + batch]
        noise = [torch.Generator().manual_seed(seed * 1000 + first + index) for index in range(len(window))]
        prompts = [scene.caption() for scene in window]
        with torch.autocast(pipe.device.type, torch.bfloat16, enabled=pipe.device.type == "cuda"):
            video = pipe(prompts, generator=noise, output_type="pt", **settings).frames
        yield from video.permute(0, 1, 3, 4, 2).float()


@contextlib.contextmanager
def accelerated(pipe: WanPipeline, attention: str, density: float) -> Iterator[None]:
    """Run the pipeline under a sparse pattern, the package's or one of `controls`; `dense` does nothing."""
    if attention == "dense":
        yield
        return
    import vidaccel
    from samples.train import controls

    recipe = vidaccel.Recipe.load("wan-tiny")
    if attention in controls.CONTROLS:
        pattern: Any = replace(controls.CONTROLS[attention], block=recipe.attention.block)
    else:
        # The recipe's own pattern comes with blocks that suit a small grid; others come as they are.
        pattern = None if attention == recipe.attention.name else attention
    with vidaccel.accelerate(pipe, pattern, density=density, recipe=recipe):
        yield


def score(verdicts: Sequence[checker.Verdict]) -> dict[str, Any]:
    """Return, for each aspect, how many clips have it right; the camera counts only where it can be seen."""
    counts: dict[str, Any] = {}
    for aspect in ASPECTS:
        answers = [getattr(verdict, aspect) for verdict in verdicts]
        seen = [answer for answer in answers if answer is not None]
        counts[aspect] = sum(seen)
        if len(seen) < len(answers):
            counts[f"{aspect}_of"] = len(seen)
    return counts


def fidelity(clips: Sequence[Tensor], dense: Sequence[Tensor]) -> float:
    """Return the mean PSNR, in dB, of clips against the dense clips of the same noise."""
    errors = [(clip - other).square().mean() for clip, other in zip(clips, dense, strict=True)]
    return round(float((-10 * torch.stack(errors).clamp(min=1e-10).log10()).mean()), 2)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("samples/models/wan-tiny"))
    parser.add_argument("--attention", nargs="+", default=["dense"], help="dense, a pattern, `random`, `first-frame`")
    parser.add_argument("--density", type=float, default=0.35)
    parser.add_argument("--two", type=int, default=0, help="prompts with two objects")
    parser.add_argument("--stride", type=int, default=1, help="take every n-th of the 64 prompts")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--text-length", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--rows", type=int, default=12)
    return parser.parse_args()


if __name__ == "__main__":
    main()
