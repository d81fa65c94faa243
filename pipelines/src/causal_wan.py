"""Autoregressive video with Wan: `CausalWanPipeline`, a diffusers pipeline around the stock transformer.

For causal checkpoints of Wan 2.1 text-to-video: Self-Forcing, CausVid, LongLive, and others whose rollout is given by
hand. Chunk after chunk is denoised beside the keys and values of the frames before it, so that length costs neither
memory nor speed. See `vidaccel.streaming.Rollout` for what a checkpoint was trained with.

Example:
    >>> pipe = CausalWanPipeline.from_pretrained(folder, rollout="longlive", dtype=torch.bfloat16).to("cuda")
    >>> video = pipe("a cat playing piano", num_frames=81).frames[0]
    >>> for chunk in pipe.stream("a cat playing piano"):  # for ever, 12 frames at a time
    ...     show(chunk.frames[0])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, WanPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.video_processor import VideoProcessor

from ..errors import UsageError
from ..reuse import Methods
from ..streaming import FewStep, ManyStep, Replays, Rollout, Sampler
from .causal_attention import CausalTransformer
from .causal_stream import CausalStream, Guidance
from .streaming_vae import StreamingDecoder, encode

OUTPUT_TYPES = ("np", "pt", "pil", "latent")
OnStepEnd = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


class CausalWanPipeline(WanPipeline):  # type: ignore[misc]
    """Text, image or video to video, chunk by chunk.

    Args:
        tokenizer: as `WanPipeline`'s, like the next four.
        text_encoder: UMT5.
        vae: decodes without seams between chunks.
        scheduler: for many steps; models of a few steps do not use it.
        transformer: a stock `WanTransformer3DModel` with causal weights.
        rollout: what the weights were trained with: a name ("self-forcing", "causvid", "longlive", ...), a `Rollout`,
            or its settings.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components: list[str] = []

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        vae: Any,
        scheduler: Any,
        transformer: Any,
        rollout: Rollout | str | Mapping[str, Any] = "self-forcing",
    ) -> None:
        # Of WanPipeline the text encoding and LoRA loading are used; it would register a second expert too.
        DiffusionPipeline.__init__(self)
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, scheduler=scheduler, transformer=transformer
        )
        self.register_to_config(rollout=Rollout.of(rollout).to_dict())
        self.vae_scale_factor_temporal = vae.config.scale_factor_temporal
        self.vae_scale_factor_spatial = vae.config.scale_factor_spatial
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)

    @property
    def rollout(self) -> Rollout:
        """How its weights roll out."""
        return Rollout.of(self.config["rollout"])

    def stream(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        *,
        height: int = 480,
        width: int = 832,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        image: Any = None,
        video: Any = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "np",
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
        methods: Iterable[Any] = (),
        density: float | None = None,
        max_cache_bytes: int | None = None,
        offload_cache: bool = False,
        cuda_graphs: bool = False,
        even_if_slower: bool = False,
    ) -> CausalStream:
        """An iterator of chunks; none is made before it is asked for.

        Args:
            prompt: what to show; a list makes a batch.
            negative_prompt: what not to show, under guidance.
            height: pixels.
            width: pixels.
            num_frames: 4k+1 pixel frames, those of `image` or `video` included; None goes on for ever.
            num_inference_steps: steps along the scheduler for each chunk; None takes the rollout's few steps. Both
                with the rollout's shift, where the scheduler knows one.
            guidance_scale: of classifier-free guidance; 1 is none. Each branch has a cache of its own.
            image: the first frame.
            video: the first frames, 4k+1 of them; it goes on from there.
            generator: of the noise.
            latents: the first noise of all frames (b, channels, frames, height, width), instead of drawing it.
            prompt_embeds: instead of `prompt`.
            negative_prompt_embeds: instead of `negative_prompt`.
            output_type: "np" (b, f, h, w, 3), "pt" (b, f, 3, h, w), "pil" (lists) or "latent".
            callback_on_step_end: called with the pipeline, the step counted over the whole stream, the timestep, and
                the tensors below by name. What it returns for "latents" replaces them, nothing else does;
                `pipe._interrupt = True` ends the stream after the last whole chunk.
            callback_on_step_end_tensor_inputs: "latents", "prompt_embeds", "negative_prompt_embeds", or some of them;
                callbacks of diffusers' own classes name them themselves.
            max_sequence_length: text tokens.
            methods: what makes it faster: `FlashBlock`, `TempCache`, `HybridMemory`, `CausalLightForcing`,
                `CausalAnn`, `AnnCross` of `vidaccel.reuse`, in any order.
            density: one budget over all methods, of the pairs of a dense chunk (`Methods.within`); None leaves each
                its own.
            max_cache_bytes: of keys and values of each branch.
            offload_cache: keep them in host memory; slower, and the GPU holds one layer's at a time.
            cuda_graphs: play forwards back that come again, once the window is full: no launches from Python. Weights
                stay where they are meanwhile; compile the transformer's blocks as well.
            even_if_slower: choose blocks even in chunks where dense attention is as fast, by estimate; otherwise such
                chunks run dense, and their note says so.

        Raises:
            UsageError: a size, a number of frames, a beginning, an output or a callback's input that cannot be.
            InstallError: the transformer cannot run causally as it is.
        """
        self._check(prompt, prompt_embeds, negative_prompt, negative_prompt_embeds, height, width)
        if num_inference_steps is not None and num_inference_steps < 1:
            raise UsageError(f"num_inference_steps {num_inference_steps} was given; a chunk takes one step or more")
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if unknown := sorted({*callback_on_step_end_tensor_inputs} - {*self._callback_tensor_inputs}):
            raise UsageError(
                f"callback_on_step_end_tensor_inputs names {unknown[0]!r}; there are "
                f"{', '.join(self._callback_tensor_inputs)}"
            )
        if output_type not in OUTPUT_TYPES:
            raise UsageError(f"output_type {output_type!r} was given; there are {', '.join(OUTPUT_TYPES)}")
        total = None if num_frames is None else self._latent_frames(num_frames, "num_frames")
        device = self._execution_device
        if cuda_graphs and device.type != "cuda":
            raise UsageError(f"cuda_graphs was asked for on {device}; it needs a CUDA GPU")
        guided = guidance_scale > 1
        self._guidance_scale, self._interrupt, self._attention_kwargs = guidance_scale, False, None

        def encode_prompt(text: str | list[str]) -> torch.Tensor:
            found, _ = self.encode_prompt(
                text, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length, device=device
            )
            embeds: torch.Tensor = found
            return embeds

        with torch.no_grad():
            cond, uncond = self.encode_prompt(
                prompt,
                negative_prompt,
                do_classifier_free_guidance=guided,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                max_sequence_length=max_sequence_length,
                device=device,
            )
            batch = cond.shape[0]
            _check_batch("negative_prompt_embeds", len(uncond) if guided else 1, batch)
            _check_batch("generators", len(generator) if isinstance(generator, list) else 1, batch)
            embeds = {"cond": cond.to(device)}
            if guided:
                embeds["uncond"] = uncond.to(device).expand(batch, -1, -1)
            prefix = self._prefix(image, video, height, width, batch, total, device)
        down, patch = self.vae_scale_factor_spatial, self.transformer.config.patch_size
        size = (self.transformer.config.in_channels, height // down, width // down)
        if latents is not None:
            wanted = (batch, size[0], total, *size[1:])
            if latents.ndim != 5 or any(w not in (None, n) for n, w in zip(latents.shape, wanted, strict=True)):
                raise UsageError(f"latents {tuple(latents.shape)} were given; this video takes {wanted}")
        rollout = self.rollout
        chosen = Methods.of(methods, math.inf if even_if_slower else None)
        model = CausalTransformer(
            self.transformer,
            rollout,
            (size[1] // patch[1], size[2] // patch[2]),
            batch=batch,
            branches=tuple(embeds),
            dtype=self.transformer.dtype,
            device=device,
            methods=chosen if density is None else chosen.within(density, rollout, total),
            max_bytes=max_cache_bytes,
            host=offload_cache,
            replays=Replays() if cuda_graphs else None,
        )
        sampler: Sampler
        if num_inference_steps is None and rollout.timesteps:
            sampler = FewStep(rollout.timesteps)
        else:
            config = self.scheduler.config
            shift = {name: rollout.shift for name in ("flow_shift", "shift") if name in config}
            sampler = ManyStep(
                type(self.scheduler).from_config(config, **shift),
                50 if num_inference_steps is None else num_inference_steps,
            )
        self._num_timesteps = sampler.steps

        def on_step(
            step: int, timestep: float, now: torch.Tensor, text: dict[str, torch.Tensor]
        ) -> torch.Tensor | None:
            self._current_timestep = timestep
            if callback_on_step_end is not None:
                known = {"latents": now, "prompt_embeds": text["cond"], "negative_prompt_embeds": text.get("uncond")}
                given = {name: known[name] for name in callback_on_step_end_tensor_inputs}
                now = (callback_on_step_end(self, step, timestep, given) or {}).get("latents", now)
            if self._interrupt:
                # It was for this stream; another one of this pipeline goes on.
                self._interrupt = False
                return None
            return now

        return CausalStream(
            self,
            model,
            Guidance(embeds, guidance_scale),
            sampler,
            generator,
            size,
            frames=total,
            prefix=prefix,
            noise=latents,
            decode=None if output_type == "latent" else StreamingDecoder(self.vae),
            postprocess=lambda pixels: self.video_processor.postprocess_video(pixels, output_type=output_type),
            encode_prompt=encode_prompt,
            on_step=on_step,
        )

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        output_type: str = "np",
        return_dict: bool = True,
        max_sequence_length: int = 512,
        **settings: Any,
    ) -> Any:
        """A whole video. See `stream` for the arguments; interrupted, it gives the chunks that are finished."""
        if num_frames is None:
            raise UsageError("a video without an end was asked for (num_frames=None); iterate over `stream` instead")
        chunks = self.stream(
            prompt,
            negative_prompt,
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type=output_type,
            max_sequence_length=max_sequence_length,
            **settings,
        )
        made: list[Any] = []
        try:
            with self.progress_bar(total=chunks.chunks) as bar:
                for chunk in chunks:
                    made.append(chunk.latents if output_type == "latent" else chunk.frames)
                    bar.update()
        finally:
            self.maybe_free_model_hooks()
        if not made:
            raise UsageError("the stream was interrupted before its first chunk was finished; there is no video")
        video = _joined(made, output_type)
        return WanPipelineOutput(frames=video) if return_dict else (video,)

    def _check(
        self, prompt: Any, prompt_embeds: Any, negative: Any, negative_embeds: Any, height: int, width: int
    ) -> None:
        if (prompt is None) == (prompt_embeds is None):
            raise UsageError("give either a prompt or prompt_embeds")
        if negative is not None and negative_embeds is not None:
            raise UsageError("give either a negative_prompt or negative_prompt_embeds")
        for name, size, patch in zip(
            ("height", "width"), (height, width), self.transformer.config.patch_size[1:], strict=True
        ):
            unit = self.vae_scale_factor_spatial * patch
            if size < 1 or size % unit:
                raise UsageError(f"{name} {size} was given; this model takes multiples of {unit}")

    def _latent_frames(self, frames: int, what: str) -> int:
        scale: int = self.vae_scale_factor_temporal
        if frames < 1 or (frames - 1) % scale:
            low = max(0, frames - 1) // scale * scale + 1
            raise UsageError(f"{what} {frames} was given; it is {scale}k+1, such as {low} or {low + scale}")
        return (frames - 1) // scale + 1

    def _prefix(
        self, image: Any, video: Any, height: int, width: int, batch: int, total: int | None, device: torch.device
    ) -> torch.Tensor | None:
        if image is None and video is None:
            return None
        if image is not None and video is not None:
            raise UsageError("an image and a video were both given; a stream begins with one of them")
        given = video if video is not None else [image]
        if not len(given):
            raise UsageError("a video without frames was given; a stream goes on with 1 or more")
        pixels = self.video_processor.preprocess_video(given, height=height, width=width)
        frames = self._latent_frames(pixels.shape[2], "a video of frames")
        if total is not None and frames > total:
            raise UsageError(
                f"a video of {pixels.shape[2]} frames was given, longer than what was asked for; num_frames counts "
                "its frames too"
            )
        _check_batch("videos", pixels.shape[0], batch)
        return encode(self.vae, pixels.to(device)).expand(batch, -1, -1, -1, -1)


def _check_batch(what: str, given: int, batch: int) -> None:
    if given not in (1, batch):
        raise UsageError(f"{given} {what} were given for a batch of {batch}; give one, or one for each")


def _joined(parts: list[Any], output_type: str) -> Any:
    if output_type == "latent":
        return torch.cat(parts, 2)
    if output_type == "pt":
        return torch.cat(parts, 1)
    if output_type == "np":
        return np.concatenate(parts, 1)
    return [[frame for part in sample for frame in part] for sample in zip(*parts, strict=True)]
