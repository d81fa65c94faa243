"""What a render would do: grid, tokens and densities, from configurations alone."""

from __future__ import annotations

from typing import Any

import torch

from ..caching import estimate_bytes
from ..caching.cache import refuse_over_limit, useless
from ..errors import UsageError
from ..family import Call
from ..grid import Site, VideoGrid
from ..order import described
from ..patterns import Plan, advice, check_model, of_layer, would_lose
from ..schedule import DENSE, Step
from . import upscale
from .job import ReadyJob
from .models import Model


def preview(job: ReadyJob, model: Model) -> dict[str, Any]:
    """Plan a complete job without loading weights.

    Patterns with a plan for each layer are planned for the first one. Text tokens in joint attention and the split
    between two experts are not known before a run, so densities count video tokens, and no expert. Of an upscaled job
    it is the second stage.

    Raises:
        PatternError: the pattern cannot give the density on this grid, or is made for other heads or layers.
    """
    grid = model.grid(*job.size, job.num_frames)
    pattern, schedule, total = job.recipe.attention, job.recipe.schedule, job.num_inference_steps
    if job.upscale is not None:
        total = upscale.refined_steps(job)
    requested = DENSE if pattern is None or pattern.name == "dense" else job.recipe.density
    if pattern is not None:
        if heads := model.transformer.get("num_attention_heads"):
            check_model(pattern, model.layers, heads)
        pattern = of_layer(pattern, 0)
    plans: dict[float | None, Plan] = {}
    steps: list[list[float]] = []
    notes: list[str] = []

    def density(asked: float | None) -> float:
        if asked == DENSE or pattern is None:
            return DENSE
        if asked not in plans:
            call = Call(grid, 0, torch.zeros(1), None, torch.device("cpu"))
            site = Site("", 0, "self", model.family.name, model.family.native(model.transformer))
            layout = model.family.layout(call, pattern.block)
            plans[asked] = pattern.plan(layout, asked, site)
            useless = advice(pattern, plans[asked], layout, asked, site, forced=schedule.even_if_slower)
            notes.extend([*plans[asked].notes, *([useless] if useless else [])])
        return DENSE if would_lose(pattern, plans[asked]) and not schedule.even_if_slower else plans[asked].delivered

    branches = ("cond", "uncond") if (job.guidance_scale or 0) > 1 else ("cond",)
    for index in range(total):
        step = Step(index, total, 0.0, index == 0)
        calls = [(layer, branch) for branch in branches for layer in range(model.layers)]
        asked = (schedule.density(step, layer, model.layers, branch, None, requested) for layer, branch in calls)
        steps.append([density(each) for each in asked])
    if requested != DENSE and (told := schedule.covers(total, model.layers)):
        notes.append(told)
    if job.recipe.cache is not None and (told := useless(total)):
        notes.append(told)
    sparse = [step for step in steps if min(step) < DENSE]
    return {
        "model": {"reference": model.reference, "kind": model.kind, "pipeline": model.pipeline, "layers": model.layers},
        "job": job.to_dict(),
        "recipe": job.recipe.to_dict(),
        "recipe_hash": job.recipe.hash,
        "grid": str(grid),
        "tokens": grid.tokens,
        "dense_steps": len(steps) - len(sparse),
        "sparse_steps": len(sparse),
        "sparse_layers": max((sum(d < DENSE for d in step) // len(branches) for step in sparse), default=0),
        "effective_density": sum(map(sum, steps)) / sum(map(len, steps)),
        "plans": [
            {
                "requested": plan.requested,
                "delivered": plan.delivered,
                "visited": plan.visited,
                "rule": plan.rule,
                "block": plan.layout.block,
                "tile": plan.layout.tile and described(plan.layout.tile),
            }
            for plan in plans.values()
        ],
        "notes": notes,
        "memory_gib": None if job.upscale is None else upscale.memory(job, model),
        "cache_gib": cache_gib(job, model, grid),
    }


def cache_gib(job: ReadyJob, model: Model, grid: VideoGrid) -> float | None:
    """GiB that the cache of a job holds at most, by its transformer without weights; None without a cache.

    Raises:
        UsageError: a configuration that no transformer can be built from.
        InstallError: more than the cache's limit, however guidance is done.
    """
    import diffusers

    policy = job.recipe.cache
    if policy is None:
        return None
    try:
        with torch.device("meta"):
            transformer = getattr(diffusers, model.index["transformer"][1]).from_config(dict(model.transformer))
    except Exception as error:
        raise UsageError(
            f"{model.reference}: no transformer can be built from its config: {type(error).__name__}: {error}"
        ) from error
    expert = "high" if model.experts == 2 else None
    # Guidance is two calls, or, as in CogVideoX, one of two samples, or an input; which of them shows when it runs.
    kinds = ((1, 1), (1, 2), (2, 1)) if (job.guidance_scale or 0) > 1 else ((1, 1),)
    held = [
        estimate_bytes(policy, transformer, grid, batch=batch, branches=branches, dtype=job.torch_dtype, expert=expert)
        for batch, branches in kinds
    ]
    refuse_over_limit(policy, min(held), grid)
    return max(held) / 2**30
