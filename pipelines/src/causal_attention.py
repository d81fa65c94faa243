"""A stock Wan transformer that sees its own past: processors with memory, and rotary positions that go on.

Nothing of the model is copied or subclassed. Its attention processors are exchanged while a chunk is made, a hook on
`transformer.rope` gives the positions of the open chunk, and both are given back after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from ..errors import InstallError
from ..frontdoor import FrontDoor
from ..grid import TokenLayout, VideoGrid
from ..streaming import CacheShape, KVCache, Rollout, VideoRope
from ..streaming.kvcache import LayerCache
from .wan import WAN


class Memory(Protocol):
    """What the queries of one layer attend to."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of the own chunk's q, k, v (b, own slots, h, d) to itself and to what came before it."""
        ...


class DenseMemory:
    """Every key of the cache.

    Args:
        cache: one layer's.
        stock: the processor that stood there, for its attention backend.
    """

    def __init__(self, cache: LayerCache, stock: Any) -> None:
        self.cache = cache
        self._stock = stock

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """See `Memory`."""
        keys, values = self.cache.write(key, value)
        return dense(query, keys, values, self._stock)


class PromptMemory:
    """Keys and values of one prompt in one layer, projected at the first call and kept.

    Tensors are written in place when the prompt changes, so that a captured CUDA graph reads the new ones.
    """

    def __init__(self) -> None:
        self.kept: tuple[torch.Tensor, torch.Tensor] | None = None
        self.stale = True

    def of(self, attn: Any, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (b, text, h, d) of text states (b, text, width)."""
        if self.stale or self.kept is None:
            if attn.fused_projections:
                key, value = attn.to_kv(text).chunk(2, dim=-1)
            else:
                key, value = attn.to_k(text), attn.to_v(text)
            key, value = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_k(key), value))
            if self.kept is not None and self.kept[0].shape == key.shape:
                self.kept[0].copy_(key)
                self.kept[1].copy_(value)
            else:
                self.kept = (key, value)
            self.stale = False
        return self.kept


class CausalAttnProcessor:
    """Self-attention of an open chunk, with `memory` for what it sees."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, layout: TokenLayout) -> None:
        self.layout = layout
        self.memory: Memory | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attend; the arguments are those of diffusers' Wan processor."""
        assert self.memory is not None
        query, key, value = WAN.project(attn, self.layout, hidden_states, None, attention_mask, rotary_emb)
        out = self.memory.attend(query, key, value)
        return WAN.output(attn, self.layout.to_model(out), hidden_states)


class PromptAttnProcessor:
    """Cross-attention to a prompt whose keys and values are kept."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, stock: Any) -> None:
        self.stock = stock
        self.memory: PromptMemory | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attend; the arguments are those of diffusers' Wan processor."""
        assert self.memory is not None
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key, value = self.memory.of(attn, encoder_hidden_states)
        out = dense(query, key, value, self.stock)
        return WAN.output(attn, out, hidden_states)


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, stock: Any) -> torch.Tensor:
    """Attention of (b, l, h, d) to all keys, on the backend that the user has chosen in diffusers."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    out: torch.Tensor = dispatch_attention_fn(query, key, value, backend=stock._attention_backend)
    return out.type_as(query)


class CausalTransformer:
    """A `WanTransformer3DModel` at work on one stream.

    Args:
        transformer: stock, with any weights; text-to-video, as cross-attention to an image is not kept.
        rollout: chunks, window and positions.
        grid: (height, width) in tokens of one latent frame.
        batch: samples.
        branches: guidance branches; each has a cache of its own.
        dtype: of the transformer's activations.
        max_bytes: of each cache.
        host: keep the caches in host memory.

    Attributes:
        caches: one `KVCache` for each branch.

    Raises:
        InstallError: no causal stream runs on this transformer as it is.
    """

    def __init__(
        self,
        transformer: Any,
        rollout: Rollout,
        grid: tuple[int, int],
        *,
        batch: int = 1,
        branches: Sequence[str] = ("cond",),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_bytes: int | None = None,
        host: bool = False,
    ) -> None:
        config = transformer.config
        if config.patch_size[0] != 1 or config.image_dim is not None or config.added_kv_proj_dim is not None:
            raise InstallError(
                "a causal stream needs a text-to-video transformer whose patches hold one latent frame; this one has "
                f"patch_size {tuple(config.patch_size)} and image_dim {config.image_dim}. To begin with an image, give "
                "it to the stream instead"
            )
        if FrontDoor.open_door(transformer) is not None:
            raise InstallError(
                "this transformer is accelerated; a causal stream has methods of its own: call vidaccel.remove() on "
                "the transformer first, and name them to the stream"
            )
        self.transformer = transformer
        self.rollout = rollout
        self.grid = grid
        self.device = torch.device(device)
        rope = transformer.rope
        self.rope = VideoRope((rope.t_dim, rope.h_dim, rope.w_dim))
        self._blocks = list(transformer.blocks)
        shape = CacheShape(
            len(self._blocks),
            batch,
            grid[0] * grid[1],
            config.num_attention_heads,
            config.attention_head_dim,
            dtype,
            device,
        )
        self.caches = {
            branch: KVCache(
                shape,
                window=rollout.window,
                sink=rollout.sink,
                max_bytes=max_bytes,
                host=host,
                movable_sink=rollout.moves_sink,
            )
            for branch in branches
        }
        self.prompts = {branch: [PromptMemory() for _ in self._blocks] for branch in branches}
        self._memories: dict[str, list[Memory]] = {}
        self._processors: list[tuple[CausalAttnProcessor, PromptAttnProcessor]] = []
        self._rotary: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def start(self) -> int:
        """Number of the next latent frame."""
        return next(iter(self.caches.values())).start

    @property
    def bytes(self) -> int:
        """What the caches take."""
        return sum(cache.bytes for cache in self.caches.values())

    def begin(self, frames: int) -> None:
        """Open a chunk: make room for it and set its positions."""
        for cache in self.caches.values():
            cache.begin(frames)
            if self.rollout.moves_sink:
                cache.move_sink(self.rope.moved)
        rotary = self.rope.rotary(self.start, frames, *self.grid, device=self.device)
        if self._rotary is not None and self._rotary[0].shape == rotary[0].shape:
            # In place: a captured CUDA graph reads the same tensors.
            for kept, new in zip(self._rotary, rotary, strict=True):
                kept.copy_(new)
        else:
            self._rotary = rotary
        layout = TokenLayout.of(VideoGrid(frames, *self.grid)).to(self.device)
        self._processors = [
            (CausalAttnProcessor(layout), PromptAttnProcessor(block.attn2.processor)) for block in self._blocks
        ]
        self._memories = {
            branch: [
                DenseMemory(layer, block.attn1.processor)
                for layer, block in zip(cache.layers, self._blocks, strict=True)
            ]
            for branch, cache in self.caches.items()
        }

    def flow(
        self, latents: torch.Tensor, timestep: torch.Tensor, embeds: torch.Tensor, branch: str = "cond"
    ) -> torch.Tensor:
        """The model's prediction for the open chunk.

        Args:
            latents: (b, channels, frames, height, width).
            timestep: (b,), or (b, frames) where frames differ.
            embeds: (b, text, channels), text embeddings of the branch.
            branch: whose cache and prompt.
        """
        if timestep.ndim == 2:
            timestep = timestep.repeat_interleave(self.grid[0] * self.grid[1], 1)
        with self.attached(branch):
            out: torch.Tensor = self.transformer(
                hidden_states=latents, timestep=timestep, encoder_hidden_states=embeds, return_dict=False
            )[0]
        return out

    def commit(self) -> None:
        """The open chunk, as its last forward saw it, becomes history."""
        for cache in self.caches.values():
            cache.commit()

    def new_prompt(self) -> None:
        """The next forward projects its text embeddings anew."""
        for memories in self.prompts.values():
            for memory in memories:
                memory.stale = True

    @contextmanager
    def attached(self, branch: str = "cond") -> Iterator[None]:
        """Our processors stand in the transformer in this block."""
        stock = [(block.attn1.processor, block.attn2.processor) for block in self._blocks]
        hook = self.transformer.rope.register_forward_hook(lambda *_: self._rotary)
        try:
            for number, (block, (own, cross)) in enumerate(zip(self._blocks, self._processors, strict=True)):
                own.memory, cross.memory = self._memories[branch][number], self.prompts[branch][number]
                block.attn1.set_processor(own)
                block.attn2.set_processor(cross)
            yield
        finally:
            hook.remove()
            for block, processors in zip(self._blocks, stock, strict=True):
                block.attn1.set_processor(processors[0])
                block.attn2.set_processor(processors[1])
