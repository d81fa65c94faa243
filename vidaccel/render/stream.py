"""Autoregressive videos from the command line: a causal model by name, chunks into an mp4 that plays as it grows."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import _samples
from ..env import environment
from ..errors import ModelError, RenderError, UsageError
from ..parallel import enable_parallelism
from ..reuse import AnnCross, CausalAnn, CausalLightForcing, FlashBlock, HybridMemory, TempCache
from ..streaming import ROLLOUTS, Rollout
from . import video, weights
from .job import DTYPES, check_device, check_limit
from .models import Model, find
from .source import read_json
from .video_stream import VideoStream

SAMPLE = "sample-causal"
_CLASS = "CausalWanPipeline"
# Whose parts a folder shares that holds a causal transformer alone.
_BASE = "wan-tiny"
# Types of settings that a command line can give, and what fits them.
_PLAIN: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
# What a video is where neither the job nor the model says.
USUAL = {"height": 480, "width": 832, "num_frames": 81, "fps": 16, "max_sequence_length": 512}
METHODS: dict[str, type[Any]] = {
    "ann": CausalAnn,
    "ann-cross": AnnCross,
    "flashblock": FlashBlock,
    "hybrid": HybridMemory,
    "light-forcing": CausalLightForcing,
    "tempcache": TempCache,
}


@dataclass(frozen=True)
class StreamJob:
    """What to stream.

    Attributes:
        prompt: what to show.
        model: "sample-causal", a folder, or a hub id.
        rollout: a preset's name; None takes the model's own.
        methods: names and settings of methods.
        density: one budget over all of them; None leaves each its own.
        height, width, num_frames, fps, max_sequence_length: None takes the model's own.
        steps: along the scheduler for each chunk; None takes the rollout's own few steps.
        guidance: None is 1, no guidance.
        negative_prompt: what not to show, under guidance.
        image: file of the first frame.
        video: file of the video that is gone on with, from the end of its last 4k+1 frames that fit.
        seed: of the noise; None draws one.
        dtype: None is float32 on CPUs and bfloat16 on GPUs.
        device: None is a GPU where there is one.
        graphs: play forwards back that come again, as CUDA graphs.
        offload_cache: keep keys and values in host memory.
        even_if_slower: choose blocks even where dense attention is as fast.
    """

    prompt: str
    model: str = SAMPLE
    rollout: str | None = None
    methods: tuple[Any, ...] = ()
    density: float | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    image: str | None = None
    video: str | None = None
    max_sequence_length: int | None = None
    seed: int | None = None
    dtype: str | None = None
    device: str | None = None
    graphs: bool = False
    offload_cache: bool = False
    even_if_slower: bool = False


class ChunkDone(NamedTuple):
    """One chunk that is in the file.

    Attributes:
        number: from 0.
        frames: pixel frames so far.
        total: pixel frames in all.
        seconds: it took, decoding included.
        density: of its attention.
        note: why it ran as it did.
        cache_bytes: keys and values.
    """

    number: int
    frames: int
    total: int
    seconds: float
    density: float
    note: str
    cache_bytes: int


def is_causal(reference: str) -> bool:
    """Whether a model is made for streaming, by its name or its folder."""
    folder = _folder(reference)
    return (
        reference == SAMPLE or _is_bare(folder) or _optional(folder / "model_index.json").get("_class_name") == _CLASS
    )


def methods_from(names: Sequence[str], settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """Methods from their names and "name.setting" values.

    Raises:
        UsageError: an unknown name or setting, or values that cannot be.
    """
    found: dict[str, Any] = {}
    for name in names:
        if name not in METHODS:
            raise UsageError(f"method {name!r} was asked for; there are {', '.join(METHODS)}")
        found[name] = METHODS[name]()
    for key, value in settings.items():
        name, _, setting = key.partition(".")
        known = {field.name: str(field.type) for field in fields(METHODS[name])} if name in found else {}
        if setting not in known:
            has = f"{name} has {', '.join(sorted(known))}" if known else f"{name!r} is none of the methods asked for"
            raise UsageError(f"--set {key} was given; {has}")
        kind = known[setting].removesuffix(" | None")
        if kind not in _PLAIN:
            raise UsageError(f"--set {key} was given; it takes {kind}, which only Python can give")
        if not (value is None and kind != known[setting]) and type(value) not in _PLAIN[kind]:
            raise UsageError(f"--set {key}={value} was given; it takes {known[setting]}")
        found[name] = replace(found[name], **{setting: value})
    return tuple(found.values())


def open_stream(job: StreamJob, together: int = 1) -> tuple[Any, StreamJob]:
    """The pipeline, and the job with what was left out filled in.

    A folder with nothing but a `transformer` (and a `rollout.json`, and a `defaults.json`) shares tokenizer, text
    encoder, VAE and scheduler with the sample wan-tiny.

    Args:
        job: what to stream.
        together: processes that share the video, of those that `torch.distributed` knows.

    Raises:
        UsageError, ModelError: no such model, or settings that it does not take.
    """
    from ..pipelines.causal_wan import CausalWanPipeline

    for name in ("num_frames", "height", "width"):
        given = getattr(job, name)
        if given is not None and given <= 0:
            raise UsageError(f"{name} {given} was asked for; it must be above 0")
    for name, limit in (("steps", "num_inference_steps"), ("guidance", "guidance_scale")):
        check_limit(limit, getattr(job, name), name)
    for name in ("fps", "max_sequence_length", "seed"):
        check_limit(name, getattr(job, name))
    if job.image and job.video:
        raise UsageError("an image and a video were both given; a stream begins with one of them")
    for name in ("image", "video"):
        if (beginning := getattr(job, name)) and not Path(beginning).is_file():
            raise UsageError(f"{name} {beginning} was given, which is not a file")
    # Whether they can be read is said before weights are loaded.
    if job.image:
        video.read_image(Path(job.image), 1, 1)
    if job.video:
        video.read_frames(Path(job.video), 1)
    if job.negative_prompt is not None and (job.guidance or 1) <= 1:
        raise UsageError(
            "a negative prompt was given, but guidance is off, so it has no effect; add --guidance above 1 to a model "
            "that was trained with it, or leave it out"
        )
    device = check_device(job.device)
    dtype = job.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown; possible: {', '.join(DTYPES)}")
    if (job.graphs or job.offload_cache) and not device.startswith("cuda"):
        what = "--graphs" if job.graphs else "--offload cache"
        raise UsageError(f"{what} was asked for on {device}; it needs a GPU")
    folder = _folder(job.model)
    rollout: Rollout | None = None if job.rollout is None else Rollout.of(job.rollout)
    if _is_bare(folder):
        base = find(_BASE)
        rollout = rollout or Rollout.of(_optional(folder / "rollout.json"))
        defaults = base.defaults() | _optional(folder / "defaults.json")
        pipe = _bare(CausalWanPipeline, folder, base, rollout, DTYPES[dtype])
    elif job.model == SAMPLE and not folder.is_dir():
        raise ModelError(f"this installation has no {SAMPLE}; name a folder or a hub id with --model")
    else:
        model = find(job.model)
        own = model.index.get("rollout")
        if rollout is None and not own:
            raise UsageError(
                f"{job.model} is a {model.pipeline} that does not say how it rolls out; take --model {SAMPLE}, "
                f"or a causal model and name its training with --rollout: {', '.join(ROLLOUTS)}"
            )
        defaults = model.defaults() if model.pipeline != _CLASS else _optional(model.folder / "defaults.json")
        pipe = weights.load_as(CausalWanPipeline, model, DTYPES[dtype], rollout=rollout or Rollout.of(own or {}))
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    if together > 1:
        # Over gloo tokens must divide; heads need not.
        heads = pipe.transformer.config.num_attention_heads
        enable_parallelism(pipe, together, uneven=device != "cpu" or heads % together != 0)
    filled: dict[str, Any] = {
        **{
            name: given if (given := getattr(job, name)) is not None else defaults.get(name, usual)
            for name, usual in USUAL.items()
        },
        # Few-step models are taught without guidance.
        "guidance": job.guidance if job.guidance is not None else 1.0,
        "seed": random.SystemRandom().randrange(2**31) if job.seed is None else job.seed,
        "dtype": dtype,
        "device": device,
    }
    return pipe, replace(job, **filled)


def stream(pipe: Any, job: StreamJob, path: Path, on_chunk: Callable[[ChunkDone], None]) -> dict[str, Any]:
    """Make the video, chunk by chunk into its file. An interruption leaves what is finished.

    Returns:
        What was made, as plain data.

    Raises:
        RenderError: a frame that holds NaN.
    """
    assert job.height is not None
    assert job.width is not None
    assert job.num_frames is not None
    assert job.fps is not None
    assert job.seed is not None
    chunks = begin(pipe, job)
    made: list[dict[str, Any]] = []
    start = before = time.perf_counter()
    with VideoStream(path, (job.height, job.width), job.fps, record(pipe, job)) as file:
        for chunk in chunks:
            if broken := video.count_nan(chunk.frames[0]):
                kept = f"the {file.frames} frames before them are in {path}" if file.frames else "no file was written"
                raise RenderError(
                    f"{broken} frames of chunk {chunk.number} hold NaN; {kept}. Try dtype float32, or no methods"
                )
            file.write(video.to_uint8(chunk.frames[0]))
            now = time.perf_counter()
            done = ChunkDone(
                chunk.number, file.frames, job.num_frames, now - before, chunk.density, chunk.note, chunk.cache_bytes
            )
            before = now
            made.append(done._asdict())
            on_chunk(done)
    return {
        "file": str(path),
        "frames": file.frames,
        "seconds": time.perf_counter() - start,
        "frames_per_second": file.frames / (time.perf_counter() - start),
        "reuse_rate": chunks.model.reuse_rate,
        "seed": job.seed,
        "chunks": made,
    }


def begin(pipe: Any, job: StreamJob) -> Any:
    """The job's video as an iterator over chunks; nothing is computed before the first one is asked for."""
    assert job.seed is not None
    return pipe.stream(
        job.prompt,
        job.negative_prompt,
        **_beginning(pipe, job),
        height=job.height,
        width=job.width,
        num_frames=job.num_frames,
        num_inference_steps=job.steps,
        guidance_scale=job.guidance,
        max_sequence_length=job.max_sequence_length,
        generator=torch.Generator("cpu").manual_seed(job.seed),
        methods=job.methods,
        density=job.density,
        cuda_graphs=job.graphs,
        offload_cache=job.offload_cache,
        even_if_slower=job.even_if_slower,
    )


def _beginning(pipe: Any, job: StreamJob) -> dict[str, Any]:
    """The job's image or video, read.

    Raises:
        UsageError, VideoError: a file that cannot be read, or a video that leaves nothing to make.
    """
    assert job.height is not None
    assert job.width is not None
    assert job.num_frames is not None
    if job.image:
        return {"image": video.read_image(Path(job.image), job.height, job.width)}
    if not job.video:
        return {}
    clip = video.read_frames(Path(job.video), job.num_frames)
    if len(clip) in (0, job.num_frames):
        raise UsageError(
            f"{job.video} has {len(clip) or 'no'} frames{' or more' if len(clip) else ''}, {job.num_frames} were asked "
            "for, those of the video included; ask for more with --frames"
        )
    scale = pipe.vae_scale_factor_temporal
    return {"video": clip[(len(clip) - 1) % scale :].astype(np.float32) / 255}


def record(pipe: Any, job: StreamJob) -> dict[str, Any]:
    """What a video says of itself."""
    here = environment()
    settings = {name: value for name, value in asdict(job).items() if name != "methods"}
    names = {kind: name for name, kind in METHODS.items()}
    return {
        "vidaccel": 1,
        "stream": settings | {"rollout": pipe.rollout.to_dict()},
        "methods": {names[type(method)]: asdict(method) for method in job.methods},
        "versions": here["versions"],
        "machine": here["device"],
    }


def check_weights(reference: str) -> None:
    """Refuse a model whose weights are missing or pickled, before anything opens them.

    Raises:
        UsageError: there is no such model, or its weights are no safetensors.
    """
    folder = _folder(reference)
    if _is_bare(folder):
        if not any((folder / "transformer").glob("*.safetensors")):
            raise UsageError(f"{folder}/transformer has no safetensors; save it again with save_pretrained")
        reference = _BASE
    model = find(reference)
    weights.check_weights(model, model.folder)


def _folder(reference: str) -> Path:
    return _samples.path(reference) if reference in _samples.MODELS else Path(reference).expanduser()


def _is_bare(folder: Path) -> bool:
    return (folder / "transformer" / "config.json").is_file() and not (folder / "model_index.json").is_file()


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _bare(cls: Any, folder: Path, base: Model, rollout: Rollout, dtype: torch.dtype) -> Any:
    from diffusers import WanTransformer3DModel

    check_weights(str(folder))
    shared = weights.load(base, dtype).components
    transformer = WanTransformer3DModel.from_pretrained(
        str(folder / "transformer"), dtype=dtype, use_safetensors=True, local_files_only=True
    )
    parts = {name: shared[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    return cls(**parts, transformer=transformer, rollout=rollout)
