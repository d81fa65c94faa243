"""Measures the causal sample: does a long clip stay on its prompt, and do the methods that speed it up keep it there?

    python -m samples.train.evaluate_causal --report causal.json --sheets sheets --budget-seconds 200
    python -m samples.train.evaluate_causal --only dense --steps 20 --guidance 3     # many steps, with guidance

Each prompt is rendered 60 latent frames long, and the checker looks at stretches of 40 pixel frames, one after the
other: motion wraps around the frame, so a prompt stays true for ever. Controls: no history at all (each chunk sees
itself alone), of the history the first frame alone, windows as short as the room that merged keys have, each method
choosing by lot, as much as it would have chosen, and FlashBlock without history where it would reuse it
(`causal_controls.py`). All clips of a way are one batch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samples.models import checker
from samples.models.world import Scene
from samples.train import fidelity
from samples.train.budget import get_logger
from samples.train.causal_controls import drawing_lots, dropping_history
from samples.train.evaluate import located, mean, pipeline_of, rounded, score, unseen
from samples.train.record import Record, packed
from samples.train.sheet import contact_sheet
from vidaccel.errors import VidaccelError
from vidaccel.pipelines.causal_wan import CausalWanPipeline
from vidaccel.render.stream import StreamJob, is_causal, open_stream
from vidaccel.reuse import AnnCross, CausalAnn, CausalLightForcing, FlashBlock, HybridMemory, TempCache
from vidaccel.streaming import Rollout

log = get_logger("evaluate")
STRETCH = 40


@dataclass(frozen=True)
class Way:
    """One way to make the clips.

    Attributes:
        methods: For the stream.
        changes: Of the rollout.
        control: What the clips are made within, of `causal_controls`.
    """

    methods: tuple[Any, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)
    control: Callable[[], AbstractContextManager[None]] = nullcontext


def ways(frames: int, chunk: int) -> dict[str, Way]:
    """Return dense, each method and all together at two budgets, and the controls, by name.

    Args:
        frames: Latent frames of a clip.
        chunk: Latent frames of a chunk.
    """

    def light(density: float, **settings: Any) -> CausalLightForcing:
        return CausalLightForcing(density, density / 2, frames=frames, **settings)

    def both(name: str, control: str, *methods: Any, **changes: Any) -> None:
        found[name] = Way(methods, changes)
        found[f"{name}, {control}"] = Way(methods, changes, control=drawing_lots)

    found = {"dense": Way(), "no history": Way(changes={"window": chunk})}
    for density in (0.5, 0.3):
        both(f"light-forcing {density}", "random blocks", light(density))
    for room in (3, 1):
        # As many frames as the method has room for, of those just before the chunk.
        found[f"window {chunk + room}"] = Way(changes={"window": chunk + room})
        both(f"tempcache {room}", "random keys", TempCache(frames=room))
    # Heads drawn by lot are as good where most of them reuse, so also where a sixth and a third do.
    for threshold in (0.03, 0.05, 0.1, 0.3):
        both(f"flashblock {threshold}", "random heads", FlashBlock(threshold))
        found[f"flashblock {threshold}, history dropped"] = Way((FlashBlock(threshold),), control=dropping_history)
    # The own chunk and a few tokens of its past go far here: 0.03 is 1 block of 36.
    for density in (0.3, 0.2, 0.15, 0.1, 0.06, 0.03):
        both(f"ann {density}", "random tokens", CausalAnn(density))
    # Half of the padded prompt has room for all of its words; a sixth has not.
    found["ann-cross 0.5"] = Way((AnnCross(0.5, block=8),))
    both("ann-cross 0.15", "random words", AnnCross(0.15, block=8))
    for room in (2, 1):
        both(f"hybrid {room}, window 6", "random keys", HybridMemory(frames=room), window=6)
    for density in (0.3, 0.1):
        methods = (TempCache(frames=6), CausalAnn(density), FlashBlock(0.1), AnnCross(0.5, block=8))
        both(f"all {density}", "all random", *methods)
    found["first frame alone"] = Way((light(0.3, keep_frames=1, near=0, sink=1),))
    return found


def main(words: list[str] | None = None) -> None:
    """Generate, check, report."""
    args = _arguments(words)
    if not is_causal(args.model):
        kind = pipeline_of(located(args.model))
        raise SystemExit(
            f"{args.model} is a {kind}, which sees all frames at once; measure it with "
            f"`python -m samples.train.evaluate --model {args.model}`"
        )
    try:
        pipe, job = open_stream(StreamJob("", args.model, num_frames=4 * args.frames - 3, guidance=args.guidance))
    except VidaccelError as error:
        raise SystemExit(f"{error}; samples/train/README.md says how the sample is made") from error
    settings = {name: getattr(job, name) for name in ("height", "width", "num_frames", "max_sequence_length")}
    settings |= {"guidance_scale": job.guidance} | ({"num_inference_steps": args.steps} if args.steps else {})
    scenes = unseen(args.prompts)
    shared = {"model": Path(args.model).name, "seed": args.seed, "prompts": args.prompts, "latent_frames": args.frames}
    record = Record(args.report, shared | {"rollout": pipe.rollout.to_dict(), "dtype": job.dtype, **settings})

    chosen = ways(args.frames, pipe.rollout.chunk)
    # A word that is a name means that one alone.
    names = [
        name
        for name in chosen
        if name == "dense"
        or not args.only
        or any(part == name if part in chosen else part in name for part in args.only)
    ]
    start, longest, dense, right = time.monotonic(), 0.0, torch.empty(0), []
    if all(name in record.cells for name in names):
        return
    for name in names:
        begun = time.monotonic()
        if begun - start + longest > args.budget_seconds:
            log.info("stopping at the time limit, before %s", name)
            break
        if name != "dense" and name in record.cells:
            continue
        clips, result = generate(pipe, scenes, chosen[name], settings, args.seed)
        answers = judged(clips, scenes, result)
        if name == "dense":
            dense, right = clips.half(), answers
        else:
            compared(clips, dense, answers, right, result)
        if args.sheets:
            contact_sheet(list(clips[: args.rows]), args.sheets / f"{name}.png")
        result["judged_seconds"] = round(time.monotonic() - begun - result["seconds"], 2)
        shown = {key: value for key, value in result.items() if key not in ("answers", "stretches")}
        log.info("%s: %s of %d in each stretch; %s", name, [sum(row) for row in answers], len(scenes), shown)
        columns = {key: [row[key] for row in result["stretches"]] for key in result["stretches"][0]}
        record.add(name, result | {"stretches": columns, "answers": [packed(row) for row in answers]})
        longest = max(longest, time.monotonic() - begun)


@torch.no_grad()
def generate(
    pipe: CausalWanPipeline, scenes: Sequence[Scene], way: Way, settings: dict[str, Any], seed: int
) -> tuple[Tensor, dict[str, Any]]:
    """Render all scenes in one batch; return clips (b, f, h, w, 3) in [0, 1] and what the stream says of itself."""
    stock: Rollout = pipe.rollout
    windows = (stock.window, replace(stock, **way.changes).window)
    pipe.register_to_config(rollout=replace(stock, **way.changes).to_dict())
    noise = [torch.Generator().manual_seed(seed * 1000 + number) for number in range(len(scenes))]
    begun = time.monotonic()
    try:
        prompts = [scene.caption() for scene in scenes]
        forced = {"methods": way.methods, "even_if_slower": True}
        stream = pipe.stream(prompts, generator=noise, output_type="pt", **forced, **settings)
        with way.control():
            chunks = list(stream)
    finally:
        pipe.register_to_config(rollout=stock.to_dict())
    clips = torch.cat([chunk.frames for chunk in chunks], 1).permute(0, 1, 3, 4, 2).float()
    if clips.is_cuda:
        torch.cuda.synchronize()
    result: dict[str, Any] = {"seconds": round(time.monotonic() - begun, 2)}
    # A shorter window is a part of what the dense way sees.
    seen = [[min(chunk.start + stock.chunk, window or 10**9) for chunk in chunks] for window in windows]
    shares = [chunk.density * own / all_of_it for chunk, all_of_it, own in zip(chunks, *seen, strict=True)]
    result["density"] = round(sum(shares) / len(shares), 4)
    result["cache_bytes"] = max(chunk.cache_bytes for chunk in chunks)
    if stream.model.reuse_rate is not None:
        result["reuse_rate"] = round(stream.model.reuse_rate, 4)
    return clips, result


def judged(clips: Tensor, scenes: Sequence[Scene], result: dict[str, Any]) -> list[list[bool]]:
    """Check every stretch of every clip, put the counts into `result`, return (stretches, clips) right or not."""
    stretches = clips.split(STRETCH, 1)
    verdicts = [
        [checker.check(clip, scene) for clip, scene in zip(stretch, scenes, strict=True)] for stretch in stretches
    ]
    answers = [[verdict.right for verdict in row] for row in verdicts]
    result["stretches"] = [
        score(row) | {"right_interval": rounded(fidelity.wilson(sum(found), len(found)))}
        for row, found in zip(verdicts, answers, strict=True)
    ]
    return answers


def compared(
    clips: Tensor, dense: Tensor, answers: list[list[bool]], right: list[list[bool]], result: dict[str, Any]
) -> None:
    """Put into `result` how the clips differ from the dense ones, stretch after stretch."""
    for number, row in enumerate(result["stretches"]):
        window = slice(number * STRETCH, (number + 1) * STRETCH)
        pairs = [(one[window], other[window].float()) for one, other in zip(clips, dense, strict=True)]
        row["psnr_to_dense"] = mean([fidelity.psnr(*pair).mean() for pair in pairs])
        row["ssim_to_dense"] = mean([fidelity.ssim(*pair).mean() for pair in pairs], 4)
        row["right_to_dense"] = rounded(fidelity.paired(answers[number], right[number]))
    every = [[answer for row in rows for answer in row] for rows in (answers, right)]
    result["right_to_dense"] = round((sum(every[0]) - sum(every[1])) / len(every[0]), 4)


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wan-causal-tiny", help="a sample's name, or a folder")
    parser.add_argument("--only", nargs="+", help="ways of these names, or whose name holds one of these words")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--frames", type=int, default=60, help="latent frames of a clip")
    parser.add_argument("--steps", type=int, help="many steps along the scheduler, instead of the model's few")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget-seconds", type=float, default=1e9, help="no way begins that would not end by then")
    parser.add_argument("--report", type=Path, default=Path("build/causal.json"))
    parser.add_argument("--sheets", type=Path, help="folder for a contact sheet of each way")
    parser.add_argument("--rows", type=int, default=12)
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
