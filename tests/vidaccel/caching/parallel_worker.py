"""One of two processes of the tests in `test_parallel.py`; not a test itself.

Usage: parallel_worker.py MODE RANK STORE THRESHOLD...
MODE is "context before", "context after" (one video on two ranks, enabled before or after the cache) or "replicas" (a
video a rank). Prints, a line a policy (CG-Taylor at each threshold; `OUTPUTS` too where ranks share a video), the
forecast steps and the latents' sum.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import vidaccel
from vidaccel.caching import CachePolicy, CGTaylor, EasyCache

sys.path.insert(0, str(Path(__file__).parents[2]))
import tiny_pipelines

OUTPUTS = (CGTaylor(threshold=0.05, warmup=2, site="output"), EasyCache(threshold=0.2, warmup=3))
"""Policies that forecast what the transformer returns, which every rank has in full."""


def video(pipe: Any, steps: int, prompt: str) -> torch.Tensor:
    frames: torch.Tensor = pipe(
        prompt=prompt, negative_prompt="bad", height=128, width=128, num_frames=9, num_inference_steps=steps,
        guidance_scale=3.0, max_sequence_length=16, output_type="latent", generator=torch.Generator().manual_seed(1),
    ).frames  # fmt: skip
    return frames


def outcome(run: Any, frames: torch.Tensor) -> dict[str, Any]:
    cond = [call for call in run.trace.calls if call.branch == "cond"]
    return {
        "forecast": [call.step for call in cond if call.forecast],
        "errors": [call.gate_error for call in cond],
        "sum": float(frames.double().sum()),
    }


def enable(transformer: Any) -> None:
    from diffusers import ContextParallelConfig

    torch.accelerator.device_count = lambda: 2
    transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))


def main(mode: str, rank: int, store: str, thresholds: list[float]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    policies: list[CachePolicy] = [CGTaylor(threshold=threshold, warmup=2) for threshold in thresholds]
    for policy in policies if mode == "replicas" else [*policies, *OUTPUTS]:
        pipe = tiny_pipelines.wan()
        if mode == "context before":
            enable(pipe.transformer)
        with vidaccel.accelerate(pipe, cache=policy) as run:
            if mode == "context after":
                enable(pipe.transformer)
            steps, prompt = (10 + 2 * rank, f"a cat {rank}") if mode == "replicas" else (12, "a cat")
            print(json.dumps(outcome(run, video(pipe, steps, prompt))), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], [float(value) for value in sys.argv[4:]])
