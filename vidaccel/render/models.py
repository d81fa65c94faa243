"""Which pipeline a name means, and what is known of it without its weights.

A model is a sample that ships with vidaccel, a folder that `save_pretrained` wrote, or an id on the Hugging Face hub.
Its files are untrusted: JSON of limited size, classes of diffusers and transformers only, weights as safetensors only.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .. import _samples
from ..errors import InstallError, UsageError
from ..family import FAMILIES, Family, family_named
from ..grid import VideoGrid
from .source import fetch, possible, read_json

Kind = Literal["sample", "folder", "hub"]
SETTINGS = ("height", "width", "num_frames", "fps", "num_inference_steps", "guidance_scale", "max_sequence_length")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Model:
    """The configuration of a pipeline.

    Attributes:
        reference: the name as given.
        kind: what the name means.
        folder: where its JSON files are; those of a hub id are in the hub's cache, its weights perhaps not yet.
        pipeline: name of the pipeline's class.
        transformer: `transformer/config.json`.
        vae: `vae/config.json`.
        index: `model_index.json`.
    """

    reference: str
    kind: Kind
    folder: Path
    pipeline: str
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    index: Mapping[str, Any] = field(repr=False)

    @property
    def revision(self) -> str | None:
        """The hub's commit."""
        return self.folder.name if self.kind == "hub" else None

    @property
    def family(self) -> Family:
        """The family of its transformer."""
        return family_named(self.index["transformer"][1])

    @property
    def experts(self) -> int:
        """How many transformers it has: Wan 2.2 A14B has two."""
        return 2 if (self.index.get("transformer_2") or [None, None])[1] else 1

    @property
    def layers(self) -> int:
        """Layers of its transformer; HunyuanVideo has two kinds."""
        layers = [self.transformer.get("num_layers", 1), self.transformer.get("num_single_layers", 0)]
        if not all(isinstance(number, int) and 0 <= number <= 1000 for number in layers) or not sum(layers):
            raise UsageError(f"{self.reference}: the config of its transformer gives no number of layers")
        return sum(layers)

    @property
    def strides(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels in one latent token; along time the first frame stands alone."""
        vae, transformer = self.vae, self.transformer
        try:
            time, space = _compression(vae)
            patch = transformer.get("patch_size", 2)
            t, y, x = patch if isinstance(patch, list) else (transformer.get("patch_size_t") or 1, patch, patch)
            strides = time * int(t), space * int(y), space * int(x)
        except (KeyError, TypeError, ValueError):
            strides = (0, 0, 0)
        if not all(0 < stride <= 4096 for stride in strides):
            raise UsageError(
                f"{self.reference}: the configs of vae and transformer give no usable scale factors and patch size"
            )
        return strides

    def grid(self, height: int, width: int, num_frames: int) -> VideoGrid:
        """Latent tokens of a video of this size.

        Raises:
            UsageError: a size that the VAE or the patches do not divide; the message names the nearest that fit.
        """
        time, *space = self.strides
        # Every pipeline of diffusers wants pixels in multiples of 16 or more.
        for name, size, stride in zip(
            ("height", "width"), (height, width), (math.lcm(16, s) for s in space), strict=True
        ):
            if size < 1 or size % stride:
                raise UsageError(
                    f"{name} {size} does not fit {self.reference}: it takes multiples of {stride}; "
                    f"{_nearest(size, stride, 0)}"
                )
        if num_frames < 1 or (num_frames - 1) % time:
            raise UsageError(
                f"{num_frames} frames do not fit {self.reference}: it takes {time}k+1 frames; "
                f"{_nearest(num_frames, time, 1)}"
            )
        grid = VideoGrid((num_frames - 1) // time + 1, height // space[0], width // space[1])
        longest = self.transformer.get("rope_max_seq_len")
        if isinstance(longest, int) and max(grid) > longest:
            raise UsageError(
                f"a grid of {grid} tokens is too large for {self.reference}: each axis holds at most {longest}"
            )
        return grid

    def defaults(self) -> dict[str, Any]:
        """Settings for what a user leaves out: those in the model's `defaults.json`, else its pipeline's own."""
        shipped = read_json(self.folder / "defaults.json") if (self.folder / "defaults.json").is_file() else {}
        given = {key: value for key, value in shipped.items() if _is_setting(key, value)}
        if set(given) < set(SETTINGS):
            parameters = inspect.signature(self._class(self.pipeline).__call__).parameters
            own = {key: parameters[key].default for key in SETTINGS if key in parameters}
            own = self.family.defaults(self.transformer) | {k: v for k, v in own.items() if _is_setting(k, v)}
            given = own | given
        return given

    def pipeline_class(self, *, image: bool = False, video: bool = False) -> Any:
        """The class to load: the model's own, or a sister class that takes an image or a video and has the same parts.

        Raises:
            UsageError: neither takes what is given, or the class does not exist here.
        """
        name = self.pipeline
        if video and name == "WanPipeline" and not self.index.get("transformer_2", [None, None])[1]:
            name = "WanVideoToVideoPipeline"
        elif image and name == "WanPipeline" and self.index.get("expand_timesteps"):
            name = "WanImageToVideoPipeline"
        found = self._class(name)
        parameters = inspect.signature(found.__call__).parameters
        for given, argument, kind in ((image, "image", "an image-to-video"), (video, "video", "a video-to-video")):
            if given and argument not in parameters:
                raise UsageError(
                    f"{self.reference} is a {name} and takes no {argument}; --{argument} needs {kind} model"
                )
            if not given and argument in parameters and parameters[argument].default is inspect.Parameter.empty:
                raise UsageError(
                    f"{self.reference} is a {name} and needs --{argument}; for text alone take a text-to-video model"
                )
        return found

    def _class(self, name: str) -> Any:
        import diffusers

        found = getattr(diffusers, name, None)
        if not (inspect.isclass(found) and issubclass(found, diffusers.DiffusionPipeline)):
            raise UsageError(f"{self.reference} is a {name}, which diffusers {diffusers.__version__} does not have")
        return found


def find(reference: str, revision: str | None = None) -> Model:
    """The model a name means: a sample's name first, then a folder, then a hub id.

    Of a hub model only what says what it is is fetched, no weights.

    Raises:
        UsageError: no such model, no pipeline in it, or a transformer of no known family.
        ModelError: the hub cannot be asked, or does not give it.
    """
    if reference in _samples.MODELS:
        kind: Kind = "sample"
        folder = _samples.path(reference)
    elif (folder := Path(reference).expanduser()).is_dir():
        kind = "folder"
    elif _HUB_ID.fullmatch(reference) and not folder.exists():
        kind = "hub"
        folder = fetch(reference, revision, weights=False)
    else:
        raise UsageError(f"model {reference!r} is no sample, folder or hub id; {possible()}")
    if not (folder / "model_index.json").is_file():
        if (folder / "transformer" / "config.json").is_file():
            raise UsageError(
                f"{reference} is a transformer alone, which streams chunk by chunk with `vidaccel render --stream` and "
                "--method; recipes, and what searches or explains them, need a whole pipeline"
            )
        raise UsageError(f"{reference} holds no model_index.json, so it is not a diffusers pipeline; {possible()}")
    index = read_json(folder / "model_index.json")
    _check_index(reference, index)
    transformer, vae = (read_json(folder / part / "config.json") for part in ("transformer", "vae"))
    return Model(reference, kind, folder, index["_class_name"], transformer, vae, index)


def _check_index(reference: str, index: Mapping[str, Any]) -> None:
    if not isinstance(index.get("_class_name"), str):
        raise UsageError(f"{reference}: model_index.json names no pipeline class; it is not a diffusers pipeline")
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list):
            continue
        if (
            len(entry) != 2
            or not re.fullmatch(r"[a-z]\w*", name)
            or entry[0] not in ("diffusers", "transformers", None)
        ):
            raise UsageError(
                f"{reference}: model_index.json has {name}: {entry!r:.60}; "
                "only diffusers and transformers classes are loaded"
            )
    entry = index.get("transformer")
    transformer = entry[1] if isinstance(entry, list) else None
    if transformer not in FAMILIES:
        raise InstallError(
            f"{reference} is a {index['_class_name']} with {transformer or 'no transformer'}, "
            f"which vidaccel does not know; it knows {', '.join(sorted(FAMILIES))}"
        )


def _compression(vae: Mapping[str, Any]) -> tuple[int, int]:
    """Frames and pixels of one latent along time and along a side."""
    if "spatial_expansions" in vae:  # Mochi
        return math.prod(vae["temporal_expansions"]), math.prod(vae["spatial_expansions"])
    if "spatio_temporal_scaling" in vae:  # LTX-Video
        halvings = 2 ** sum(map(bool, vae["spatio_temporal_scaling"]))
        return int(vae["patch_size_t"]) * halvings, int(vae["patch_size"]) * halvings
    # Names of the same number in Wan and HunyuanVideo; CogVideoX halves once a block.
    halvings = 2 ** (len(vae.get("block_out_channels") or [0] * 4) - 1)
    space = int(vae.get("scale_factor_spatial") or vae.get("spatial_compression_ratio") or halvings)
    return int(vae.get("scale_factor_temporal") or vae.get("temporal_compression_ratio") or 4), space


def _is_setting(name: str, value: object) -> bool:
    return name in SETTINGS and type(value) in ((int, float) if name in ("fps", "guidance_scale") else (int,))


def _nearest(size: int, stride: int, rest: int) -> str:
    low = max(rest, (size - rest) // stride * stride + rest) or stride
    return f"nearest: {low}" + (f" and {low + stride}" if low < size else "")
