"""Rendering beyond a model's size, in two stages: a video at its own size, enlarged, noised again and refined.

Idea: what a model draws at the size that it was trained on is right as a whole; enlarged, it needs detail, which the
    last steps of denoising add through a window of the trained size.
Math: frames are enlarged bilinearly and encoded; z = (1 - s) z + s e, e fresh noise and s the noise level at which the
    last `strength` of the steps begins; those steps run with the recipe.
Source: FreeSwim, arXiv 2511.14712, section 3.1: strength 0.7, its window, logit scale 2, second path each second step.
Limits: Wan text-to-video with one transformer. The first stage runs dense.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ..errors import UsageError
from ..guide import guide_of, kept_bytes, layers_here
from ..patterns import FreeSwim
from ..recipe import Recipe
from .models import Model
from .source import read_json

if TYPE_CHECKING:
    from .job import ReadyJob

STRENGTH = 0.7
GUIDE = 2
_GUIDE_GIB = 8.0
_HEADER_BYTES = 2**26
_BLOCK, _KEPT = "activations of a block, about", "cross-attention outputs kept"
_DECODER = "or, after them, the VAE's decoder, about"
# Four frames of its last stage, so many times: 4.5 GiB less weights at 480x832 in bf16. Pipelines load it in fp32.
_DECODED, _VAE_ITEMSIZE = 15, 4


def check(job: ReadyJob, model: Model) -> None:
    """Compare an upscaled job with what the model can do.

    Raises:
        UsageError: a model or a size that cannot be; the message says which can.
    """
    if model.pipeline != "WanPipeline" or model.index.get("transformer_2", [None, None])[1]:
        raise UsageError(
            f"--upscale was asked of {model.reference}, a {model.pipeline}; it works for Wan text-to-video models with "
            "one transformer"
        )
    if job.image or job.video:
        raise UsageError("--upscale starts from a video of its own; leave --image and --video out")
    if job.upscale not in (2, 3, 4):
        raise UsageError(f"upscale {job.upscale} was asked for; give 2, 3 or 4")
    if not refined_steps(job):
        raise UsageError(
            f"strength {job.strength} of {job.num_inference_steps} steps leaves no step to refine with; give "
            f"{1 / job.num_inference_steps:.2g} or more"
        )
    model.grid(*job.size, job.num_frames)


def recipe_for(model: Model, height: int, width: int, num_frames: int) -> Recipe:
    """What the second stage runs where nothing else is asked for: FreeSwim with the first stage's frame as its window.

    Grids too small for blocks of 128 get smaller ones.
    """
    grid = model.grid(height, width, num_frames)
    block = next((block for block in (128, 64, 32) if grid.frame >= 4 * block), 16)
    pattern = FreeSwim((grid.y, grid.x), block=block, logit_scale=2.0, guide=GUIDE, guide_gib=_GUIDE_GIB)
    return Recipe(attention=pattern, about="FreeSwim beyond the model's own size")


def refined_steps(job: ReadyJob) -> int:
    """Steps of the second stage."""
    return min(int(job.num_inference_steps * (job.strength or 0)), job.num_inference_steps)


def second_pipeline(pipe: Any, job: ReadyJob) -> Any:
    """A video-to-video pipeline of the same parts."""
    from diffusers import WanVideoToVideoPipeline

    names = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    if job.offload in ("model", "sequential"):
        # Accelerate's hooks know the order of one pipeline's parts.
        pipe.remove_all_hooks()
    second = WanVideoToVideoPipeline(**{name: getattr(pipe, name) for name in names})
    second.set_progress_bar_config(disable=True)
    if job.offload == "model":
        second.enable_model_cpu_offload(device=job.device)
    elif job.offload == "sequential":
        second.enable_sequential_cpu_offload(device=job.device)
    return second


def enlarge(frames: npt.NDArray[np.floating[Any]], height: int, width: int) -> torch.Tensor:
    """(f, h, w, 3) in [0, 1] -> (1, 3, f, height, width) fp32 in [-1, 1], bilinearly."""
    small = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    large = torch.nn.functional.interpolate(small, (height, width), mode="bilinear", align_corners=False)
    return (2 * large - 1).transpose(0, 1)[None]


@torch.no_grad()
def noised_latents(second: Any, frames: npt.NDArray[np.floating[Any]], job: ReadyJob) -> torch.Tensor:
    """Where the second stage begins: the enlarged video's latents with the noise of its first step.

    Args:
        second: of `second_pipeline`.
        frames: (f, h, w, 3) in [0, 1], the first stage's.
        job: what is rendered.
    """
    vae, scheduler, device = second.vae, second.scheduler, second._execution_device
    clip = enlarge(frames, *job.size).to(device, vae.dtype)
    latents = vae.encode(clip).latent_dist.mode().float()
    mean, std = (
        torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    scheduler.set_timesteps(job.num_inference_steps, device=device)
    timesteps, _ = second.get_timesteps(job.num_inference_steps, scheduler.timesteps, job.strength, device)
    generator = torch.Generator("cpu").manual_seed(job.seed + 1)
    noise = torch.randn(latents.shape, generator=generator).to(device)
    add = scheduler.add_noise if hasattr(scheduler, "add_noise") else None
    latents, first = (latents - mean) / std, timesteps[:1]
    noisy: torch.Tensor = add(latents, noise, first) if add else scheduler.scale_noise(latents, first, noise)
    return noisy


def memory(job: ReadyJob, model: Model) -> dict[str, float | None]:
    """GiB that the second stage needs, by what needs it; None where a hub's files do not say before they are fetched.

    Activations are an estimate: the tensors that a block of the transformer holds at a time, and what the VAE's decoder
    held at 480x832 (`kernels/bench/NOTES.md`), which comes in their place.
    """
    config = model.transformer
    width = config.get("num_attention_heads", 0) * config.get("attention_head_dim", 0)
    tokens, itemsize = model.grid(*job.size, job.num_frames).tokens, job.torch_dtype.itemsize
    pattern = job.recipe.attention
    asked = None if pattern is None else guide_of(pattern, range(model.layers))
    guide, guided = asked or (FreeSwim(), set())
    # Residual stream and norm in fp32, q, k, v, their turned copies, output; the feed-forward layer's two.
    held = tokens * (itemsize * (8 * width + 2 * config.get("ffn_dim", 4 * width)) + 8 * width)
    kept = kept_bytes(1, 1, tokens, width, job.torch_dtype)
    here = layers_here(guide, len(guided), kept)
    waiting = len(guided) - here if guide.guide > 1 else 0
    height, width_px = job.size
    parts = _weight_bytes(model, job)
    known = [size for size in parts.values() if size is not None]
    # Model offload has one part there at a time, the others a layer or less.
    weights = {"none": sum(known), "model": max(known, default=0)}.get(job.offload, 0)
    found: dict[str, float | None] = {
        "weights": weights,
        **{f"weights of {name}": None for name, size in parts.items() if size is None},
        "weights in host memory": sum(known) - weights,
        _BLOCK: held * (2 if guided else 1),
        _KEPT: here * kept,
        _DECODER: _DECODED * model.vae.get("base_dim", 96) * 4 * height * width_px * _VAE_ITEMSIZE,
        "cross-attention outputs in host memory": waiting * kept,
        "frames in host memory": 3 * 4 * job.num_frames * height * width_px,
    }
    return {name: None if size is None else size / 2**30 for name, size in found.items() if size != 0}


def most(needs: Mapping[str, float | None]) -> float:
    """GiB on the device at a time, of what `memory` found and knows."""
    gib = {name: size or 0 for name, size in needs.items()}
    return gib.get("weights", 0) + max(gib[_BLOCK] + gib.get(_KEPT, 0), gib[_DECODER])


def _weight_bytes(model: Model, job: ReadyJob) -> dict[str, int | None]:
    """Bytes of each part's weights as they are loaded.

    Of what is on the hub, or here without safetensors, by its configuration, if that is there.
    """
    count: dict[str, int | None] = {}
    for name in ("text_encoder", "transformer", "vae"):
        files = [] if model.kind == "hub" else sorted((model.folder / name).glob("*.safetensors"))
        count[name] = sum(map(_parameters, files)) if files else _configured(model, name)
    itemsize = {"vae": _VAE_ITEMSIZE}
    return {
        name: None if number is None else number * itemsize.get(name, job.torch_dtype.itemsize)
        for name, number in count.items()
    }


def _configured(model: Model, name: str) -> int | None:
    """Parameters of a part that is built without memory."""
    library, kind = model.index[name]
    if library not in ("diffusers", "transformers") or not (model.folder / name / "config.json").is_file():
        return None
    try:
        config, made = read_json(model.folder / name / "config.json"), getattr(import_module(library), kind)
        with torch.device("meta"):
            part = made.from_config(config) if library == "diffusers" else made(made.config_class.from_dict(config))
    # A configuration of a newer release, say; it is no reason not to begin.
    except Exception:
        return None
    return sum(int(parameter.numel()) for parameter in part.parameters())


def _parameters(file: Path) -> int:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length)) if length <= _HEADER_BYTES else {}
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
