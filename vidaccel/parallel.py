"""Several GPUs for one video: diffusers' context parallelism, with plans for models that have none."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from .errors import InstallError
from .family import family_of, unwrap


def cp_plan(transformer: nn.Module) -> dict[str, Any]:
    """How the tokens of a transformer are split over ranks, for `transformer.enable_parallelism(cp_plan=...)`.

    The plan of its class where diffusers has one; else ours (HunyuanVideo, HunyuanVideo-1.5, CogVideoX). Models of ours
    need our processors on all layers: `vidaccel.accelerate(pipe, "dense")` where nothing is to be sparse.

    Raises:
        InstallError: there is none, or this very transformer cannot be split.
    """
    module: Any = unwrap(transformer)
    plan = family_of(module).split_plan(module) or module._cp_plan
    if plan is None:
        raise InstallError(
            f"neither diffusers nor vidaccel knows how to split {type(module).__name__} over several GPUs; render one "
            "video on each GPU instead (vidaccel render --prompts)"
        )
    found: dict[str, Any] = plan
    return found


def enable_parallelism(pipe: Any, ulysses_degree: int | None = None, *, uneven: bool = True, mesh: Any = None) -> None:
    """Make several ranks render one video together. Before or after `accelerate`; call it on every rank.

    The same as `pipe.transformer.enable_parallelism(config=ContextParallelConfig(...), cp_plan=cp_plan(transformer))`
    on each of the pipeline's transformers, on CPUs too.

    Args:
        pipe: a pipeline, or a transformer; the same weights, prompts and noise on every rank.
        ulysses_degree: ranks of one video; None for all. More ranks than that make groups, each with its own video:
            ranks 0 to n - 1 are the first.
        uneven: sizes and heads need not divide by the ranks (NCCL only: gloo gathers even parts). Without
            `accelerate`, layers then ask each other for sizes, each of them.
        mesh: the ranks, with dimensions "ring" and "ulysses", to share their groups with others; None makes one.

    Raises:
        InstallError: `torch.distributed` is not set up, a number of ranks that cannot be, or a model that cannot be
            split.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise InstallError(
            "several ranks were asked for, but torch.distributed is not set up; start with torchrun, and call "
            "torch.distributed.init_process_group first"
        )
    world = torch.distributed.get_world_size()
    degree = world if ulysses_degree is None else ulysses_degree
    if degree < 2 or world % degree:
        raise InstallError(f"{degree} ranks a video were asked for, of {world}; give a divisor of {world} from 2 on")
    from diffusers import ContextParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    modules: list[Any] = [pipe] if isinstance(pipe, nn.Module) else []
    for name in ("transformer", "transformer_2"):
        if isinstance(found := getattr(pipe, name, None), nn.Module):
            modules.append(unwrap(found))
    plans = [cp_plan(module) for module in modules]
    accelerator = torch.accelerator.current_accelerator()
    device = torch.device("cpu") if accelerator is None else accelerator
    names = ("videos", "ring", "ulysses")
    mesh = mesh or init_device_mesh(device.type, (world // degree, 1, degree), mesh_dim_names=names)
    for module, plan in zip(modules, plans, strict=True):
        config = ContextParallelConfig(ulysses_degree=degree, ulysses_anything=uneven, mesh=mesh)
        if accelerator is None:
            _on_cpus(module, config, plan)
        else:
            module.enable_parallelism(config=config, cp_plan=plan)
        _tell_places(module)


def _tell_places(module: nn.Module) -> None:
    """Tell diffusers' hooks where arguments stand: they look it up in the first call, which cannot be compiled then."""
    from diffusers.hooks.context_parallel import ContextParallelSplitHook

    for part in module.modules():
        registry = getattr(part, "_diffusers_hook", None)
        for hook in registry.hooks.values() if registry else ():
            if isinstance(hook, ContextParallelSplitHook):
                names = list(inspect.signature(type(part).forward).parameters)[1:]  # without self
                hook.module_forward_metadata.cached_parameter_indices = {name: n for n, name in enumerate(names)}


def _on_cpus(module: Any, config: Any, plan: dict[str, Any]) -> None:
    """What diffusers' `enable_parallelism` does; its own divides by the number of accelerators."""
    from diffusers import ParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel

    whole = ParallelConfig(context_parallel_config=config)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    whole.setup(rank, world, torch.device("cpu"), mesh=config.mesh)
    module._parallel_config = whole
    for attn in module.modules():
        if hasattr(getattr(attn, "processor", None), "_parallel_config"):
            attn.processor._parallel_config = whole
    apply_context_parallel(module, config, plan)
