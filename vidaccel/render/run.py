"""Running a job: the pipeline, its frames, their times and densities, and a video that says how it was made."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..api import Acceleration, accelerate
from ..env import environment
from ..errors import RenderError, UsageError, VidaccelError
from ..parallel import enable_parallelism
from ..ranks import stopped
from ..recipe import Recipe
from ..report import Report
from . import dense, upscale, video, weights
from .job import DENSE, ReadyJob
from .models import Model


class StepDone(NamedTuple):
    """One denoising step that has ended.

    Attributes:
        step: its number, from 0.
        total: how many there are.
        density: mean density of its sparse layers; None where all of it ran dense.
    """

    step: int
    total: int
    density: float | None


@dataclass(frozen=True)
class Rendering:
    """A finished render.

    Attributes:
        frames: (f, h, w, 3) bytes.
        seconds: "denoise" (first transformer call to the latents), "decode" (the VAE) and "total".
        report: densities, kernels and times of every call.
        problems: what looks broken, such as black frames.
        sha256: of the raw frames.
    """

    frames: video.Frames
    seconds: dict[str, float]
    report: Report
    problems: list[str]
    sha256: str


def open_pipeline(job: ReadyJob, model: Model, together: int = 1) -> Any:
    """Load the pipeline and put it where the job wants it.

    Args:
        job: what will be rendered first.
        model: the pipeline.
        together: processes that share each of its videos, of those that `torch.distributed` knows.
    """
    # What is wrong with a file is said before weights are loaded.
    _beginning(job)
    pipe = weights.load(model, job.torch_dtype, image=bool(job.image), video=bool(job.video))
    try:
        if job.offload == "model":
            pipe.enable_model_cpu_offload(device=job.device)
        elif job.offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=job.device)
        elif job.offload == "group":
            pipe.enable_group_offload(onload_device=torch.device(job.device), offload_type="leaf_level")
        else:
            pipe.to(job.device)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise _failure(
            f"{model.reference} could not be placed on {job.device} with offload {job.offload}", error
        ) from error
    if together > 1:
        tokens = [model.grid(*size, job.num_frames).tokens for size in ((job.height, job.width), job.size)]
        heads = model.transformer.get("num_attention_heads", 1)
        odd = any(many % together for many in tokens)
        # Text that attends with the video need not divide either.
        uneven = odd or heads % together != 0 or model.family.split_plan(pipe.transformer) is not None
        # Over gloo, video tokens must.
        enable_parallelism(pipe, together, uneven=uneven and not (odd and job.device == "cpu"))
    return pipe


def render(pipe: Any, job: ReadyJob, on_step: Callable[[StepDone], None] | None = None) -> Rendering:
    """Run a complete job; equal to calling the pipeline under `vidaccel.accelerate` by hand.

    With `upscale` that happens twice: dense at the job's own size, then with its recipe at the enlarged one. The report
    is the second stage's, times are those of both.

    Raises:
        RenderError: the pipeline failed, or its frames hold NaN.
    """
    if job.upscale is None:
        frames, seconds, report = _run(pipe, job, job.recipe, pipeline_arguments(pipe, job), on_step)
    else:
        small, first, _ = _run(pipe, job, DENSE, pipeline_arguments(pipe, job), on_step)
        second = upscale.second_pipeline(pipe, job)
        given = pipeline_arguments(second, job) | {
            "height": job.size[0],
            "width": job.size[1],
            "latents": upscale.noised_latents(second, small, job),
        }
        frames, seconds, report = _run(second, job, job.recipe, given, on_step)
        seconds = {name: seconds[name] + first[name] for name in seconds}
    made = video.to_uint8(frames)
    return Rendering(made, seconds, report, video.problems(made), video.digest(made))


def _run(
    pipe: Any, job: ReadyJob, recipe: Recipe, arguments: dict[str, Any], on_step: Callable[[StepDone], None] | None
) -> tuple[npt.NDArray[np.floating[Any]], dict[str, float], Report]:
    """One stage: its frames (f, h, w, 3) in [0, 1], its times and its report."""
    head_dim = int(pipe.transformer.config.get("attention_head_dim", 64))
    # Algorithms of cuDNN that differ from run to run would make another video of the same seed.
    with (
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
        dense.use(job.dense_backend, job.device, job.torch_dtype, head_dim),
        _accelerated(pipe, recipe) as run,
        timed(pipe, job.device) as seconds,
    ):
        if on_step and "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
            arguments["callback_on_step_end"] = _watcher(run, on_step, pipe)
        try:
            found = pipe(**arguments, output_type="np").frames[0]
        except VidaccelError:
            raise
        except Exception as error:
            raise _failure("the render failed", error) from error
    if broken := video.count_nan(found):
        raise RenderError(
            f"{broken} of {len(found)} frames hold NaN, so no video was written; "
            "try dtype float32 or bfloat16, attention dense, or another dense backend, to see where it comes from"
        )
    return found, seconds, run.report().with_seconds(seconds)


def record(rendering: Rendering, job: ReadyJob, model: Model, fingerprint: str) -> dict[str, Any]:
    """What a video says of itself. No dates, times or places: the same render gives the same bytes."""
    here = environment()
    return {
        "vidaccel": 1,
        "job": job.to_dict(),
        "model": {
            "reference": model.reference,
            "kind": model.kind,
            "pipeline": model.pipeline,
            "revision": model.revision,
            "fingerprint": fingerprint,
        },
        "recipe": job.recipe.to_dict(),
        "recipe_hash": job.recipe.hash,
        "frames_sha256": rendering.sha256,
        "problems": rendering.problems,
        "versions": here["versions"],
        "machine": here["device"],
    }


def save(
    path: Path, rendering: Rendering, job: ReadyJob, model: Model, fingerprint: str | None = None
) -> dict[str, Any]:
    """Write the mp4, whole or not at all, an existing file replaced. Returns the record in it."""
    data = record(rendering, job, model, fingerprint or weights.fingerprint(model))
    video.write(path, rendering.frames, job.fps, data)
    return data


def _accelerated(pipe: Any, recipe: Recipe) -> Acceleration:
    return accelerate(pipe, recipe=recipe)


def pipeline_arguments(pipe: Any, job: ReadyJob) -> dict[str, Any]:
    """What a pipeline is called with: the job's values that it takes, image and video read.

    Raises:
        UsageError: a file that cannot be read, or a video that is too short.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    names: tuple[str, ...] = (
        "prompt",
        "negative_prompt",
        "height",
        "width",
        "num_frames",
        "num_inference_steps",
        "guidance_scale",
    )
    names += ("max_sequence_length", "strength")
    found = {name: getattr(job, name) for name in names if name in parameters and getattr(job, name) is not None}
    found["generator"] = torch.Generator("cpu").manual_seed(job.seed)
    return found | _beginning(job)


def _beginning(job: ReadyJob) -> dict[str, Any]:
    """The job's image or video, read."""
    from PIL import Image

    if job.image:
        return {"image": video.read_image(Path(job.image), job.height, job.width)}
    if not job.video:
        return {}
    clip = video.read_frames(Path(job.video), job.num_frames)
    if len(clip) < job.num_frames:
        raise UsageError(
            f"{job.video} has {len(clip)} frames, {job.num_frames} were asked for; ask for as many or fewer"
        )
    return {"video": [Image.fromarray(frame) for frame in clip]}


def _watcher(run: Acceleration, on_step: Callable[[StepDone], None], host: Any) -> Callable[..., dict[str, Any]]:
    def watch(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        sparse = [density for _, density in run.trace.calls[-1].scheduled] if run.trace.calls else []
        total = getattr(host, "_num_timesteps", None) or index + 1
        on_step(StepDone(index, total, sum(sparse) / len(sparse) if sparse else None))
        return {}

    return watch


@contextlib.contextmanager
def timed(pipe: Any, device: str) -> Iterator[dict[str, float]]:
    """Times of denoising and decoding apart, seen from outside: the pipeline's own decoding is the one that runs."""
    seconds = {"denoise": 0.0, "decode": 0.0, "total": 0.0}
    first: list[float] = []

    def now() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def begin(module: torch.nn.Module, inputs: Any) -> None:
        if not first:
            first.append(now())

    compiled = vars(pipe.vae).get("decode")
    own_decode = pipe.vae.decode

    def decode(*args: Any, **kwargs: Any) -> Any:
        start = now()
        if first:
            seconds["denoise"] = start - first[0] - seconds["decode"]
        try:
            return own_decode(*args, **kwargs)
        finally:
            seconds["decode"] += now() - start

    experts = [module for name in ("transformer", "transformer_2") if (module := getattr(pipe, name, None)) is not None]
    hooks = [module.register_forward_pre_hook(begin) for module in experts]
    vars(pipe.vae)["decode"] = decode
    start = now()
    try:
        yield seconds
        seconds["total"] = now() - start
    finally:
        del vars(pipe.vae)["decode"]
        if compiled is not None:
            vars(pipe.vae)["decode"] = compiled
        for hook in hooks:
            hook.remove()


def _failure(what: str, error: BaseException) -> RenderError:
    if isinstance(error, torch.OutOfMemoryError):
        return RenderError(
            f"{what}: the GPU ran out of memory; try offload model or group, fewer frames, or a smaller size"
        )
    if message := stopped(error):
        return RenderError(f"{what}: {message}")
    lines = str(error).strip().splitlines()
    return RenderError(f"{what}: {type(error).__name__}: {lines[0][:300] if lines else ''}")
