"""The methods inside a causal Wan: exact where they must be, off by what they drop where not, alone and together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from vidaccel.errors import UsageError
from vidaccel.pipelines.causal_attention import CausalTransformer
from vidaccel.pipelines.causal_evicted import Evicted
from vidaccel.reuse import AnnCross, CausalAnn, CausalLightForcing, FlashBlock, HybridMemory, Methods, TempCache
from vidaccel.reuse.flashblock import Calibration
from vidaccel.reuse.linear_state import CAP
from vidaccel.reuse.plan import ChunkPlanner
from vidaccel.streaming import CacheShape, KVCache, Rollout, VideoRope
from vidaccel.streaming.rollout import ROPES

GRID, CHUNK = (5, 7), 2
LIGHT = CausalLightForcing(density=0.5, base_density=0.4, keep_frames=3, near=1, sink=1, frames=12, block=16)

NO_LINEAR = {f"{n}.weight": torch.zeros(24, 24) for n in range(2)} | {f"{n}.bias": torch.zeros(24) for n in range(2)}


@pytest.fixture(scope="module")
def transformer() -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=48, num_layers=2, cross_attn_norm=True, rope_max_seq_len=64,
    ).eval()  # fmt: skip


def build(transformer: Any, *methods: Any, batch: int = 1, break_even: float | None = 0.9, **rollout: Any) -> Any:
    settings = Rollout(**{"chunk": CHUNK, "window": 8, "sink": 2} | rollout)
    return CausalTransformer(transformer, settings, GRID, batch=batch, methods=Methods.of(methods, break_even))


@torch.no_grad()
def run(model: Any, chunks: int = 5, batch: int = 1) -> list[torch.Tensor]:
    """Every forward's prediction: three noisy ones and the clean one of each chunk, along the same latents."""
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(batch, 8, 16, generator=generator)
    outs = []
    for _ in range(chunks):
        latents = torch.randn(batch, 4, CHUNK, 10, 14, generator=generator)
        model.begin(CHUNK)
        for timestep in (1000.0, 937.5, 833.3):
            noise = torch.randn(latents.shape, generator=generator)
            mixed = latents + 0.05 * noise
            outs.append(model.flow(mixed, torch.full((batch,), timestep), embeds))
        outs.append(model.flow(latents, torch.zeros(batch), embeds, writes=True))
        model.commit()
    return outs


def worst(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


def error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return float(torch.stack([(a - b).norm() / b.norm() for a, b in zip(found, expected, strict=True)]).mean())


@pytest.fixture(scope="module")
def dense(transformer: Any) -> list[torch.Tensor]:
    return run(build(transformer))


EVERY_BLOCK = CausalLightForcing(density=1.0, base_density=1.0, keep_frames=9, near=1, sink=1, block=16)


@pytest.mark.parametrize(
    "methods",
    [
        (FlashBlock(threshold=0.0),),
        (EVERY_BLOCK,),
        (EVERY_BLOCK, FlashBlock(threshold=0.0)),
        (CausalAnn(density=1.0, block=16),),
        (CausalAnn(density=1.0, block=16), FlashBlock(threshold=0.0)),
        (AnnCross(density=1.0, block=1),),
    ],
    ids=lambda methods: "+".join(type(method).__name__ for method in methods),
)
def test_a_method_that_drops_nothing_is_dense(transformer: Any, dense: list[torch.Tensor], methods: Any) -> None:
    # 1.01: sparse kernels run although they keep everything.
    assert worst(run(build(transformer, *methods, break_even=1.01)), dense) < 2e-5


@pytest.mark.parametrize("others", [(), (EVERY_BLOCK,), (EVERY_BLOCK, FlashBlock(threshold=0.0))], ids=len)
def test_tempcache_that_never_merges_is_a_longer_window(transformer: Any, others: Any) -> None:
    """Whatever stands behind it in the order of composition, as long as that drops nothing either."""
    cache = TempCache(frames=6, recent=0, threshold=1.01)
    merged = build(transformer, cache, *others, break_even=1.01, window=None)
    whole = build(transformer, window=None)
    assert merged._planner.window == 4
    assert worst(run(merged, chunks=4), run(whole, chunks=4)) < 2e-5


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize(("frames", "recent"), [(4, 0), (3, 1)])
def test_tempcache_that_never_merges_shows_what_the_window_shows(
    transformer: Any, frames: int, recent: int, rope: str
) -> None:
    """And nothing that has left it, however long the stream; the first frames stand before all of that."""
    merged = build(transformer, TempCache(frames=frames, recent=recent, threshold=1.01), rope=rope)
    assert merged._planner.window == 4 + recent
    assert worst(run(merged, chunks=7), run(build(transformer, rope=rope), chunks=7)) < 2e-5


def test_first_frames_stay_where_nothing_leaves_the_window(transformer: Any) -> None:
    settings = {"window": None, "rope": "relative"}
    merged = build(transformer, TempCache(frames=6, threshold=1.01), **settings)
    assert worst(run(merged), run(build(transformer, **settings))) < 2e-5


@torch.no_grad()
def test_evicted_frames_keep_their_distance_beyond_the_cap() -> None:
    """Each chunk as far from the queries as when it left the window, 6 frames here; explicit sums are the oracle."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    one = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=48, num_layers=1, cross_attn_norm=True, rope_max_seq_len=64,
    ).eval()  # fmt: skip
    linear = {"0.weight": torch.eye(24), "0.bias": torch.zeros(24)}
    rollout = Rollout(chunk=3, window=9, sink=3, rope="relative")
    model = CausalTransformer(one, rollout, (2, 3), methods=Methods.of([HybridMemory(linear=linear)]))
    cache, left = model.caches["cond"], []
    for _ in range(11):
        start = model.start
        if len(cache.frames) == 9:
            places = [cache.frames.index(start - 6 + n) for n in range(3)]
            keys, values = (x[:, places].flatten(1, 2) for x in (cache.layers[0].keys, cache.layers[0].values))
            left.append((start, keys, values))
        model.begin(3)
        if left:
            total = sum(
                torch.einsum("blhd,blhe->bhde", model.rope.moved(k, max(start, CAP) - max(then, CAP)), v)
                for then, k, v in left
            )
            expected = (total / (18 * len(left))).flatten(0, 1)
            torch.testing.assert_close(model.memories["cond"][0].linear.h, expected, atol=1e-5, rtol=1e-4)
        model.flow(torch.randn(1, 4, 3, 4, 6), torch.zeros(1), torch.randn(1, 8, 16), writes=True)
        model.commit()
    assert start > CAP + 6


def test_evicted_frames_of_a_cache_in_host_memory_are_fetched(transformer: Any) -> None:
    """`meta` stands for a GPU: what is elsewhere does not mix with it."""
    rollout = Rollout(chunk=2, window=6, sink=2)
    planner = ChunkPlanner(Methods.of([HybridMemory(linear=NO_LINEAR)]), rollout, (2, 3), torch.device("meta"))
    cache = KVCache(CacheShape(2, 1, 6, 2, 24, torch.float32, "meta"), window=6, sink=2, host=True)
    evicted = Evicted(cache, planner, VideoRope((12, 6, 6)), "cond", None)
    assert cache.layers[0].keys.device.type == "cpu"
    for _ in range(4):
        cache.begin(2, evicted.absorb)
        cache.commit()
    for state in evicted.linear:
        assert state.tokens == 2 * 6
        assert state.h.device.type == "meta"


@pytest.mark.parametrize("others", [(), (LIGHT,), (CausalAnn(block=16),), (FlashBlock(),)], ids=len)
def test_room_that_is_empty_costs_nothing(transformer: Any, others: Any) -> None:
    """Until frames have left the cache there are no merged keys, and never more than frames that have left."""
    model = build(transformer, TempCache(frames=6, threshold=1.01), *others, window=None, sink=0)
    model.begin(CHUNK)
    assert model.chunk.density == 1
    assert model.chunk.plan.extra == 0
    model.commit()
    for chunk in range(1, 5):
        model.begin(CHUNK)
        assert model.chunk.density <= 1
        assert model.chunk.plan.extra == min(6, CHUNK * chunk) * model._planner.slots
        model.commit()


def test_hybrid_memory_keeps_the_window_and_remembers_what_left_it(transformer: Any, dense: Any) -> None:
    whole = run(build(transformer, window=None), chunks=8)
    windowed, hybrid = run(build(transformer), chunks=8), build(transformer, HybridMemory(frames=8))
    found = run(hybrid, chunks=8)
    assert hybrid._planner.window == 8
    assert error(found, whole) < 0.2 * error(windowed, whole)


def test_hybrid_memory_with_weights_adds_its_state_to_the_window(transformer: Any, dense: list[torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(4)
    assert worst(run(build(transformer, HybridMemory(linear=NO_LINEAR))), dense) < 2e-5
    trained = NO_LINEAR | {f"{n}.weight": 0.1 * torch.randn(24, 24, generator=generator) for n in range(2)}
    found = run(build(transformer, HybridMemory(linear=trained), LIGHT, FlashBlock()))
    plain = run(build(transformer, LIGHT, FlashBlock()))
    # The window of 8 frames first loses frames when the fifth chunk begins.
    assert worst(found[:16], plain[:16]) < 2e-5
    assert worst(found[16:], plain[16:]) > 1e-4
    with pytest.raises(UsageError, match="layer 1"):
        build(transformer, HybridMemory(linear={"0.weight": torch.zeros(24, 24), "0.bias": torch.zeros(24)}))


def test_frozen_queries_reuse_exactly(transformer: Any) -> None:
    """Every step of a chunk is given the same latents; only the timestep changes queries, and it is held too."""
    model, plain = build(transformer, FlashBlock(threshold=1e-2)), build(transformer)
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(1, 8, 16, generator=generator)
    latents = torch.randn(1, 4, CHUNK, 10, 14, generator=generator)
    with torch.no_grad():
        for _ in range(3):
            for each in (model, plain):
                each.begin(CHUNK)
            outs = [[each.flow(latents, torch.tensor([500.0]), embeds) for _ in range(3)] for each in (model, plain)]
            assert worst(outs[0], outs[1]) < 2e-5
            for each in (model, plain):
                each.flow(latents, torch.zeros(1), embeds, writes=True)
                each.commit()
    # Chunk 0 has no past; two chunks, two steps, two layers, two heads.
    assert model.turns["cond"].reused.tolist() == [16, 16]
    assert model.reuse_rate == 1


def test_a_new_chunk_starts_anew_and_the_clean_pass_is_untouched(transformer: Any, dense: list[torch.Tensor]) -> None:
    """Reuse at any price: noisy steps are off, but not the first of a chunk, nor anything that is kept."""
    found = run(build(transformer, FlashBlock(threshold=1e9)))
    off = [float((a - b).abs().max()) for a, b in zip(found, dense, strict=True)]
    for chunk in range(5):
        first, *middle, clean = off[4 * chunk : 4 * chunk + 4]
        assert first < 2e-5
        assert clean < 2e-5
        assert chunk == 0 or min(middle) > 1e-4
    touched = run(build(transformer, FlashBlock(threshold=1e9, refresh=True)))
    assert float((touched[7] - dense[7]).abs().max()) > 1e-4


def test_the_probe_lets_errors_grow_no_further_than_asked(transformer: Any, dense: list[torch.Tensor]) -> None:
    errors, rates = [], []
    for threshold in (0.01, 0.1, 10.0):
        model = build(transformer, FlashBlock(threshold=threshold))
        errors.append(error(run(model), dense))
        rates.append(model.reuse_rate)
    assert errors[0] < errors[2]
    assert rates[0] < rates[2] == 1.0
    dropped = error(run(build(transformer, window=4)), dense)
    assert errors[2] < dropped, "reuse of the past is worse than having none"


def test_the_calibrated_form_runs_its_table(transformer: Any, dense: list[torch.Tensor]) -> None:
    watching = build(transformer, FlashBlock())
    watching.turns["cond"].calibration = calibration = Calibration(cosine=0.9999, drift=1e-3)
    run(watching)
    table = calibration.table()
    assert len(table) == 2
    assert len(table[0]) == len(table[0][0]) == 2
    everything = tuple(tuple((True, True) for _ in range(2)) for _ in range(2))
    assert worst(run(build(transformer, FlashBlock(calibrated=everything))), dense) < 2e-5
    nothing = tuple(tuple((False, False) for _ in range(2)) for _ in range(2))
    reused = build(transformer, FlashBlock(calibrated=nothing))
    assert worst(run(reused), run(build(transformer, FlashBlock(threshold=1e9)))) < 2e-5
    mixed = build(transformer, FlashBlock(calibrated=(((True, False), (False, True)),) * 2))
    run(mixed)
    assert mixed.reuse_rate == 0.5


def test_calibration_does_not_look_into_holes(transformer: Any) -> None:
    seen = []

    class Watch(Calibration):
        def see(self, call: int, layer: int, out: torch.Tensor, *others: torch.Tensor) -> Any:
            seen.append(out.shape[1])
            return super().see(call, layer, out, *others)

    model = build(transformer, LIGHT, FlashBlock(), break_even=2.0)
    model.turns["cond"].calibration = Watch()
    run(model)
    assert set(seen) == {CHUNK * GRID[0] * GRID[1]}


def masked_reference(transformer: Any, model: Any) -> Callable[[], None]:
    """Replaces the kernels of a model's chosen blocks by SDPA under the chosen mask; returns how to stop."""
    from vidaccel.reuse import memory

    original = memory.attention

    def slow(q: Any, k: Any, v: Any, mask: Any = None, **kwargs: Any) -> Any:
        if mask is None:
            return original(q, k, v, mask, **kwargs)
        block, layout = mask.layout.block, mask.layout
        heads, rows, columns = mask.heads, layout.blocks, mask.lengths.shape[0]
        keep = torch.zeros(heads * rows, columns, dtype=torch.bool)
        for row in range(heads * rows):
            keep[row, mask.idx[mask.ptr[row] : mask.ptr[row + 1]].long()] = True
        tokens = keep.view(heads, rows, columns).repeat_interleave(block, 1).repeat_interleave(block, 2)
        filled = torch.arange(block) < mask.lengths[:, None]
        tokens = (tokens & filled.flatten())[:, : q.shape[1], : k.shape[1]]
        out = functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=tokens[None]
        )
        _, lse = original(q, k, v, mask, **kwargs)
        return out.transpose(1, 2), lse

    memory.attention = slow
    return lambda: setattr(memory, "attention", original)


def test_light_forcing_attends_to_what_it_chose_and_to_no_hole(transformer: Any, dense: list[torch.Tensor]) -> None:
    found = run(build(transformer, LIGHT))
    stop = masked_reference(transformer, None)
    try:
        expected = run(build(transformer, LIGHT))
    finally:
        stop()
    assert worst(found, expected) < 2e-5
    assert 0.001 < error(found, dense) < error(run(build(transformer, window=2, sink=0)), dense)


def test_density_falls_from_chunk_to_chunk_and_dense_is_said(transformer: Any) -> None:
    model = build(transformer, LIGHT, window=None, sink=0, break_even=0.6)
    seen = []
    for _ in range(6):
        model.begin(CHUNK)
        seen.append((model.chunk.density, model.chunk.note))
        model.commit()
    # 0.5 over 12 frames, falling towards 0.4: the second chunk asks for 0.58 of 4 frames and gets it.
    densities = [density for density, _ in seen]
    assert densities[0] == 1
    assert densities == sorted(densities, reverse=True)
    assert densities[-1] < 0.5
    strict = build(transformer, LIGHT, window=None, sink=0, break_even=0.3)
    for _ in range(2):
        strict.begin(CHUNK)
        strict.commit()
    assert "break-even of 0.3" in strict.chunk.note
    assert strict.chunk.density == 1
    assert worst(run(build(transformer, LIGHT, break_even=0.3)), run(build(transformer))) < 2e-5


def test_reuse_that_would_lose_changes_nothing(transformer: Any) -> None:
    few = replace(LIGHT, density=0.2, base_density=0.1)
    both = build(transformer, few, FlashBlock(threshold=1e9), break_even=None)
    assert worst(run(both), run(build(transformer, few, break_even=None))) == 0
    assert "FlashBlock is disabled" in both.chunk.note
    assert both.reuse_rate is None


COMBINATIONS = [
    (TempCache(frames=2, recent=2, match="nearest"), FlashBlock()),
    (TempCache(frames=2, recent=2), LIGHT),
    (TempCache(frames=2, recent=2), CausalAnn(block=16)),
    (HybridMemory(frames=1), LIGHT, FlashBlock(), AnnCross(block=2)),
    (LIGHT, FlashBlock(), AnnCross(block=2)),
    (CausalAnn(block=16), FlashBlock()),
]


@pytest.mark.parametrize("methods", COMBINATIONS, ids=lambda ms: "+".join(type(m).__name__ for m in ms))
def test_together_they_run_and_stay_near_dense(transformer: Any, dense: list[torch.Tensor], methods: Any) -> None:
    found = run(build(transformer, *methods))
    assert 1e-5 < error(found, dense) < 0.1


def test_samples_of_a_batch_choose_for_themselves(transformer: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(4, 2, 4, CHUNK, 10, 14, generator=generator)
    embeds = torch.randn(2, 8, 16, generator=generator)
    methods = (LIGHT, FlashBlock(threshold=0.05), AnnCross(block=2), TempCache(frames=2, recent=2))

    def outs(which: slice) -> torch.Tensor:
        batch = len(range(2)[which])
        model = build(transformer, *methods, batch=batch)
        found = []
        with torch.no_grad():
            for chunk in latents[:, which]:
                model.begin(CHUNK)
                found.append(model.flow(chunk, torch.full((batch,), 900.0), embeds[which]))
                found.append(model.flow(0.9 * chunk, torch.full((batch,), 700.0), embeds[which]))
                model.flow(chunk, torch.zeros(batch), embeds[which], writes=True)
                model.commit()
        return torch.stack(found, 1)

    torch.testing.assert_close(outs(slice(0, 2)), torch.cat([outs(slice(0, 1)), outs(slice(1, 2))]), atol=2e-4, rtol=0)


def test_a_snapshot_brings_merged_keys_back(transformer: Any) -> None:
    model = build(transformer, TempCache(frames=2), LIGHT)
    run(model, chunks=4)
    moment = model.snapshot()
    first = run(model, chunks=3)
    model.restore(moment)
    assert worst(run(model, chunks=3), first) == 0


def test_memory_is_flat_over_a_long_stream(transformer: Any) -> None:
    model = build(transformer, TempCache(frames=3), sink=0)
    run(model, chunks=5)
    before = model.bytes
    run(model, chunks=15)
    assert model.bytes == before
    assert model.start == 20 * CHUNK


def test_what_is_kept_beside_the_cache_is_counted(transformer: Any) -> None:
    plain, flash = build(transformer), build(transformer, FlashBlock())
    for model in (plain, flash):
        run(model)
    layers, rows = 2, 2 * CHUNK * 35
    # Of each row the past's output and its log-sum-exp, in fp32.
    assert flash.bytes - plain.bytes == layers * rows * (24 + 1) * 4
    kinds = ((CausalAnn(block=16), FlashBlock()), (TempCache(frames=2, recent=2), LIGHT), (HybridMemory(frames=1),))
    for methods in kinds:
        model = build(transformer, *methods, break_even=1.01)
        run(model)
        assert model.bytes > sum(cache.bytes for cache in model.caches.values())


@pytest.mark.parametrize(
    "methods", [(), (TempCache(frames=2),), (HybridMemory(frames=1),), (HybridMemory(linear=NO_LINEAR),)]
)
@pytest.mark.parametrize("rope", ["absolute", "sink-shift"])
def test_a_stream_can_go_back_to_before_its_first_chunk(transformer: Any, methods: Any, rope: str) -> None:
    window = 8 if methods else None
    model = build(transformer, *methods, window=window, rope=rope)
    moments = [model.snapshot()]
    first = run(model)
    moments.append(model.snapshot())
    then = run(model)
    for moment, expected in zip(moments, (first, then), strict=True):
        model.restore(moment)
        assert worst(run(model), expected) == 0


def test_a_substitute_is_named_as_such(transformer: Any) -> None:
    notes = []
    for method in (HybridMemory(), HybridMemory(linear=NO_LINEAR), TempCache()):
        model = build(transformer, method)
        model.begin(CHUNK)
        notes.append(model.note)
    assert "training-free substitute" in notes[0]
    assert notes[1:] == ["", ""]


def test_a_first_frame_of_its_own_is_the_only_dense_chunk(transformer: Any) -> None:
    densities = []
    model = build(transformer, LIGHT, break_even=1.01, window=None, sink=0, lone_first=True)
    for length in (1, CHUNK, CHUNK, CHUNK):
        model.begin(length)
        densities.append(model.chunk.density)
        model.commit()
    assert densities[0] == 1
    assert max(densities[1:]) < 1


@pytest.mark.parametrize(
    "table", [(), (((True,) * 3,) * 2,), (((True,),) * 2,), (((True,) * 2,),), (((True,) * 2,) * 2, ((True,) * 2,))]
)
def test_a_calibration_of_another_model_is_refused(transformer: Any, table: Any) -> None:
    with pytest.raises(UsageError, match="2 layers of 2 heads"):
        build(transformer, FlashBlock(calibrated=table))


@pytest.mark.parametrize(
    ("methods", "rollout", "says"),
    [
        ((FlashBlock(), FlashBlock()), {}, "same thing"),
        ((TempCache(), HybridMemory()), {}, "same thing"),
        ((LIGHT, CausalAnn()), {}, "same thing"),
        (("flashblock",), {}, "no method"),
        ((HybridMemory(),), {"window": None}, "without a window"),
    ],
)
def test_what_does_not_go_together_is_said(transformer: Any, methods: Any, rollout: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        build(transformer, *methods, **rollout)


@pytest.mark.parametrize(
    "methods", [(), (TempCache(frames=2, recent=2), LIGHT, FlashBlock(), AnnCross(block=2))], ids=len
)
def test_one_graph_serves_all_layers_steps_and_chunks(transformer: Any, methods: Any) -> None:
    """Also while the window fills up and density falls; a new prompt is projected outside of it."""
    from torch._dynamo.testing import CompileCounter

    expected = run(build(transformer, *methods))
    counter = CompileCounter()
    torch._dynamo.reset()
    try:
        for block in transformer.blocks:
            block.compile(backend=counter, fullgraph=True)
        assert worst(run(build(transformer, *methods)), expected) < 1e-6
    finally:
        for block in transformer.blocks:
            block._compiled_call_impl = None
        torch._dynamo.reset()
    assert counter.frame_count == 1
