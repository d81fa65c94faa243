"""One autoregressive video in the making: an iterator of chunks that can change its prompt, stop, and go back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from ..errors import StreamError, UsageError
from ..reuse.plan import PlannedChunk
from ..streaming import Rollout, Sampler
from .causal_attention import CausalTransformer, ModelMoment
from .streaming_vae import StreamingDecoder

Encode = Callable[[str | list[str]], torch.Tensor]


class Chunk(NamedTuple):
    """What one turn of a stream gives.

    Attributes:
        number: of the chunk, from 0.
        start: number of its first latent frame.
        latents: (b, channels, frames, height, width) fp32.
        frames: its pixels as `output_type` says; None for "latent".
        history: latent frames that it saw before its own, as they are.
        density: pairs of queries and keys that it attended to, of those of a dense chunk.
        note: why it ran as it did; empty where nothing is to be said.
        cache_bytes: what the caches take.
    """

    number: int
    start: int
    latents: torch.Tensor
    frames: Any
    history: int
    density: float
    note: str
    cache_bytes: int


class Moment(NamedTuple):
    """A stream between two chunks, to come back to; see `CausalStream.snapshot`."""

    model: ModelMoment
    decoder: tuple[list[Any], bool] | None
    generators: list[torch.Tensor]
    embeds: dict[str, torch.Tensor]
    past: list[tuple[int, torch.Tensor]]
    made: int
    undecoded: tuple[int, torch.Tensor, PlannedChunk] | None
    dropped: set[int]


class Guidance(NamedTuple):
    """Text of a stream.

    Attributes:
        embeds: text embeddings (b, text, channels) of each branch, "cond" first.
        scale: of classifier-free guidance; used where there is an "uncond" branch.
    """

    embeds: dict[str, torch.Tensor]
    scale: float


class CausalStream(Iterator[Chunk]):
    """Chunks of one video, made when they are asked for. Get it from `CausalWanPipeline.stream`.

    Between chunks the transformer holds its own processors again, so that other streams and pipelines can use it.

    Args:
        pipe: the pipeline.
        model: the transformer with its caches.
        guidance: text embeddings.
        sampler: denoises a chunk.
        generator: of the noise.
        latent_size: (channels, height, width) of a latent frame.
        frames: latent frames in all; None for no end.
        prefix: (b, channels, frames, height, width), the known beginning; comes out first.
        noise: (b, channels, frames, height, width), the first noise of every frame; None draws it.
        decode: makes pixels; None gives latents alone.
        postprocess: what becomes of them.
        encode_prompt: text to embeddings, for `switch_prompt`.
        on_step: called after each denoising step of the whole stream: (step, timestep, latents, embeds) -> latents, or
            None to stop.
    """

    def __init__(
        self,
        pipe: Any,
        model: CausalTransformer,
        guidance: Guidance,
        sampler: Sampler,
        generator: torch.Generator | list[torch.Generator] | None,
        latent_size: tuple[int, int, int],
        *,
        frames: int | None,
        prefix: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        decode: StreamingDecoder | None,
        postprocess: Callable[[torch.Tensor], Any],
        encode_prompt: Encode,
        on_step: Callable[[int, float, torch.Tensor, dict[str, torch.Tensor]], torch.Tensor | None],
    ) -> None:
        self.pipe = pipe
        self.model = model
        self.sampler = sampler
        self.frames = frames
        self._guidance = guidance
        self._generator = generator
        self._latent_size = latent_size
        self._prefix = prefix
        self._noise = noise
        self._decode = decode
        self._postprocess = postprocess
        self._encode_prompt = encode_prompt
        self._on_step = on_step
        self._past: list[tuple[int, torch.Tensor]] = []
        # Chunks in all, and those of them that the prefix gives, which take no steps.
        self._made = 0
        self._given = 0 if prefix is None else len(list(self.rollout.chunks(prefix.shape[2])))
        self._stopped = False
        # A chunk that is in the caches and not yet decoded, and frames whose keys are still to be written anew: what an
        # interruption leaves for the next call.
        self._undecoded: tuple[int, torch.Tensor, PlannedChunk] | None = None
        self._dropped: set[int] = set()

    @property
    def rollout(self) -> Rollout:
        """How it rolls out."""
        return self.model.rollout

    @property
    def chunks(self) -> int | None:
        """Chunks in all, those of the given beginning included; None for no end."""
        if self.frames is None:
            return None
        known = 0 if self._prefix is None else self._prefix.shape[2]
        return self._given + sum(1 for _ in self.rollout.chunks(self.frames, known))

    @property
    def position(self) -> int:
        """Latent frames made so far."""
        return self.model.start

    def stop(self) -> None:
        """No further chunk; what is finished stays."""
        self._stopped = True

    @torch.no_grad()
    def __next__(self) -> Chunk:
        """Make the next chunk. Interrupted, it loses nothing that was finished: the next call goes on from there."""
        if self._dropped:
            self._recache()
        if self._undecoded is not None:
            return self._shown()
        start = self.model.start
        length = next(self.rollout.chunks(self.frames, start), 0)
        if self._stopped or not length:
            raise StopIteration
        known = 0 if self._prefix is None else self._prefix.shape[2]
        if start < known:
            length = min(length, known - start)
        self.model.begin(length)
        planned = self.model.chunk
        assert planned is not None
        if start < known:
            assert self._prefix is not None
            latents = self._prefix[:, :, start : start + length]
        else:
            made = self.sampler.run(self._draw(start, length), self._flow, self._step)
            if made is None:
                self._stopped = True
                raise StopIteration
            latents = made
        self._write(latents)
        self._remember(start, latents)
        self._undecoded = (start, latents, planned)
        return self._shown()

    def _shown(self) -> Chunk:
        """Decode the chunk that was made."""
        assert self._undecoded is not None
        start, latents, planned = self._undecoded
        frames = None
        if self._decode is not None:
            before = self._decode.snapshot()
            try:
                frames = self._postprocess(self._decode(latents))
            except BaseException:
                self._decode.restore(before)
                raise
        self._undecoded = None
        self._made += 1
        return Chunk(
            self._made - 1, start, latents, frames, planned.history, planned.density, self.model.note, self.model.bytes
        )

    @torch.no_grad()
    def switch_prompt(self, prompt: str | list[str] | torch.Tensor, recache: bool = True) -> None:
        """From the next chunk on, show something else.

        Args:
            prompt: one text, one for each sample, or their embeddings.
            recache: write the frames that are still seen anew under the new prompt, so that it takes effect at once
                (LongLive); the first frames stay as they are, and so does what TempCache has merged.

        Raises:
            UsageError: neither one prompt nor one for each sample.
        """
        embeds = self._guidance.embeds
        given = prompt if isinstance(prompt, torch.Tensor) else self._encode_prompt(prompt)
        batch = embeds["cond"].shape[0]
        if given.shape[0] not in (1, batch):
            raise UsageError(f"{given.shape[0]} prompts were given for a stream of {batch}; give one, or one for each")
        given = given.expand(batch, -1, -1)
        self._guidance = self._guidance._replace(embeds=embeds | {"cond": given.type_as(embeds["cond"])})
        self.model.new_prompt()
        if recache:
            self._recache()

    def snapshot(self) -> Moment:
        """The stream as it is now; taken between chunks."""
        decoder = None if self._decode is None else self._decode.snapshot()
        states = [generator.get_state() for generator in self._generators()]
        return Moment(
            self.model.snapshot(),
            decoder,
            states,
            dict(self._guidance.embeds),
            list(self._past),
            self._made,
            self._undecoded,
            set(self._dropped),
        )

    def restore(self, moment: Moment) -> None:
        """Go back to a snapshot of this stream; with the same prompts it then makes the same chunks again."""
        self.model.restore(moment.model)
        if self._decode is not None and moment.decoder is not None:
            self._decode.restore(moment.decoder)
        for generator, state in zip(self._generators(), moment.generators, strict=True):
            generator.set_state(state)
        self._guidance = self._guidance._replace(embeds=dict(moment.embeds))
        self.model.new_prompt()
        self._past, self._made, self._stopped = list(moment.past), moment.made, False
        self._undecoded, self._dropped = moment.undecoded, set(moment.dropped)

    def _generators(self) -> list[torch.Generator]:
        if self._generator is None:
            raise StreamError("a stream without a generator cannot be repeated; give it one to take snapshots")
        return self._generator if isinstance(self._generator, list) else [self._generator]

    def _draw(self, start: int, length: int) -> torch.Tensor:
        """All noise of a chunk before its first step, so that no step waits for the host."""
        from diffusers.utils.torch_utils import randn_tensor

        batch = self._guidance.embeds["cond"].shape[0]
        channels, height, width = self._latent_size
        size = (batch, channels, length, height, width)
        draws = [
            randn_tensor(size, generator=self._generator, device=self.model.device, dtype=torch.float32)
            for _ in range(self.sampler.draws)
        ]
        if self._noise is not None:
            if self._noise.shape[2] < start + length:
                raise StreamError(
                    f"noise of {self._noise.shape[2]} frames was given, and the next chunk ends with frame "
                    f"{start + length}; give noise for all frames, or a generator instead"
                )
            draws[0] = self._noise[:, :, start : start + length].to(draws[0])
        return torch.stack(draws)

    def _flow(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        found = {branch: self._predict(branch, latents, timestep) for branch in self._guidance.embeds}
        if "uncond" not in found:
            return found["cond"]
        return found["uncond"] + self._guidance.scale * (found["cond"] - found["uncond"])

    def _predict(
        self, branch: str, latents: torch.Tensor, timestep: torch.Tensor, writes: bool = False
    ) -> torch.Tensor:
        dtype = self.pipe.transformer.dtype
        embeds = self._guidance.embeds[branch].to(dtype)
        return self.model.flow(latents.to(dtype), timestep, embeds, branch, writes=writes).float()

    def _step(self, index: int, timestep: float, latents: torch.Tensor) -> torch.Tensor | None:
        if self._stopped:
            return None
        step = (self._made - self._given) * self.sampler.steps + index
        return self._on_step(step, timestep, latents, self._guidance.embeds)

    def _write(self, latents: torch.Tensor) -> None:
        """The pass that leaves a clean chunk in the caches."""
        timestep = latents.new_full((latents.shape[0],), self.rollout.context_noise)
        for branch in self._guidance.embeds:
            self._predict(branch, latents, timestep, writes=True)
        self.model.commit()

    def _remember(self, start: int, latents: torch.Tensor) -> None:
        """Keep clean latents of frames that are still seen, for a prompt switch."""
        self._past.append((start, latents))
        seen = next(iter(self.model.caches.values())).frames
        oldest = min((frame for frame in seen if frame >= self.rollout.sink), default=0)
        self._past = [(first, clean) for first, clean in self._past if first + clean.shape[2] > oldest]

    def _recache(self) -> None:
        for cache in self.model.caches.values():
            self._dropped |= set(cache.forget())
        for first, clean in self._past:
            own = [frame - first for frame in range(first, first + clean.shape[2]) if frame in self._dropped]
            if own:
                self.model.begin(len(own))
                self._write(clean[:, :, own])
        self._dropped = set()
