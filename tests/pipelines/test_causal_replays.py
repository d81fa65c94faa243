"""Forwards that are played back are the forwards themselves: on a CPU, where a tape of operators stands for a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from vidaccel.errors import UsageError
from vidaccel.pipelines.causal_attention import CausalTransformer
from vidaccel.reuse import AnnCross, CausalAnn, CausalLightForcing, FlashBlock, HybridMemory, Methods, TempCache, memory
from vidaccel.streaming import Rollout
from vidaccel.streaming.replays import Replays, signature

GRID, CHUNK, BATCH = (5, 7), 2, 2
LIGHT = CausalLightForcing(density=0.5, base_density=0.4, keep_frames=3, near=1, sink=1, frames=12, block=16)
LINEAR = {f"{n}.weight": 0.1 * torch.eye(24) for n in range(2)} | {f"{n}.bias": torch.zeros(24) for n in range(2)}

# Heads that a calibration recomputes.
SOME = (True, False)


class Tape(TorchDispatchMode):
    """Every operator with the very tensors it read and wrote, as a CUDA graph has their addresses.

    Played back, it writes to the same memory from the same memory, and knows nothing of Python.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.vidaccel.remembered.default:
            with self, self.kernels():  # what is inside of it is recorded, not that Python is called
                return memory._live[int(args[3])].attend(*args[:3]).contiguous()
        return self.step(func, args, kwargs or {})

    def step(self, func: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable:
            self.before.append((args[0], args[0].clone()))
        out = func(*args, **kwargs)
        self.steps.append((func, args, kwargs, out))
        return out

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """Our kernels are steps like any other."""
        original = memory.attention

        def attend(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return self.step(partial(original, backend="reference"), args, kwargs)

        memory.attention = attend
        try:
            yield
        finally:
            memory.attention = original

    def play(self) -> None:
        for func, args, kwargs, out in self.steps:
            new = func(*args, **kwargs)
            for place, x in zip(*(y if isinstance(y, (tuple, list)) else (y,) for y in (out, new)), strict=True):
                if isinstance(place, torch.Tensor) and place.data_ptr() != x.data_ptr():
                    place.copy_(x)


def tape(forward: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> Any:
    recorder = Tape()
    with recorder:
        output = forward(*inputs)
    # To capture a CUDA graph computes nothing.
    for place, before in reversed(recorder.before):
        place.copy_(before)
    return output, recorder.play


@pytest.fixture(scope="module")
def transformer() -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=48, num_layers=2, cross_attn_norm=True, rope_max_seq_len=64,
    ).eval()  # fmt: skip


def build(transformer: Any, methods: Any, replays: Replays | None, **settings: Any) -> CausalTransformer:
    rollout = Rollout(**{"chunk": CHUNK, "window": 8, "sink": 2} | settings)
    made = Methods.of(methods, break_even=0.9)
    return CausalTransformer(transformer, rollout, GRID, batch=BATCH, methods=made, replays=replays)


@torch.no_grad()
def run(model: CausalTransformer, chunks: int, switch: int | None = None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(BATCH, 8, 16, generator=generator)
    outs = []
    for chunk in range(chunks):
        if chunk == switch:
            embeds = embeds.flip(1)
            model.new_prompt()
        latents = torch.randn(BATCH, 4, CHUNK, 10, 14, generator=generator)
        model.begin(CHUNK)
        for timestep in (1000.0, 937.5, 833.3):
            noise = torch.randn(latents.shape, generator=generator)
            outs.append(model.flow(latents + 0.05 * noise, torch.full((BATCH,), timestep), embeds))
        outs.append(model.flow(latents, torch.zeros(BATCH), embeds, writes=True))
        model.commit()
    return outs


@pytest.mark.parametrize(
    ("methods", "settings"),
    [
        ((), {}),
        ((), {"rope": "sink-shift"}),
        # A CPU's plan of a mask depends on what it holds, so here it is known beforehand which heads reuse.
        ((FlashBlock(refresh=True, calibrated=((SOME, SOME),) * 3),), {}),
        ((CausalAnn(block=16), FlashBlock(0.05)), {}),
        ((TempCache(frames=2, recent=2), LIGHT, FlashBlock(0.05), AnnCross(block=2)), {}),
        ((HybridMemory(linear=LINEAR),), {}),
    ],
    ids=["dense", "sink-shift", "flashblock", "ann+flashblock", "all", "hybrid"],
)
def test_what_is_played_back_is_what_would_be_computed(transformer: Any, methods: Any, settings: Any) -> None:
    replays = Replays(tape)
    found = run(build(transformer, methods, replays, **settings), 8, switch=6)
    expected = run(build(transformer, methods, None, **settings), 8, switch=6)
    # The window is full from the fifth chunk on, and a recording is made when a forward comes a second time.
    assert replays.played >= 8
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0, msg=lambda m, n=number: f"forward {n}: {m}")


@pytest.mark.parametrize("others", [(), (FlashBlock(0.05),)], ids=["alone", "flashblock"])
def test_chunks_of_falling_density_are_played_back_too(transformer: Any, others: Any) -> None:
    light = CausalLightForcing(density=0.5, base_density=0.1, keep_frames=3, frames=40, block=16)
    replays = Replays(tape)
    model = build(transformer, (light, *others), replays)
    found = run(model, 3)  # the window is full from the next one on
    kept, densities = [], []
    for chunk in range(5):
        before = replays.played
        found += run(model, 1)
        kept.append(int(model.chunk.plan.rule.kept))
        densities.append(model.chunk.density)
        # The first is computed, the second recorded; its first step still finds means of a smaller past in memory.
        assert replays.played == before + (0, 3, 4, 4, 4)[chunk]
    assert len(set(kept)) >= 3, kept
    assert densities == sorted(densities, reverse=True)
    plain = build(transformer, (light, *others), None)
    expected = run(plain, 3) + [out for _ in range(5) for out in run(plain, 1)]
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0, msg=lambda m, n=number: f"forward {n}: {m}")


def story(model: CausalTransformer) -> list[torch.Tensor]:
    """Eight chunks of a scene that is nearly still, so that keys merge; a new prompt that recaches; four chunks."""
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(BATCH, 8, 16, generator=generator)
    still = torch.randn(BATCH, 4, 1, 10, 14, generator=generator).repeat(1, 1, CHUNK, 1, 1)
    moving = torch.linspace(0, 0.3, 14)

    def chunks(count: int) -> list[torch.Tensor]:
        outs = []
        for _ in range(count):
            latents = still + moving * torch.randn(still.shape, generator=generator)
            model.begin(CHUNK)
            for timestep in (1000.0, 937.5):
                outs.append(model.flow(latents, torch.full((BATCH,), timestep), embeds))
            outs.append(model.flow(latents, torch.zeros(BATCH), embeds, writes=True))
            model.commit()
        return outs

    with torch.no_grad():
        before = chunks(8)
        model.new_prompt()
        embeds = embeds.flip(1)
        dropped = model.caches["cond"].forget()
        for _ in range(len(dropped) // CHUNK):
            model.begin(CHUNK)
            model.flow(still, torch.zeros(BATCH), embeds, writes=True)
            model.commit()
        return before + chunks(4)


@pytest.mark.parametrize(
    "method",
    [
        TempCache(frames=2, recent=2, threshold=0.9),
        TempCache(frames=2, recent=2, threshold=0.8, match="nearest"),
        HybridMemory(frames=2),
        HybridMemory(linear=LINEAR),
        CausalAnn(block=16),
        LIGHT,
    ],
    ids=["tempcache", "nearest", "hybrid", "linear", "ann", "light-forcing"],
)
def test_what_a_recache_has_moved_is_not_read_where_it_was(transformer: Any, method: Any) -> None:
    replays = Replays(tape)
    model, plain = build(transformer, (method,), replays), build(transformer, (method,), None)
    for number, (one, other) in enumerate(zip(story(model), story(plain), strict=True)):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0, msg=lambda m, n=number: f"forward {n}: {m}")
    assert replays.played >= 12
    if model.memories["cond"][0].merged is not None:
        assert max(float(memory.merged.size.max()) for memory in plain.memories["cond"]) > 1, "nothing has merged"


def test_all_layers_decide_whether_a_forward_is_played_back(transformer: Any) -> None:
    """Memory that was given back is given out again in any order, so that one layer may have its old place alone."""
    model = build(transformer, (CausalAnn(block=16),), None)
    run(model, 4)
    before = signature(model._reads("cond"))
    assert signature(model._reads("cond")) == before
    last = model.memories["cond"][-1]
    last._hashed.known = tuple(x.clone() for x in last._hashed.known)
    assert signature(model._reads("cond")) != before


def test_a_forward_that_reads_elsewhere_is_computed() -> None:
    replays, kept = Replays(tape), torch.ones(2)
    held = [kept]

    def forward(x: torch.Tensor) -> torch.Tensor:
        return x + held[0]

    for factor in (1, 2, 3):
        assert replays.run("add", (held[0], 1), forward, factor * torch.ones(2)).tolist() == [factor + 1] * 2
    assert replays.played == 2
    kept.fill_(10)
    assert replays.run("add", (held[0], 1), forward, torch.ones(2)).tolist() == [11, 11]
    # Another tensor, another number, another shape: each runs as it is, once.
    held[0] = torch.full((2,), 5.0)
    assert replays.run("add", (held[0], 1), forward, torch.ones(2)).tolist() == [6, 6]
    assert replays.run("add", (held[0], 2), forward, torch.ones(2)).tolist() == [6, 6]
    assert replays.run("add", (held[0], 2), forward, torch.ones(1, 2)).tolist() == [[6, 6]]
    assert replays.played == 3


def test_host_memory_takes_no_graphs(transformer: Any) -> None:
    with pytest.raises(UsageError, match="CUDA graphs"):
        CausalTransformer(transformer, Rollout(chunk=2, window=8), GRID, host=True, replays=Replays(tape))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["dense", "flashblock", "ann", "all"])
def test_cuda_graphs_are_the_forwards(name: str, compiled: bool) -> None:
    """With head dim 64 and blocks of 64, so that the GPU's own kernels run; the two differ by no more than rounding.

    A forward that waited for the GPU could not be recorded.
    """
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4,
            text_dim=16, freq_dim=32, ffn_dim=48, num_layers=2, cross_attn_norm=True, rope_max_seq_len=64,
        ).bfloat16().eval()  # fmt: skip
    light = CausalLightForcing(density=0.5, base_density=0.5, keep_frames=3, near=1, sink=1, frames=12, block=64)
    every = (TempCache(frames=2, recent=2), light, FlashBlock(0.05), AnnCross(block=2))
    near = (CausalAnn(0.3), FlashBlock(0.05))
    methods = {"dense": (), "flashblock": (FlashBlock(0.05, refresh=True),), "ann": near, "all": every}[name]
    if compiled:
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    outs = []
    for replays in (Replays(), None):
        causal = CausalTransformer(
            model, Rollout(chunk=CHUNK, window=8, sink=2), (16, 16), dtype=torch.bfloat16, device="cuda",
            methods=Methods.of(methods, 0.9), replays=replays,
        )  # fmt: skip
        generator = torch.Generator("cuda").manual_seed(1)
        embeds = torch.randn(1, 8, 16, generator=generator, device="cuda").bfloat16()
        with torch.no_grad():
            for _ in range(8):
                latents = torch.randn(1, 4, CHUNK, 32, 32, generator=generator, device="cuda").bfloat16()
                causal.begin(CHUNK)
                for timestep in (1000.0, 900.0):
                    outs.append(causal.flow(latents, torch.full((1,), timestep, device="cuda"), embeds))
                causal.flow(latents, torch.zeros(1, device="cuda"), embeds, writes=True)
                causal.commit()
        assert replays is None or replays.played >= 6
    half = len(outs) // 2
    for one, other in zip(outs[:half], outs[half:], strict=True):
        torch.testing.assert_close(one, other, atol=0.05, rtol=0.05)
