"""A stock Wan transformer that sees its own past: processors with memory, and rotary positions that go on.

Nothing of the model is copied or subclassed. Its attention processors are exchanged while a chunk is made, a hook on
`transformer.rope` gives the positions of the open chunk, and both are given back after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from ..errors import InstallError, UsageError
from ..exchange import Exchange
from ..frontdoor import FrontDoor
from ..ranks import HeadPart, Ranks
from ..reuse import LayerMemory, Methods, Turn
from ..reuse.cross import PAYS_FROM, PromptChoice
from ..reuse.in_place import in_place
from ..reuse.plan import ChunkPlanner, PlannedChunk
from ..streaming import CacheShape, KVCache, Replays, Rollout, VideoRope
from ..streaming.kvcache import Snapshot
from .causal_evicted import Evicted
from .causal_processors import CausalAttnProcessor, PromptAttnProcessor, PromptMemory, dense


class ModelMoment(NamedTuple):
    """A model's memory between two chunks.

    Attributes:
        caches: of each branch.
        evicted: what stands for evicted frames, of each branch and layer.
    """

    caches: dict[str, Snapshot]
    evicted: dict[str, list[Any]]


class CausalTransformer:
    """A `WanTransformer3DModel` at work on one stream.

    Args:
        transformer: stock, with any weights; text-to-video, as cross-attention to an image is not kept.
        rollout: chunks, window and positions.
        grid: (height, width) in tokens of one latent frame.
        batch: samples.
        branches: guidance branches; each has a cache of its own.
        dtype: of the transformer's activations.
        device: where it runs.
        methods: what makes it faster.
        max_bytes: of each cache.
        host: keep the caches in host memory.
        replays: plays forwards back that come again (CUDA graphs); None computes each as it comes.

    Attributes:
        caches: one `KVCache` for each branch.
        turns: where each branch is.
        memories: what each layer of each branch attends to.
        chunk: what was planned for the open chunk; None before the first.

    Raises:
        InstallError: no causal stream runs on this transformer as it is.
        UsageError: methods that do not go together.
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
        methods: Methods | None = None,
        max_bytes: int | None = None,
        host: bool = False,
        replays: Replays | None = None,
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
        self._ranks = Ranks.of(transformer)
        if self._ranks is not None and replays is not None:
            raise UsageError("CUDA graphs and context parallelism were both asked for; give one of them")
        methods = methods or Methods()
        if methods.flash is not None:
            methods.flash.check(len(transformer.blocks), config.num_attention_heads)
        part = None if self._ranks is None else self._ranks.heads(config.num_attention_heads)
        self.transformer = transformer
        self.rollout = rollout
        self.methods = _of_heads(methods, part)
        self.grid = grid
        self.device = torch.device(device)
        self.chunk: PlannedChunk | None = None
        rope = transformer.rope
        self.rope = VideoRope((rope.t_dim, rope.h_dim, rope.w_dim))
        self._blocks = list(transformer.blocks)
        self._planner = ChunkPlanner(self.methods, rollout, grid, self.device)
        if host and self._planner.extra:
            raise UsageError("merged keys and a cache in host memory were both asked for; give one of them")
        if host and replays is not None:
            raise UsageError("CUDA graphs and a cache in host memory were both asked for; give one of them")
        shape = CacheShape(
            len(self._blocks),
            batch,
            self._planner.slots,
            config.num_attention_heads if part is None else part.end - part.first,
            config.attention_head_dim,
            dtype,
            device,
        )
        self.caches = {
            branch: KVCache(
                shape,
                window=self._planner.window,
                sink=rollout.sink,
                max_bytes=max_bytes,
                extra=self._planner.extra,
                host=host,
                movable_sink=rollout.moves_sink,
            )
            for branch in branches
        }
        cross = self.methods.cross
        least = PAYS_FROM if self.methods.break_even is None else 0
        choice = None if cross is None else PromptChoice.of(cross, self.device, self._ranks, least)
        self.prompts = {branch: [PromptMemory(choice) for _ in self._blocks] for branch in branches}
        self.turns = {branch: Turn(torch.zeros(2, device=self.device)) for branch in branches}
        self._evicted = {
            branch: Evicted(cache, self._planner, self.rope, branch, replays) for branch, cache in self.caches.items()
        }
        self.memories = {branch: self._remember(branch, cache) for branch, cache in self.caches.items()}
        self._processors: list[tuple[CausalAttnProcessor, PromptAttnProcessor]] = []
        self._replays = replays
        # Of the open chunk, as the model has tokens and in the plan's order.
        self._rotary: tuple[torch.Tensor, ...] | None = None
        self._ordered: tuple[torch.Tensor, ...] | None = None
        self._exchange: Exchange | None = None

    @property
    def start(self) -> int:
        """Number of the next latent frame."""
        return next(iter(self.caches.values())).start

    @property
    def bytes(self) -> int:
        """What the caches take, with all that is kept beside them of what is in them, or was."""
        beside = (x.nbytes for memories in self.memories.values() for memory in memories for x in memory.tensors)
        return sum(cache.bytes for cache in self.caches.values()) + sum(beside)

    @property
    def note(self) -> str:
        """Why the open chunk runs as it does; of its prompt, once that was projected."""
        prompt = next(iter(self.prompts.values()))[0].note
        return "; ".join(each for each in (prompt, self.chunk.note if self.chunk else "") if each)

    @property
    def reuse_rate(self) -> float | None:
        """Heads that reused their past's part, of those that might have; None where none might. Waits for the GPU."""
        reused, possible = torch.stack([turn.reused for turn in self.turns.values()]).sum(0).tolist()
        return reused / possible if possible else None

    def begin(self, frames: int) -> None:
        """Open a chunk: make room for it, set its positions, plan what it attends to."""
        for branch, cache in self.caches.items():
            evicted = self._evicted[branch]
            # What is remembered moves on before more is absorbed, at its own place.
            evicted.advance(self.start)
            cache.begin(frames, None if evicted.forgets else evicted.absorb)
            if self.rollout.moves_sink:
                cache.move_sink(self.rope.moved, self._planner.oldest(self.start, frames))
        rotary = self.rope.rotary(self.start, frames, *self.grid, device=self.device)
        self._rotary = in_place(self._rotary, *rotary)
        planned = self._planner.plan(self.start, frames, next(iter(self.caches.values())).frames)
        self._ordered = in_place(self._ordered, *map(planned.plan.layout.to_kernel, rotary))
        self.chunk = planned._replace(plan=planned.plan._replace(rotary=(self._ordered[0], self._ordered[1])))
        if self._ranks is not None:
            self._exchange = Exchange.of(self._ranks, frames * self.grid[0] * self.grid[1], device=self.device)
        self._processors = [
            (CausalAttnProcessor(self.chunk.plan.layout, self._exchange), PromptAttnProcessor(block.attn2.processor))
            for block in self._blocks
        ]
        for branch, memories in self.memories.items():
            self.turns[branch].calls = 0
            for memory, block in zip(memories, self._blocks, strict=True):
                memory.dense = partial(dense, stock=block.attn1.processor)
                memory.open(self.chunk.plan)

    def flow(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        embeds: torch.Tensor,
        branch: str = "cond",
        *,
        writes: bool = False,
    ) -> torch.Tensor:
        """The model's prediction for the open chunk.

        Args:
            latents: (b, channels, frames, height, width).
            timestep: (b,), or (b, frames) where frames differ.
            embeds: (b, text, channels), text embeddings of the branch.
            branch: whose cache and prompt.
            writes: the chunk is finished, and this forward leaves it in the cache.
        """
        if timestep.ndim == 2:
            timestep = timestep.repeat_interleave(self.grid[0] * self.grid[1], 1)
        if self._ranks is not None and self.turns[branch].calls == 0:
            self._ranks.check_same(latents)
        turn = self.turns[branch]
        turn.writes = writes
        with self.attached(branch):
            if self._replays is None or turn.calibration is not None or self._is_new(branch):
                # A new prompt is projected outside of compiled graphs, which then need no second form for it.
                with torch.compiler.set_stance("force_eager") if self._is_new(branch) else nullcontext():
                    out = self._forward(latents, timestep, embeds)
            else:
                kind = (branch, turn.calls, writes)
                out = self._replays.run(kind, self._reads(branch), self._forward, latents, timestep, embeds)
        turn.calls += 1
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

    def snapshot(self) -> ModelMoment:
        """A copy of the memory, to come back to; taken between chunks."""
        return ModelMoment(
            {branch: cache.snapshot() for branch, cache in self.caches.items()},
            {branch: evicted.snapshot() for branch, evicted in self._evicted.items()},
        )

    def restore(self, moment: ModelMoment) -> None:
        """Go back to a snapshot."""
        for branch, cache in self.caches.items():
            cache.restore(moment.caches[branch])
            self._evicted[branch].restore(moment.evicted[branch])

    @contextmanager
    def attached(self, branch: str = "cond") -> Iterator[None]:
        """Our processors stand in the transformer in this block."""
        stock = [(block.attn1.processor, block.attn2.processor) for block in self._blocks]
        hook = self.transformer.rope.register_forward_hook(lambda *_: self._own_rotary())
        try:
            for number, (block, (own, cross)) in enumerate(zip(self._blocks, self._processors, strict=True)):
                own.memory, cross.memory = self.memories[branch][number], self.prompts[branch][number]
                block.attn1.set_processor(own)
                block.attn2.set_processor(cross)
            yield
        finally:
            hook.remove()
            for block, processors in zip(self._blocks, stock, strict=True):
                block.attn1.set_processor(processors[0])
                block.attn2.set_processor(processors[1])

    def _forward(self, latents: torch.Tensor, timestep: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.transformer(
            hidden_states=latents, timestep=timestep, encoder_hidden_states=embeds, return_dict=False
        )[0]
        return out

    def _is_new(self, branch: str) -> bool:
        """The next forward of a branch projects its prompt."""
        return any(prompt.stale for prompt in self.prompts[branch])

    def _reads(self, branch: str) -> tuple[object, ...]:
        """What decides a forward of the open chunk beside its inputs.

        Shapes are those of the first layer; addresses those of all, as memory that was given back is given out again
        in any order.
        """
        assert self.chunk is not None
        memories, prompts = self.memories[branch], self.prompts[branch]
        kept = [x for memory in memories for x in (memory.cache.k, *memory.tensors)]
        kept += [x for prompt in prompts for x in prompt.kept or ()]
        addresses = tuple(x.data_ptr() for x in kept)
        linear, weight = memories[0].linear, self.transformer.patch_embedding.weight
        remembers = linear is not None and linear.tokens > 0
        prompt, cache = prompts[0], memories[0].cache
        return self.chunk.plan, cache.k, self._rotary, prompt.kept, prompt.is_hashed, remembers, weight, addresses

    def _own_rotary(self) -> tuple[torch.Tensor, ...] | None:
        """Positions of the open chunk's tokens that this rank holds."""
        if self._exchange is None or self._rotary is None:
            return self._rotary
        rank, sizes = self._exchange.ranks.rank, self._exchange.sizes
        return tuple(table.narrow(1, sum(sizes[:rank]), sizes[rank]) for table in self._rotary)

    def _remember(self, branch: str, cache: KVCache) -> list[LayerMemory]:
        evicted = self._evicted[branch]
        return [
            LayerMemory(number, layer, self.methods, self.turns[branch], _unset, merged, linear)
            for number, (layer, merged, linear) in enumerate(
                zip(cache.layers, evicted.merged, evicted.linear, strict=True)
            )
        ]


def _of_heads(methods: Methods, part: HeadPart | None) -> Methods:
    """Methods for the heads that a rank attends with: a calibration names all heads of a layer."""
    flash = methods.flash
    if part is None or flash is None or flash.calibrated is None:
        return methods
    own = tuple(tuple(layer[part.first : part.end] for layer in step) for step in flash.calibrated)
    return replace(methods, flash=replace(flash, calibrated=own))


def _unset(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    raise AssertionError("begin() gives every memory its layer's dense attention")
