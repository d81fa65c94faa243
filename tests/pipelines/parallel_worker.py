"""One of two processes of `test_parallel.py`; not a test itself. Usage: parallel_worker.py RANK STORE

Renders every case alone and then together with the other rank. Prints, a line a case, how far the two latents are
apart, which calls were forecast in each, how many layers ran sparse, and how many tokens of the video this rank had in
a layer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import vidaccel
from vidaccel import patterns
from vidaccel.caching import CGTaylor
from vidaccel.family import attn_processors_of, family_of
from vidaccel.patterns import PerHead, TopK
from vidaccel.pipelines.causal_wan import CausalWanPipeline
from vidaccel.pipelines.prompt_tokens import ann_cross
from vidaccel.reuse import AnnCross, CausalAnn, CausalLightForcing, FlashBlock, HybridMemory, TempCache
from vidaccel.schedule import Schedule
from vidaccel.streaming import Rollout

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import tiny_pipelines  # noqa: E402
from test_patterns import CASES, DYNAMIC, MERGED  # noqa: E402

# Of static patterns those that differ to a rank: a window inside blocks, rows of its own for each head, a second path.
PATTERNS = {name: CASES[name] for name in ("radial", "neighborhood, strides", "sliding-window, heads", "per-head")}
PATTERNS |= {name: CASES[name] for name in ("per-layer", "freeswim", "union")} | DYNAMIC | MERGED
ALL_UNEVEN = ("radial", "sliding-window, heads", "topk, adaptive", "topk, per head", "freeswim")
Case = tuple[str, Callable[[], Any], str, dict[str, Any]]


wan = partial(tiny_pipelines.wan, layers=2)


def cases() -> Iterator[Case]:
    """Name, pipeline, size, and what accelerates it; where a name begins with "after", ranks join after it, where with
    "compiled", blocks are compiled last."""
    for name, (pattern, density) in PATTERNS.items():
        yield name, wan, "even", {"attention": pattern, "density": density}
    for name in ALL_UNEVEN:
        pattern, density = PATTERNS[name]
        yield f"after, uneven: {name}", wan, "ragged", {"attention": pattern, "density": density}
    sparse = dict(zip(("attention", "density"), PATTERNS["radial"], strict=True))
    both = {**sparse, "cache": CGTaylor(threshold=0.5, warmup=2)}
    yield "radial and cache", wan, "wide", both
    yield "after: radial and cache", wan, "even", both
    later = TopK(reselect=2, block=16)
    yield "reselect", wan, "even", {"attention": later, "density": 0.4, "steps": 4}
    residual = patterns.FlashBlock(part=TopK(block=16), every=2)
    yield "flashblock", wan, "even", {"attention": residual, "density": 0.7, "steps": 4}
    guided = {"attention": patterns.FreeSwim((4, 4), block=16, guide=2), "steps": 4}
    yield "freeswim, guided", wan, "even", guided
    yield "after, uneven: freeswim, guided", wan, "ragged", {**guided, "prompt": ["a cat", "two dogs"]}
    cross = {"cross": {"density": 0.1, "block": 2}, "prompt": "a cat and a dog"}
    yield "after: ann-cross", wan, "ragged", {**sparse, **cross}
    yield "3 heads", lambda: wan(heads=3), "ragged", sparse
    adaptive = {"attention": TopK(adaptive=True, block=16), "density": 0.4}
    yield "3 heads, adaptive", lambda: wan(heads=3), "ragged", adaptive
    yield "two experts", lambda: wan(experts=True), "ragged", sparse
    yield "a timestep a token", lambda: wan(ti2v=True), "even", sparse
    yield "compiled: radial", wan, "ragged", sparse
    yield "compiled: hunyuan, topk", tiny_pipelines.hunyuan, "even", {"attention": DYNAMIC["topk"][0], "density": 0.6}
    for family in ("hunyuan", "hunyuan15", "cogvideox"):
        make = getattr(tiny_pipelines, family)
        yield f"{family}, dense", make, "ragged", {"attention": "dense"}
        yield f"after: {family}, topk", make, "even", {"attention": DYNAMIC["topk"][0], "density": 0.6}
        yield f"{family}, radial and cache", make, "wide", both
    two = ["a cat", "two dogs that play in the garden"]
    yield "hunyuan, two texts", tiny_pipelines.hunyuan, "ragged", {**sparse, "prompt": two}
    yield "cogvideox 2b", lambda: tiny_pipelines.cogvideox("2b"), "ragged", sparse
    yield "cogvideox 1.5", lambda: tiny_pipelines.cogvideox("1.5"), "ragged", sparse


LIGHT = CausalLightForcing(density=0.5, base_density=0.5, keep_frames=3, near=1, sink=1, block=16)
TABLE = tuple(tuple((step + layer == 0, step == layer) for layer in range(2)) for step in range(2))
STREAMS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "stream": ((), {"guidance_scale": 3.0, "negative_prompt": "bad"}),
    "stream, many steps": ((), {"num_inference_steps": 3}),
    "stream, uneven": ((LIGHT,), {"height": 80, "width": 80}),
    "stream, light forcing": ((LIGHT, FlashBlock()), {}),
    "stream, flashblock calibrated": ((FlashBlock(calibrated=TABLE),), {}),
    "stream, tempcache": ((TempCache(frames=2, recent=2), CausalAnn(block=16)), {}),
    "stream, hybrid": ((HybridMemory(frames=1),), {}),
    "stream, ann-cross": ((AnnCross(density=0.1, block=2),), {}),
}


def stream(name: str, together: bool) -> tuple[Any, list[int], int]:
    """Latents of a causal stream, tokens of the first layer's calls, and bytes that its cache holds."""
    methods, settings = STREAMS[name]
    parts = wan().components
    kept = {part: parts[part] for part in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")}
    pipe = CausalWanPipeline(**kept, rollout=Rollout(chunk=2, window=6, sink=2, steps=(1000, 500)))
    pipe.set_progress_bar_config(disable=True)
    seen = tokens(pipe.transformer)
    if together:
        vidaccel.enable_parallelism(pipe, uneven="uneven" in name)
    size = {"height": 32, "width": 48, "num_frames": 25, "max_sequence_length": 8, "output_type": "latent"}
    given = size | {"generator": torch.Generator().manual_seed(3), "even_if_slower": True} | settings
    chunks = list(pipe.stream("a cat", methods=methods, **given))
    return torch.cat([chunk.latents for chunk in chunks], 2), seen, chunks[-1].cache_bytes


def compiled(pipe: Any) -> None:
    """Before its first call."""
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")


def video(
    pipe: Any, size: str, how: dict[str, Any], then: Callable[[], None] | None = None
) -> tuple[Any, list[int], int]:
    """Latents, the numbers of the calls that were forecast, and how many layers ran sparse in all of them."""
    asked = {name: value for name, value in how.items() if name in ("prompt", "steps")}
    given = {name: value for name, value in how.items() if name not in (*asked, "cross")}
    with vidaccel.accelerate(pipe, schedule=Schedule(dense_steps=1), **given) as run:
        if "cross" in how:
            both = attn_processors_of(pipe.transformer) | ann_cross(pipe.transformer, **how["cross"])
            pipe.transformer.set_attn_processor(both)
        if then is not None:
            then()
        latents = tiny_pipelines.render(pipe, size, **{"steps": 6 if "cache" in how else 2, **asked})
    calls = run.trace.calls
    return latents, [n for n, call in enumerate(calls) if call.forecast], sum(len(call.kernels) for call in calls)


def tokens(transformer: Any) -> list[int]:
    """Filled with the tokens that the first video layer projects at a time."""
    seen: list[int] = []
    name = family_of(transformer).sites(transformer)[0].name.removesuffix(".processor")
    transformer.get_submodule(name).to_q.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    return seen


def refusals() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What cannot be done; all ranks are told, and none waits for another."""

    def odd() -> None:
        pipe = tiny_pipelines.wan()
        vidaccel.enable_parallelism(pipe, uneven=False)
        video(pipe, "ragged", {"attention": "dense"})

    def few_heads() -> None:
        pipe = tiny_pipelines.wan(heads=1)
        vidaccel.enable_parallelism(pipe)
        video(pipe, "even", {"attention": "dense"})

    def other_noise() -> None:
        pipe = tiny_pipelines.wan()
        vidaccel.enable_parallelism(pipe)
        with vidaccel.accelerate(pipe, "radial", density=0.4):
            own = torch.Generator().manual_seed(torch.distributed.get_rank())
            tiny_pipelines.render(pipe, "even", steps=2, generator=own)

    def part_adaptive() -> None:
        pipe = tiny_pipelines.wan()
        vidaccel.enable_parallelism(pipe)
        part = {"name": "topk", "adaptive": True, "block": 16}
        pattern = PerHead((part, {"name": "radial", "block": 16}), (0, 1))
        video(pipe, "even", {"attention": pattern, "density": 0.4})

    def cache_alone() -> None:
        pipe = tiny_pipelines.cogvideox()
        vidaccel.enable_parallelism(pipe)
        with vidaccel.accelerate(pipe, cache="cg-taylor"):
            tiny_pipelines.render(pipe, "even", steps=12)

    yield "odd", odd
    yield "few heads", few_heads
    yield "other noise", other_noise
    yield "part adaptive", part_adaptive
    yield "cache alone", cache_alone
    yield "no plan", lambda: vidaccel.enable_parallelism(tiny_pipelines.mochi())
    yield "ltx", lambda: vidaccel.enable_parallelism(tiny_pipelines.ltx())
    yield "token replace", lambda: vidaccel.enable_parallelism(tiny_pipelines.hunyuan("token_replace"))
    yield "degree", lambda: vidaccel.enable_parallelism(tiny_pipelines.wan(), 3)


def gather_uneven(gathered: list[torch.Tensor], own: torch.Tensor, group: Any = None) -> None:
    """NCCL gathers tensors of several sizes, and diffusers lets it; gloo takes them one by one."""
    ranks = torch.distributed.get_process_group_ranks(group)
    for source, part in zip(ranks, gathered, strict=True):
        if source == torch.distributed.get_rank():
            part.copy_(own)
        torch.distributed.broadcast(part, source, group=group)


def main(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # Fresh memory is full of NaN.
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.distributed.all_gather = gather_uneven
    for name, make, size, how in cases():
        alone, *one = video(make(), size, how)
        pipe = make()
        seen = tokens(pipe.transformer)
        if name.startswith("after"):
            together, *two = video(pipe, size, how, lambda pipe=pipe: vidaccel.enable_parallelism(pipe))
        else:
            vidaccel.enable_parallelism(pipe, uneven=size != "even" or "15" in name)
            together, *two = video(pipe, size, how, partial(compiled, pipe) if name.startswith("compiled") else None)
        found = {"one": one, "two": two, "tokens": max(seen)}
        print(json.dumps({"name": name, "apart": float((together - alone).abs().max()), **found}), flush=True)
    for name in STREAMS:
        alone, whole, held = stream(name, together=False)
        together, part, own = stream(name, together=True)
        found = {"name": name, "apart": float((together - alone).abs().max()), "bytes": own / held}
        print(json.dumps({**found, "tokens": sum(part) / sum(whole)}), flush=True)
    for name, attempt in refusals():
        try:
            attempt()
        except vidaccel.VidaccelError as error:
            print(json.dumps({"name": name, "refused": str(error)}), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
