"""Measures a sample model: what share of unseen prompts it gets right, dense, sparse and cached.

    python -m samples.train.evaluate --model wan-tiny --report report.json --sheet sheet.png
    python -m samples.train.evaluate --model wan-tiny --objects 2 --prompts 32
    python -m samples.train.evaluate --model hunyuan-tiny --sweep attention --report attention.json --budget-seconds 200
    python -m samples.train.evaluate --model hunyuan-tiny --sweep caches --steps 50 --report caches.json

`checker.check` reads the answers off the frames. Prompts name triples of colour, shape and direction that training
never showed. All cells of a sweep share prompts and noise, so each clip is also compared with the dense one beside it.
A gate of a cache decides for a whole batch. The report grows cell by cell; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from samples.models import MODELS, checker, path, world
from samples.models.shared import shared_parts
from samples.models.world import Scene
from samples.train import cells, fidelity
from samples.train.budget import get_logger
from samples.train.cells import Cell
from samples.train.record import Record, packed
from samples.train.sheet import contact_sheet
from vidaccel.render.stream import is_causal
from vidaccel.trace import Stopwatch

log = get_logger("evaluate")
ASPECTS = ("colour", "shape", "direction", "right", "speed", "texture", "camera")
BRIEF = ("failed", "computed", "delivered_density", "kernels", "psnr_to_dense", "answers")
"""What CI compares when it renders a few prompts of a report again."""


def main(words: list[str] | None = None) -> None:
    """Generate, check, report."""
    args = _arguments(words)
    diffusers_logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if is_causal(args.model):
        raise SystemExit(
            f"{args.model} is a causal model, which draws chunk by chunk; measure it with "
            f"`python -m samples.train.evaluate_causal --model {args.model}`"
        )
    folder = located(args.model)
    pipe = DiffusionPipeline.from_pretrained(folder, **shared_parts(folder), dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    settings = json.loads((folder / "defaults.json").read_text())
    settings.pop("fps")
    settings |= {"num_inference_steps": args.steps} if args.steps else {}
    settings |= {"num_frames": args.frames} if args.frames else {}
    settings |= {"guidance_scale": args.guidance} if args.guidance is not None else {}
    settings |= {"max_sequence_length": args.text_length} if args.text_length else {}
    drawn = unseen(args.skip + args.prompts) if args.objects == 1 else crowded(args.skip + args.prompts, args.objects)
    scenes = drawn[args.skip :]

    shared = {"model": folder.name, "seed": args.seed, "batch": args.batch, "prompts": args.prompts}
    shared |= {"objects": args.objects, "dense_steps": args.dense_steps, **settings}
    shared |= {"skip": args.skip} if args.skip else {}
    record = Record(args.report, shared)
    chosen = [cell for cell in wanted(args, settings["num_inference_steps"]) if cell.name not in record.cells]
    start, longest, dense = time.monotonic(), 0.0, Dense()
    for cell in ([cells.DENSE] if chosen and chosen[0] is not cells.DENSE else []) + chosen:
        begun = time.monotonic()
        if begun - start + longest > args.budget_seconds:
            log.info("stopping at the time limit, before %s", cell.name)
            break
        clips, result = measured(pipe, cell, scenes, settings, args.batch, args.seed, dense)
        if cell.name not in record.cells:
            record.add(cell.name, {key: result[key] for key in BRIEF if key in result} if args.brief else result)
        log.info("%s: %s", cell.name, {key: value for key, value in result.items() if key != "answers"})
        if cell is cells.DENSE and args.sheet:
            contact_sheet(clips[: args.rows], args.sheet)
        longest = max(longest, time.monotonic() - begun)


def located(model: str) -> Path:
    """Return the folder of a sample's name, or the folder itself.

    Raises:
        SystemExit: neither has a `model_index.json`.
    """
    folder = path(model) if model in MODELS else Path(model)
    if not (folder / "model_index.json").is_file():
        raise SystemExit(
            f"{model} is neither a folder with a model_index.json nor a sample that is here ({', '.join(MODELS)}); "
            "samples/train/README.md says how to make one"
        )
    return folder


def pipeline_of(folder: Path) -> str:
    """Return the name of the pipeline that a folder is for."""
    return str(json.loads((folder / "model_index.json").read_text())["_class_name"])


class Dense:
    """The dense clips and answers of a sweep, which its other cells are compared with."""

    clips: Sequence[Tensor] = ()
    right: Sequence[bool] = ()


def wanted(args: argparse.Namespace, steps: int) -> list[Cell]:
    """Return the cells of the sweep, the dense one first."""
    found = [cells.DENSE]
    if args.sweep == "attention":
        found += cells.attention_cells(args.dense_steps)
    elif args.sweep == "caches":
        found += cells.cache_cells(steps)
    if args.recipe:
        found.append(cells.recipe_cell(args.recipe))
    return [cell for cell in found if not args.only or cell is cells.DENSE or any(o in cell.name for o in args.only)]


def measured(
    pipe: Any, cell: Cell, scenes: Sequence[Scene], settings: dict[str, Any], batch: int, seed: int, dense: Dense
) -> tuple[list[Tensor], dict[str, Any]]:
    """Render every scene in one cell; return the clips and what is to be said of them."""
    steps = max(1, int(settings["num_inference_steps"] * cell.share))
    try:
        with cell.installed(pipe) as run:
            if cell.rehearse:
                list(generate(pipe, scenes[:1], settings, 1, seed + 1))
            with Meter(pipe.transformer) as meter:
                _wait()
                start = time.monotonic()
                clips = list(generate(pipe, scenes, settings | {"num_inference_steps": steps}, batch, seed))
                _wait()
                seconds = time.monotonic() - start
            summary = run.report().data if run is not None else None
    except Exception as error:  # A method that does not run here is a result; the others still have their turn.
        log.exception("%s failed", cell.name)
        return [], cell.about | {"failed": f"{type(error).__name__}: {error}"[:300]}
    verdicts = [checker.check(clip, scene) for clip, scene in zip(clips, scenes, strict=True)]
    right = [verdict.right for verdict in verdicts]
    result = cell.about | {"clips": len(clips), "seconds": round(seconds, 2), "transformer_seconds": meter.seconds}
    result["computed"] = round(meter.computed * steps / settings["num_inference_steps"], 4)
    result |= score(verdicts) | {"right_interval": rounded(fidelity.wilson(sum(right), len(right)))}
    if summary is not None:
        kept = ("delivered_density", "effective_density", "kernels")
        result |= {key: summary["summary"][key] for key in kept if summary["summary"][key]}
        result["notes"] = summary["notes"]
    if cell is cells.DENSE:
        dense.clips, dense.right = [clip.half() for clip in clips], right
    else:
        pairs = [(clip, other.float()) for clip, other in zip(clips, dense.clips, strict=True)]
        result["right_to_dense"] = rounded(fidelity.paired(right, dense.right))
        result["psnr_to_dense"] = mean([fidelity.psnr(*pair).mean() for pair in pairs])
        result["ssim_to_dense"] = mean([fidelity.ssim(*pair).mean() for pair in pairs], 4)
    result["answers"] = packed(right)
    return clips, result


class Meter:
    """Times the transformer's calls, and counts those in which the last layer attends: not where a cache stands in."""

    def __init__(self, transformer: Any) -> None:
        lists = ("single_transformer_blocks", "transformer_blocks", "blocks")
        last = next(blocks[-1] for name in lists if (blocks := getattr(transformer, name, None)))
        self._parts = (transformer, (getattr(last, "attn1", None) or last.attn).to_q)
        self._attended: list[bool] = []
        self._watches: list[Stopwatch] = []

    def __enter__(self) -> Meter:
        transformer, query = self._parts
        self._hooks = [
            transformer.register_forward_pre_hook(self._begin, prepend=True),
            query.register_forward_pre_hook(lambda *_: self._attended.__setitem__(-1, True)),
            transformer.register_forward_hook(lambda *_: self._watches[-1].stop()),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, transformer: Any, _: object) -> None:
        self._attended.append(False)
        self._watches.append(Stopwatch(transformer.device))

    @property
    def computed(self) -> float:
        """Share of the calls in which the last layer attended."""
        return round(sum(self._attended) / max(1, len(self._attended)), 4)

    @property
    def seconds(self) -> float:
        """Seconds in the transformer, with whatever works around its calls."""
        return round(sum(watch.ms or 0.0 for watch in self._watches) / 1000, 3)


@torch.no_grad()
def generate(pipe: Any, scenes: Sequence[Scene], settings: dict[str, Any], batch: int, seed: int) -> Iterator[Tensor]:
    """Yield a clip (f, h, w, 3) for each scene; its noise depends on `seed` and its place alone."""
    for first in range(0, len(scenes), batch):
        window = scenes[first : first + batch]
        noise = [torch.Generator().manual_seed(seed * 1000 + first + index) for index in range(len(window))]
        prompts = [scene.caption() for scene in window]
        with torch.autocast(pipe.device.type, torch.bfloat16, enabled=pipe.device.type == "cuda"):
            video = pipe(prompts, generator=noise, output_type="pt", **settings).frames
        yield from video.permute(0, 1, 3, 4, 2).float()


def unseen(count: int) -> list[Scene]:
    """Return one-object scenes of held-out triples: all 64 in turn, or every n-th of them where fewer are wanted."""
    return world.unseen(max(64, count))[:: max(1, 64 // count)][:count]


def crowded(count: int, objects: int) -> list[Scene]:
    """Return scenes with several objects, of triples that training may have shown."""
    rng = random.Random(2)
    return [world.draw(rng, things=objects) for _ in range(count)]


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


def mean(values: Sequence[Tensor], digits: int = 2) -> float:
    """Return the mean of scalars, as a rounded number."""
    return round(float(torch.stack(list(values)).mean()), digits)


def rounded(values: Sequence[float]) -> list[float]:
    """Return the values with four digits."""
    return [round(value, 4) for value in values]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wan-tiny", help="a sample's name, or a folder")
    parser.add_argument("--sweep", choices=("none", "attention", "caches"), default="none")
    parser.add_argument("--only", nargs="+", help="cells whose name holds one of these")
    parser.add_argument("--recipe", help="one cell more: a preset's name")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--skip", type=int, default=0, help="leave out so many prompts before the first")
    parser.add_argument("--objects", type=int, choices=(1, 2), default=1)
    parser.add_argument("--dense-steps", type=float, default=0.1, help="share of the first steps, in sparse cells")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--text-length", type=int)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget-seconds", type=float, default=1e9, help="no cell begins that would not end by then")
    parser.add_argument("--report", type=Path, default=Path("build/report.json"))
    parser.add_argument("--brief", action="store_true", help="write no more than CI compares")
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--rows", type=int, default=12)
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
