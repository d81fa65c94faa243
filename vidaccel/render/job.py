"""What to render, as plain data: checked against a model's configuration and this machine, not run."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from ..patterns import Dense
from ..recipe import Recipe
from . import dense, models, upscale
from .models import Model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OFFLOADS = ("none", "model", "sequential", "group")
LIMITS: dict[str, tuple[int, int]] = {
    "num_inference_steps": (1, 1000),
    "fps": (1, 240),
    "guidance_scale": (0, 100),
    "max_sequence_length": (1, 4096),
    "seed": (0, 2**63 - 1),
}
# Bytes of the prompts in a video's record, which holds `video.MOST_BYTES` in all.
MOST_PROMPT = 50_000
DENSE = Recipe(attention=Dense())


@dataclass(frozen=True)
class RenderJob:
    """What to render. What is None is filled by `complete`.

    Attributes:
        prompt: what to show.
        model: a sample's name, a folder or a hub id.
        recipe: what runs sparse; `DENSE` runs everything dense.
        negative_prompt: what not to show.
        height: pixels.
        width: pixels.
        num_frames: frames.
        fps: frames in a second, of the file.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance.
        max_sequence_length: text tokens.
        seed: of the noise; None takes one at random.
        image: file of the first frame, for image-to-video.
        video: file of a video to start from, for video-to-video.
        strength: in (0, 1], how much of `video`, or of the enlarged video, is made anew.
        upscale: 2, 3 or 4 renders at `height` and `width`, enlarges and refines with the recipe; None does not.
        dtype: "float32", "bfloat16" or "float16"; None is float32 on CPUs and bfloat16 on GPUs.
        device: "cpu", "cuda", "cuda:1", "mps"; None is a GPU where there is one.
        dense_backend: diffusers' attention backend for dense layers; None is diffusers' default.
        offload: "none", "model", "sequential" or "group".
        inputs: SHA-256 of `image` and `video`, by name.
    """

    prompt: str
    model: str = "wan-tiny"
    recipe: Recipe = DENSE
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    max_sequence_length: int | None = None
    seed: int | None = None
    image: str | None = None
    video: str | None = None
    strength: float | None = None
    upscale: int | None = None
    dtype: str | None = None
    device: str | None = None
    dense_backend: str | None = None
    offload: str = "none"
    inputs: dict[str, str] = field(default_factory=dict)

    def complete(self, model: Model) -> ReadyJob:
        """The job with every None filled in, its values checked against the model's configuration and this machine.

        Raises:
            UsageError: a value that cannot be; the message names those that can.
        """
        device = check_device(self.device)
        dtype = self.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
        known = model.defaults()
        given = {name: getattr(self, name) for name in models.SETTINGS if getattr(self, name) is not None}
        for name in given.keys() - known.keys():
            raise UsageError(f"{name} was given, but a {model.pipeline} takes none")
        inputs = {name: _file_digest(value) for name in ("image", "video") if (value := getattr(self, name))}
        seed = random.SystemRandom().randrange(2**31) if self.seed is None else self.seed
        strength = self.strength
        if strength is None and (self.video or self.upscale):
            strength = 0.8 if self.video else upscale.STRENGTH
        filled = {"seed": seed, "strength": strength, "dtype": dtype, "device": device, "inputs": inputs}
        job = ReadyJob(**{**vars(self), **known, **given, **filled})
        job.check(model)
        return job

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the model's name and the recipe stand elsewhere in a video's record."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("model", "recipe")}


@dataclass(frozen=True)
class ReadyJob(RenderJob):
    """A job that lacks nothing; `RenderJob.complete` makes one."""

    height: int = 0
    width: int = 0
    num_frames: int = 0
    fps: float = 0
    num_inference_steps: int = 0
    seed: int = 0
    dtype: str = ""
    device: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the video in pixels, enlarged where it is."""
        return self.height * (self.upscale or 1), self.width * (self.upscale or 1)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype that it computes in."""
        return DTYPES[self.dtype]

    def check(self, model: Model) -> None:
        """Compare every value with what the model and this machine can do.

        Raises:
            UsageError: a value that cannot be; the message names those that can.
        """
        model.grid(self.height, self.width, self.num_frames)
        for name in LIMITS:
            check_limit(name, getattr(self, name))
        check_prompts(self.prompt, self.negative_prompt)
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype {self.dtype!r} is unknown; possible: {', '.join(DTYPES)}")
        if self.offload not in OFFLOADS:
            raise UsageError(f"offload {self.offload!r} is unknown; possible: {', '.join(OFFLOADS)}")
        if self.device == "cpu" and (self.dtype == "float16" or self.offload != "none"):
            what = "dtype float16" if self.dtype == "float16" else f"offload {self.offload}"
            raise UsageError(f"{what} needs a GPU; on a CPU take float32 or bfloat16, and no offload")
        if self.dense_backend is not None:
            dense.check_name(self.dense_backend)
        if self.image and self.video:
            raise UsageError("an image and a video were both given; a render starts from one of them")
        if self.strength is not None and not ((self.video or self.upscale) and 0 < self.strength <= 1):
            raise UsageError(
                f"strength {self.strength} was given; it lies in (0, 1] and needs a video to start from, or an upscale"
            )
        if self.upscale is not None:
            upscale.check(self, model)
        if self.image or self.video or model.kind != "sample":
            model.pipeline_class(image=bool(self.image), video=bool(self.video))


def check_device(device: str | None) -> str:
    """A device that is there: the one named, or the best one.

    Raises:
        UsageError: it is not there.
    """
    there = ["cpu"]
    if torch.cuda.is_available():
        there += ["cuda", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there.append("mps")
    if device is not None and device not in there:
        raise UsageError(f"device {device!r} is not on this machine; it has {', '.join(there)}")
    return device or next(name for name in ("cuda", "mps", "cpu") if name in there)


def check_limit(name: str, value: float | None, called: str | None = None) -> None:
    """Whether a setting lies in its range; None is left to others.

    Raises:
        UsageError: it does not; the message calls it `called`.
    """
    low, high = LIMITS[name]
    if value is not None and not low <= value <= high:
        raise UsageError(f"{called or name} {value} was asked for; it lies in {low} to {high}")


def check_prompts(prompt: str, negative: str | None = None) -> None:
    """Whether a video's record has room for what is to be shown, and not.

    Raises:
        UsageError: it has not, or nothing is to be shown.
    """
    if not prompt.strip():
        raise UsageError("the prompt is empty; say what to show")
    if (size := len(json.dumps([prompt, negative]))) > MOST_PROMPT:
        raise UsageError(
            f"prompt {prompt[:30]!r}... takes {size} bytes of the video's record with its negative prompt; there is "
            f"room for {MOST_PROMPT}: shorten it"
        )


def _file_digest(name: str) -> str:
    # Names may come from a record that somebody else wrote: devices and pipes never end.
    if not Path(name).is_file():
        raise UsageError(f"{name} is not a file")
    try:
        with Path(name).open("rb") as file:
            total = hashlib.sha256()
            while chunk := file.read(2**20):
                total.update(chunk)
        return total.hexdigest()
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror or error}") from None
