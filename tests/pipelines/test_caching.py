"""Caches on stock pipelines: what is computed, that nothing leaks into the next run, and what users do to models.

Every comparison is between runs of this pipeline: stock, or with the same cache in undisturbed conditions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

import vidaccel
from vidaccel.caching import (
    POLICIES,
    Cache,
    CachePolicy,
    CGTaylor,
    EasyCache,
    FirstBlock,
    MagCache,
    Placed,
    Replay,
    TaylorSeer,
    TeaCache,
    estimate_bytes,
    placed,
    recorded,
)
from vidaccel.errors import InstallError, RecipeError
from vidaccel.patterns import Radial
from vidaccel.schedule import Schedule
from vidaccel.trace import current

INFINITE = math.inf
STEPS, LAYERS = 12, 3
# Forecasts about half of the steps after a warm-up of two.
CACHE = CGTaylor(threshold=0.05, warmup=2)
EVERY_KIND = [
    CACHE,
    TaylorSeer(interval=3),
    FirstBlock(threshold=0.1),
    TeaCache(threshold=0.5),
    MagCache(ratios=(1.0, 0.98, 0.97, 0.96), warmup=0.2),
    EasyCache(threshold=0.2, warmup=3),
    Replay(computed=(0, 1, 2, 6, 11)),
    Placed(share=0.5),
    CGTaylor(threshold=0.05, warmup=2, site="output"),
]
each_kind = pytest.mark.parametrize("policy", EVERY_KIND, ids=lambda policy: policy.name)


@pytest.fixture
def render(render: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A shorter video of more steps."""

    def run(pipe: Any, size: str = "even", **kwargs: Any) -> torch.Tensor:
        return render(pipe, size, **{"steps": STEPS, "frames": 9, **kwargs})

    return run


@contextmanager
def counted(transformer: Any) -> Iterator[Counter[int]]:
    """How often each block really runs."""
    calls: Counter[int] = Counter()
    hooks = [
        block.register_forward_pre_hook(lambda *_, n=n: calls.update([n])) for n, block in enumerate(transformer.blocks)
    ]
    yield calls
    for hook in hooks:
        hook.remove()


def forecast_steps(run: Any, branch: str = "cond") -> list[int]:
    return [call.step for call in run.trace.calls if call.forecast and call.branch == branch]


@each_kind
def test_every_kind_forecasts_and_repeats_itself(wan: Any, render: Any, policy: CachePolicy) -> None:
    stock = render(wan)
    with vidaccel.accelerate(wan, cache=policy) as run:
        first, second = render(wan), render(wan)
    assert torch.equal(first, second)
    steps = forecast_steps(run)
    assert steps
    assert steps == forecast_steps(run, "uncond")
    assert 0 < (first - stock).norm() < 0.5 * stock.norm()
    assert torch.equal(render(wan), stock)


@pytest.mark.parametrize(
    "policy",
    [
        CGTaylor(threshold=0.0),
        FirstBlock(threshold=0.0),
        TeaCache(threshold=0.0),
        MagCache(threshold=0.0),
        EasyCache(threshold=0.0),
        TaylorSeer(interval=1),
        Replay(computed=tuple(range(STEPS))),
        CGTaylor(threshold=INFINITE, max_skips=0),
        CGTaylor(threshold=INFINITE, max_error=0.0),
    ],
    ids=lambda policy: policy.name,
)
def test_a_zero_threshold_is_bit_exact(wan: Any, render: Any, policy: CachePolicy) -> None:
    stock = render(wan)
    with vidaccel.accelerate(wan, cache=policy) as run, counted(wan.transformer) as calls:
        assert torch.equal(render(wan), stock)
    assert calls == dict.fromkeys(range(LAYERS), 2 * STEPS)
    assert not forecast_steps(run)


@pytest.mark.parametrize(
    ("policy", "computed", "first_layer"),
    [
        (CGTaylor(threshold=INFINITE), [*range(6), 11], STEPS + 7),
        (CGTaylor(threshold=INFINITE, warmup=3, last=2), [0, 1, 2, 10, 11], STEPS + 5),
        (CGTaylor(threshold=INFINITE, warmup=1, last=0, max_skips=3), [0, 4, 8], STEPS + 3),
        (FirstBlock(threshold=INFINITE), [0], 2 * STEPS),
        (TeaCache(threshold=INFINITE, warmup=2), [0, 1], 4),
        (MagCache(threshold=INFINITE, ratios=(1.0,), warmup=0.25, max_skips=99), [0, 1, 2], 6),
        (EasyCache(threshold=INFINITE, warmup=4), [0, 1, 2, 3, 11], 10),
        (TaylorSeer(interval=5), [0, 5, 10], 6),
        (Replay(computed=(0, 7)), [0, 7], 4),
        (Placed(share=0.5), [0, 1, 2, 3, 6, 10], 12),
        (Placed(), [0, 1, 10], 6),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_an_infinite_threshold_computes_what_the_caps_say(
    wan: Any, render: Any, policy: CachePolicy, computed: list[int], first_layer: int
) -> None:
    with vidaccel.accelerate(wan, cache=policy) as run, counted(wan.transformer) as calls:
        render(wan)
    assert forecast_steps(run) == [n for n in range(STEPS) if n not in computed]
    assert calls == {0: first_layer} | {n: 2 * len(computed) for n in range(1, LAYERS)}
    summary = run.report().summary
    assert (summary["computed_steps"], summary["forecast_steps"]) == (len(computed), STEPS - len(computed))


@pytest.mark.parametrize("policy", [CACHE, FirstBlock(threshold=0.1), EVERY_KIND[5]], ids=lambda policy: policy.name)
@pytest.mark.parametrize("place", ["rope", "blocks.0", "blocks.2", "proj_out"])
@pytest.mark.parametrize("at", [0, 5])
def test_an_exception_leaves_nothing(wan: Any, render: Any, policy: CachePolicy, place: str, at: int) -> None:
    transformer = wan.transformer
    blocks = transformer.blocks
    with vidaccel.accelerate(wan, cache=policy) as run:
        expected = render(wan)
        calls = Counter[str]()

        def fail(*_: Any) -> None:
            calls.update([place])
            if calls[place] == at + 1:
                raise KeyError("boom")

        hook = transformer.get_submodule(place).register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            render(wan)
        hook.remove()
        assert transformer.blocks is blocks
        assert run.trace.calls[-1].failed
        assert run._caches[0].nbytes == 0
        assert torch.equal(render(wan), expected)


@pytest.mark.parametrize("at", [0, 1, 7])
def test_an_aborted_run_does_not_reach_the_next(wan: Any, render: Any, at: int) -> None:
    def abort(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            raise KeyboardInterrupt
        return kwargs

    with vidaccel.accelerate(wan, cache=CACHE) as run:
        expected = render(wan)
        with pytest.raises(KeyboardInterrupt):
            render(wan, callback_on_step_end=abort)
        assert torch.equal(render(wan), expected)
        assert {call.trajectory for call in run.trace.calls} == {1, 2, 3}


def test_an_interrupt_from_the_keyboard_inside_a_block(wan: Any, render: Any) -> None:
    """torch runs no hooks then; the next call cleans up."""
    with vidaccel.accelerate(wan, cache=CACHE):
        expected, calls = render(wan), Counter[str]()

        def interrupt(*_: Any) -> None:
            calls.update("x")
            if calls["x"] == 5:
                raise KeyboardInterrupt  # pressed once

        hook = wan.transformer.blocks[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            render(wan)
        assert torch.equal(render(wan), expected)
        blocks = wan.transformer.blocks
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            render(wan)
        hook.remove()
        assert wan.transformer.blocks is not blocks
    assert wan.transformer.blocks is blocks
    assert current() is None


@each_kind
def test_shapes_come_and_go(wan: Any, render: Any, policy: CachePolicy) -> None:
    prompts = {"prompt": ["a cat", "a dog"], "negative_prompt": ["bad", "bad"]}
    with vidaccel.accelerate(wan, cache=policy) as run:
        expected = render(wan, "even")
        alone = render(wan, "ragged")
        render(wan, "even", **prompts)
        assert torch.equal(render(wan, "even"), expected)
        assert torch.equal(render(wan, "ragged"), alone)
        render(wan, "even", steps=10)
        assert torch.equal(render(wan, "even"), expected)
        assert run._caches[0].nbytes == 0
    assert forecast_steps(run)


def test_a_shape_that_changes_within_a_trajectory_starts_anew(wan: Any) -> None:
    """Nobody's pipeline does this, but a loop of one's own may; step numbers go on."""
    cache, transformer = Cache.of(wan.transformer, TaylorSeer(interval=4)), wan.transformer
    states = torch.randn(1, 4, 32)
    with torch.no_grad():
        for n, size in enumerate([8, 8, 8, 16, 16, 8]):
            timestep = torch.tensor([1000.0 - 20 * n])
            transformer(torch.randn(1, 16, 2, size, size), timestep, encoder_hidden_states=states)
    records = cache.door.trace.calls
    assert [call.step for call in records] == [0, 1, 2, 3, 4, 5]
    assert [call.forecast for call in records] == [False, True, True, False, True, False]
    vidaccel.remove(transformer)


def test_uncond_runs_no_layer_where_cond_is_forecast(wan: Any, render: Any) -> None:
    with vidaccel.accelerate(wan, cache=CACHE) as run:
        render(wan)
    sites = {f"blocks.{n}.attn1.processor" for n in range(LAYERS)}
    # Without an attention pattern nobody lists sites, so nothing can be skipped of them.
    assert not any(call.skipped for call in run.trace.calls)
    with vidaccel.accelerate(wan, "dense", cache=CACHE) as run:
        render(wan)
    for call in run.trace.calls:
        assert set(call.dense) | set(call.skipped) == sites
        assert len(call.skipped) == (0 if not call.forecast else LAYERS - 1 if call.branch == "cond" else LAYERS)
        assert (call.why == "follows") == (call.branch == "uncond")


def test_without_guidance_and_with_guidance_cut_off(wan: Any, render: Any) -> None:
    def cut(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 1.0 if step >= 4 else 3.0
        return kwargs

    with vidaccel.accelerate(wan, cache=CACHE) as run:
        both = render(wan)
        run.trace.calls.clear()
        one = render(wan, guidance_scale=1.0)
        assert {call.branch for call in run.trace.calls} == {"cond"}
        assert forecast_steps(run)
        assert torch.equal(render(wan, guidance_scale=1.0), one)
        run.trace.calls.clear()
        render(wan, callback_on_step_end=cut)
        assert len(run.trace.calls) == 5 + STEPS
        assert torch.equal(render(wan), both)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_held_is_what_was_predicted(wan: Any, render: Any, policy: CachePolicy, dtype: torch.dtype) -> None:
    wan.transformer.to(dtype)
    predicted = estimate_bytes(policy, wan.transformer, (3, 8, 8))
    with vidaccel.accelerate(wan, cache=policy) as run:
        render(wan)
    assert run.report().summary["cache_bytes"] == predicted


def test_storage_stride_and_batch_in_the_prediction(wan: Any, render: Any) -> None:
    unit = 3 * 8 * 8 * 64 * 4
    grid = (3, 8, 8)
    assert estimate_bytes(CGTaylor(), wan.transformer, grid) == (4 + 2 * 2) * unit
    assert estimate_bytes(CGTaylor(storage="bfloat16"), wan.transformer, grid) == (4 + 2 * 2) * unit // 2
    assert estimate_bytes(FirstBlock(), wan.transformer, grid, batch=3) == 3 * (1 + 2) * unit
    policy = CGTaylor(threshold=0.05, warmup=2, gate_order=1, gate_stride=5, storage="bfloat16")
    prompts = {"prompt": ["a cat", "a dog"], "negative_prompt": ["bad", "bad"]}
    with vidaccel.accelerate(wan, cache=policy) as run:
        render(wan, **prompts)
    assert run.report().summary["cache_bytes"] == estimate_bytes(policy, wan.transformer, grid, batch=2)
    assert forecast_steps(run)


def test_the_output_is_forecast_where_asked(wan: Any, render: Any) -> None:
    """On a straight line through the outputs of the last two computed steps, in the memory of two latents."""
    seen: list[torch.Tensor] = []
    policy = TaylorSeer(interval=3, warmup=2, site="output")
    with vidaccel.accelerate(wan, cache=policy) as run:
        hook = wan.transformer.register_forward_hook(lambda _, inputs, out: seen.append(out[0]))
        render(wan, guidance_scale=1.0)
        hook.remove()
    assert forecast_steps(run) == [2, 3, 5, 6, 8, 9, 11]
    torch.testing.assert_close(seen[2], 2 * seen[1] - seen[0])
    torch.testing.assert_close(seen[3], 3 * seen[1] - 2 * seen[0])
    torch.testing.assert_close(seen[5], seen[4] + (seen[4] - seen[1]) / 3)
    assert run.report().summary["cache_bytes"] == 2 * seen[0].nbytes


def test_a_forecast_ends_at_its_reach(wan: Any, render: Any) -> None:
    seen: list[torch.Tensor] = []
    with vidaccel.accelerate(wan, cache=Replay(computed=(0, 2, 6), reach=0.5, site="output")) as run:
        hook = wan.transformer.register_forward_hook(lambda _, inputs, out: seen.append(out[0]))
        render(wan, guidance_scale=1.0)
        hook.remove()
    assert forecast_steps(run) == [1, 3, 4, 5, 7, 8, 9, 10, 11]
    torch.testing.assert_close(seen[3], 1.5 * seen[2] - 0.5 * seen[0])
    assert torch.equal(seen[4], seen[3])
    torch.testing.assert_close(seen[7], seen[6] + (seen[6] - seen[2]) / 4)
    torch.testing.assert_close(seen[11], 1.5 * seen[6] - 0.5 * seen[2])
    with vidaccel.accelerate(wan, cache=CGTaylor(threshold=0.05, warmup=2, reach=0.5)) as run:
        assert torch.equal(render(wan), render(wan))
    assert forecast_steps(run)


def test_a_limit_of_memory_stops_before_more_is_held(wan: Any, render: Any) -> None:
    """Without guidance one branch is remembered, with it two."""
    one = estimate_bytes(CGTaylor(), wan.transformer, (3, 8, 8), branches=1)
    for limit, guidance, fits in ((0.5 * one, 1.0, False), (one, 1.0, True), (one, 3.0, False), (2 * one, 3.0, True)):
        with vidaccel.accelerate(wan, cache=CGTaylor(max_gib=limit / 2**30)) as run:
            if fits:
                render(wan, guidance_scale=guidance)
                assert 0 < run.report().summary["cache_bytes"] <= limit
            else:
                with pytest.raises(InstallError, match="more than its limit"):
                    render(wan, guidance_scale=guidance)
            assert run._caches[0].nbytes == 0
    render(wan)


def test_two_experts_remember_apart(make_wan: Any, render: Any) -> None:
    pipe = make_wan(experts=True)
    policy = CGTaylor(threshold=INFINITE, warmup=2)
    with vidaccel.accelerate(pipe, cache=policy) as run:
        first = render(pipe)
        assert torch.equal(render(pipe), first)
        render(pipe, steps=20)
        assert torch.equal(render(pipe), first)
        assert sum(cache.nbytes for cache in run._caches) == 0
    calls = [call for call in run.trace.calls if call.trajectory == 1 and call.branch == "cond"]
    phases = {name: [call for call in calls if call.expert == name] for name in ("high", "low")}
    assert [call.step for call in phases["high"] + phases["low"]] == list(range(STEPS))
    for phase in phases.values():
        assert [call.why for call in phase[:2]] == ["warm-up", "warm-up"]
        assert phase[2].forecast
    assert not calls[-1].forecast
    alone = estimate_bytes(policy, pipe.transformer, (3, 8, 8))
    assert max(call.cache_bytes for call in calls) < alone, "no more than two orders fit into a warm-up of two"


def test_an_aborted_first_expert_does_not_reach_the_second(make_wan: Any, render: Any) -> None:
    pipe = make_wan(experts=True)

    def abort(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 9:
            raise KeyError("abort")
        return kwargs

    with vidaccel.accelerate(pipe, cache=CACHE):
        expected = render(pipe, steps=20)
        with pytest.raises(KeyError):
            render(pipe, callback_on_step_end=abort)
        assert torch.equal(render(pipe, steps=20), expected)


@pytest.mark.parametrize("threshold", [0.05, INFINITE])
def test_together_with_radial_attention(wan: Any, render: Any, threshold: float) -> None:
    radial, schedule = Radial(block=16), Schedule(dense_steps=3, dense_layers=1)
    with vidaccel.accelerate(wan, radial, density=0.4, schedule=schedule) as run:
        sparse = render(wan)
    with vidaccel.accelerate(
        wan, radial, density=0.4, schedule=schedule, cache=CGTaylor(threshold=0.0, warmup=2)
    ) as run:
        assert torch.equal(render(wan), sparse)
    with vidaccel.accelerate(
        wan, radial, density=0.4, schedule=schedule, cache=CGTaylor(threshold=threshold, warmup=2)
    ) as run:
        both = render(wan)
        assert torch.equal(render(wan), both)
    assert not torch.equal(both, sparse)
    assert forecast_steps(run)
    assert not any("did not run" in note for note in run.trace.notes)
    for call in run.trace.calls:
        assert len(call.kernels) == len(call.scheduled)
        assert len(call.scheduled) + len(call.dense) + len(call.skipped) == LAYERS
    assert run.report().summary["sparse_layer_calls"] == sum(len(call.kernels) for call in run.trace.calls)


def test_processors_set_by_hand_after_the_cache(wan: Any, render: Any) -> None:
    radial = Radial(block=16)
    with vidaccel.accelerate(wan, radial, density=0.4, schedule=Schedule(), cache=CACHE):
        expected = render(wan)
    with vidaccel.accelerate(wan, cache=CACHE):
        wan.transformer.set_attn_processor(vidaccel.attn_processors(wan.transformer, radial, density=0.4))
        assert torch.equal(render(wan), expected)
        vidaccel.remove(wan.transformer)
    assert not wan.transformer._forward_pre_hooks


@pytest.mark.parametrize("policy", [CACHE, EasyCache(threshold=0.3, warmup=3)], ids=lambda policy: policy.name)
def test_state_dict_is_the_same_during_a_call(wan: Any, render: Any, policy: CachePolicy) -> None:
    transformer = wan.transformer
    render(wan)  # diffusers leaves a registry of hooks behind
    before, blocks, attributes = dict(transformer.state_dict()), transformer.blocks, set(vars(transformer))
    seen: list[bool] = []

    def look(*_: Any) -> None:
        state = transformer.state_dict()
        seen.append(list(state) == list(before) and all(state[n].data_ptr() == t.data_ptr() for n, t in before.items()))
        seen.append(dict(transformer.named_parameters()).keys() == set(before))

    with vidaccel.accelerate(wan, cache=policy):
        hook = transformer.proj_out.register_forward_pre_hook(look)
        render(wan)
        hook.remove()
        assert list(transformer.state_dict()) == list(before)
    assert seen
    assert all(seen)
    assert transformer.blocks is blocks
    assert set(vars(transformer)) == attributes
    assert not transformer._forward_hooks
    assert not transformer._forward_pre_hooks


def test_two_pipelines_of_a_class(make_wan: Any, render: Any) -> None:
    one, two = make_wan(seed=0), make_wan(seed=7)
    stock, expected = render(two), []
    for pipe, policy in ((one, CACHE), (two, EVERY_KIND[2])):
        with vidaccel.accelerate(pipe, cache=policy):
            expected.append(render(pipe))
    with vidaccel.accelerate(one, cache=CACHE):
        assert torch.equal(render(two), stock)
        with vidaccel.accelerate(two, cache=EVERY_KIND[2]):
            assert torch.equal(render(one), expected[0])
            assert torch.equal(render(two), expected[1])


def test_two_pipelines_in_turns_on_one_transformer(make_wan: Any, render: Any) -> None:
    from diffusers import WanPipeline

    one = make_wan()
    two = WanPipeline(**one.components)
    two.set_progress_bar_config(disable=True)
    with vidaccel.accelerate(one, cache=CACHE):
        expected = render(one)
        assert torch.equal(render(two), expected)
        assert torch.equal(render(one), expected)


def test_another_pipeline_whose_number_of_steps_nobody_knows(make_wan: Any, render: Any) -> None:
    """Only WanPipeline tells its transformer; here its last count is taken for the other's."""
    from diffusers import WanVideoToVideoPipeline
    from PIL import Image

    one = make_wan()
    two = WanVideoToVideoPipeline(**{n: getattr(one, n) for n in make_wan("WanVideoToVideoPipeline").components})
    two.set_progress_bar_config(disable=True)
    with vidaccel.accelerate(one, cache=CACHE) as run:
        render(one, steps=9)
        assert not run.trace.notes
        with pytest.warns(UserWarning, match="a step after the last of 9 was called"):
            render(two, video=[Image.new("RGB", (128, 128))] * 9, strength=0.9, num_frames=None)


def test_lora_between_runs(wan: Any, render: Any) -> None:
    from peft import LoraConfig

    with vidaccel.accelerate(wan, cache=CACHE) as run:
        plain = render(wan)
        torch.manual_seed(3)
        wan.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
        adapted = render(wan)
        assert (adapted - plain).abs().max() > 1e-3
        assert torch.equal(render(wan), adapted)
        run.trace.calls.clear()
        wan.transformer.delete_adapters("default")
        assert torch.equal(render(wan), plain)
        assert forecast_steps(run)


def model_offload(transformer: Any) -> None:
    """What enable_model_cpu_offload does to a transformer, with the CPU in the place of a GPU."""
    from accelerate.hooks import CpuOffload, add_hook_to_module

    add_hook_to_module(transformer, CpuOffload(execution_device="cpu"), append=True)


def sequential_offload(transformer: Any) -> None:
    """What enable_sequential_cpu_offload does."""
    from accelerate import cpu_offload

    cpu_offload(transformer, torch.device("cpu"), offload_buffers=False)


def unhook(transformer: Any) -> None:
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(transformer, recurse=True)


@pytest.mark.parametrize("policy", [CACHE, EasyCache(threshold=0.2, warmup=3)], ids=lambda policy: policy.name)
@pytest.mark.parametrize("offload", [model_offload, sequential_offload])
def test_offload_before_and_after(wan: Any, render: Any, policy: CachePolicy, offload: Callable[[Any], None]) -> None:
    transformer = wan.transformer
    with vidaccel.accelerate(wan, cache=policy) as run:
        expected, steps = render(wan), forecast_steps(run)
        offload(transformer)
        assert torch.equal(render(wan), expected)
        # Pipelines take the hooks away and set them again, model offload after each call, both when a LoRA is loaded.
        unhook(transformer)
        offload(transformer)
        assert torch.equal(render(wan), expected)
        assert forecast_steps(run) == 3 * steps
    with vidaccel.accelerate(wan, cache=policy) as run:
        assert torch.equal(render(wan), expected)
        unhook(transformer)
        offload(transformer)
        assert torch.equal(render(wan), expected)
        assert forecast_steps(run) == 2 * steps


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
@pytest.mark.parametrize("order", ["offload first", "cache first"])
def test_group_offload(wan: Any, render: Any, level: str, order: str) -> None:
    with vidaccel.accelerate(wan, cache=CACHE):
        expected = render(wan)

    def offload() -> None:
        arguments = {"num_blocks_per_group": 1} if level == "block_level" else {}
        device = torch.device("cpu")
        wan.transformer.enable_group_offload(device, offload_device=device, offload_type=level, **arguments)

    if order == "offload first":
        offload()
    with vidaccel.accelerate(wan, cache=CACHE) as run:
        if order == "cache first":
            offload()
        assert torch.equal(render(wan), expected)
        steps = forecast_steps(run)
        assert torch.equal(render(wan), expected)
        assert forecast_steps(run) == 2 * steps != []


def test_a_hook_registry_that_loses_its_hooks(wan: Any, render: Any) -> None:
    """diffusers' registries overwrite and restore a module's forward; stream offload removes inner ones."""
    from diffusers.hooks import HookRegistry, ModelHook

    with vidaccel.accelerate(wan, cache=CACHE) as run:
        expected, steps = render(wan), forecast_steps(run)
        for module in (wan.transformer, *wan.transformer.blocks):
            registry = HookRegistry.check_if_exists_or_initialize(module)
            registry.register_hook(ModelHook(), "one")
            registry.register_hook(ModelHook(), "two")
        assert torch.equal(render(wan), expected)
        for module in (wan.transformer, *wan.transformer.blocks):
            HookRegistry.check_if_exists_or_initialize(module).remove_hook("one", recurse=False)
        assert torch.equal(render(wan), expected)
        assert forecast_steps(run) == 3 * steps


def test_what_is_not_a_number_is_computed(wan: Any, render: Any) -> None:
    calls = Counter[str]()

    def spoil(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        calls.update("x")
        return output * math.nan if calls["x"] == 12 else output

    with vidaccel.accelerate(wan, cache=CGTaylor(threshold=INFINITE, warmup=5)) as run, torch.no_grad():
        hook = wan.transformer.blocks[0].register_forward_hook(spoil)
        render(wan)
        hook.remove()
    bad = next(call for call in run.trace.calls if call.why == "not a number")
    assert not bad.forecast
    assert math.isnan(bad.gate_error)
    assert "NaN" not in run.report().to_json()


@each_kind
def test_latents_of_more_channels_than_the_output(make_wan: Any, render: Any, policy: CachePolicy) -> None:
    from PIL import Image

    pipe = make_wan("WanImageToVideoPipeline", in_channels=36)
    image = Image.new("RGB", (128, 128), (200, 30, 30))
    with vidaccel.accelerate(pipe, cache=policy) as run:
        first = render(pipe, image=image)
        assert torch.equal(render(pipe, image=image), first)
    assert forecast_steps(run)
    assert run.report().summary["cache_bytes"] == estimate_bytes(policy, pipe.transformer, (3, 8, 8))


def test_timesteps_per_token(make_wan: Any, render: Any) -> None:
    pipe = make_wan(ti2v=True)
    for policy in (CACHE, TeaCache(threshold=0.5)):
        with vidaccel.accelerate(pipe, cache=policy) as run:
            render(pipe)
        assert forecast_steps(run)
        assert run.report().summary["cache_bytes"] == estimate_bytes(policy, pipe.transformer, (3, 8, 8))


def test_vace_keeps_its_control_blocks(make_wan: Any, render: Any) -> None:
    pipe = make_wan("WanVACEPipeline", vace_layers=[0, 2], vace_in_channels=96)
    stock = render(pipe)
    with vidaccel.accelerate(pipe, cache=CGTaylor(threshold=0.0)):
        assert torch.equal(render(pipe), stock)
    with vidaccel.accelerate(pipe, cache=CACHE) as run:
        assert (render(pipe) - stock).norm() < 0.3 * stock.norm()
    assert forecast_steps(run)


def test_branches_told_apart_by_their_embeddings(make_wan: Any, render: Any) -> None:
    from PIL import Image

    pipe = make_wan("WanVideoToVideoPipeline")
    video = [Image.new("RGB", (128, 128), (8 * n, 90, 30)) for n in range(9)]
    with vidaccel.accelerate(pipe, cache=CACHE) as run:
        first = render(pipe, video=video, strength=0.9, num_frames=None)
        assert torch.equal(render(pipe, video=video, strength=0.9, num_frames=None), first)
    assert forecast_steps(run) == forecast_steps(run, "uncond") != []


def test_a_new_video_may_find_its_prompt_where_the_last_one_had_its_negative(wan: Any) -> None:
    first, second = torch.randn(2, 1, 4, 32)
    latents = torch.randn(1, 16, 2, 8, 8)
    with vidaccel.accelerate(wan, cache=TaylorSeer()) as run, torch.no_grad():
        for pair in ((first, second), (second, first), (second.clone(), first)):
            for n in range(4):
                for embeds in pair:
                    wan.transformer(latents, torch.tensor([900.0 - n]), encoder_hidden_states=embeds)
    assert [call.branch for call in run.trace.calls] == ["cond", "uncond"] * 12
    assert [call.step for call in run.trace.calls[::2]] == [0, 1, 2, 3] * 3


def test_branches_that_nobody_can_tell_apart_are_not_cached(wan: Any) -> None:
    run = vidaccel.accelerate(wan, cache=TaylorSeer())
    latents = torch.randn(1, 16, 2, 8, 8)
    with torch.no_grad():
        for n in range(4):
            states = [torch.randn(1, 4, 32) for _ in range(3)]
            for each in states:
                wan.transformer(latents, torch.tensor([900.0 - n]), encoder_hidden_states=each)
    assert any(call.branch is None and call.cache_bytes is None for call in run.trace.calls)
    assert any("cannot be told apart" in note for note in run.trace.notes)
    run.remove()


def test_recorded_steps_replay_to_the_same_video(wan: Any, render: Any) -> None:
    with vidaccel.accelerate(wan, cache=CACHE) as run:
        render(wan, "ragged", steps=9)
        expected = render(wan)
    schedule = recorded(run.trace.calls)
    text = vidaccel.Recipe(cache=schedule).to_yaml()
    with vidaccel.accelerate(wan, recipe=vidaccel.Recipe.from_text(text)) as run:
        assert torch.equal(render(wan), expected)
    assert forecast_steps(run)
    assert set(schedule.computed).isdisjoint(forecast_steps(run))
    with vidaccel.accelerate(wan, "dense") as run:
        render(wan, steps=2)
    with pytest.raises(RecipeError, match="no cached call"):
        recorded(run.trace.calls)


def test_recorded_steps_of_easycache_replay_to_the_same_video(wan: Any, render: Any) -> None:
    with vidaccel.accelerate(wan, cache=EasyCache(threshold=0.5, warmup=2)) as run:
        expected = render(wan)
    schedule = recorded(run.trace.calls, order=0, base="latent")
    assert len(schedule.computed) < STEPS
    with vidaccel.accelerate(wan, recipe=vidaccel.Recipe.from_text(vidaccel.Recipe(cache=schedule).to_yaml())):
        assert torch.equal(render(wan), expected)
    with vidaccel.accelerate(wan, cache=replace(schedule, base="nothing")):
        assert not torch.equal(render(wan), expected)
    with pytest.raises(RecipeError, match="base 'input' is unknown; possible: nothing, latent"):
        Replay(computed=(0,), base="input")  # type: ignore[arg-type]


def test_placed_is_a_schedule_that_fits_the_number_of_steps(wan: Any, render: Any) -> None:
    for steps in (STEPS, 17):
        with vidaccel.accelerate(wan, cache=Replay(computed=placed(steps), order=0)):
            expected = render(wan, steps=steps)
        with vidaccel.accelerate(wan, cache="placed"):
            assert torch.equal(render(wan, steps=steps), expected)


@pytest.mark.parametrize("policy", [CACHE, EasyCache(threshold=0.2, warmup=3)], ids=lambda policy: policy.name)
def test_shadow_steps_report_the_true_error_and_change_nothing(wan: Any, render: Any, policy: CachePolicy) -> None:
    from dataclasses import replace

    with vidaccel.accelerate(wan, cache=policy):
        expected = render(wan)
    with vidaccel.accelerate(wan, cache=replace(policy, shadow=2)) as run:
        assert torch.equal(render(wan), expected)
    forecast = [call for call in run.trace.calls if call.forecast and call.branch == "cond"]
    assert [call.true_error is not None for call in forecast] == [n % 2 == 1 for n in range(len(forecast))]
    assert all(0 < call.true_error < 1 for call in forecast if call.true_error is not None)


def test_the_worst_sample_decides_where_asked(wan: Any, render: Any) -> None:
    prompts = {"prompt": ["a cat", "a dog"], "negative_prompt": ["bad", "worse"]}
    errors = {}
    for per_sample in (False, True):
        with vidaccel.accelerate(wan, cache=CGTaylor(threshold=0.0, warmup=2, per_sample=per_sample)) as run:
            render(wan, **prompts)
        errors[per_sample] = [call.gate_error for call in run.trace.calls if call.branch == "cond" and call.gate_error]
    assert len(errors[True]) == len(errors[False]) == STEPS - 1
    assert all(worst >= batch for worst, batch in zip(errors[True], errors[False], strict=True))
    assert errors[True] != errors[False]


def test_an_install_that_reaches_nothing_is_an_error(wan: Any, render: Any) -> None:
    transformer = wan.transformer
    stock, blocks = transformer.forward, transformer.blocks
    transformer.blocks = torch.nn.ModuleList()
    with pytest.raises(InstallError, match="has no blocks in blocks"):
        vidaccel.accelerate(wan, cache=CACHE)
    transformer.blocks = blocks
    assert not transformer._forward_pre_hooks

    def other(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        for block in blocks:
            assert block is not None
        return (hidden_states,)

    transformer.forward = other
    with vidaccel.accelerate(wan, cache=CACHE), pytest.raises(InstallError, match="reaches nothing"):
        render(wan)
    transformer.forward = stock
    del transformer.forward


def test_a_displaced_cache_is_noticed(wan: Any, render: Any) -> None:
    transformer = wan.transformer
    with vidaccel.accelerate(wan, cache=CACHE) as run:
        render(wan)
        transformer.forward = lambda hidden_states, *args, **kwargs: (hidden_states,)
        with pytest.warns(UserWarning, match="the cache was displaced"):
            render(wan)
        del transformer.forward
    assert any("displaced" in note for note in run.trace.notes)


def test_diffusers_own_cache_is_refused(wan: Any, render: Any) -> None:
    from diffusers import FirstBlockCacheConfig

    wan.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(InstallError, match=r"disable_cache\(\)"):
        vidaccel.accelerate(wan, cache=CACHE)
    wan.transformer.disable_cache()
    with vidaccel.accelerate(wan, cache=CACHE):
        wan.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        with pytest.raises(InstallError, match=r"disable_cache\(\)"):
            render(wan)
        wan.transformer.disable_cache()
        render(wan)


def test_few_steps_are_warned_about(wan: Any, render: Any) -> None:
    with vidaccel.accelerate(wan, cache=CGTaylor(warmup=2)) as run:
        with pytest.warns(UserWarning, match="8 steps are too few for caching to help"):
            render(wan, steps=8)
        render(wan, steps=9)
    assert sum("too few" in note for note in run.trace.notes) == 1


def test_parameters_found_on_another_number_of_steps_are_warned_about(wan: Any, render: Any) -> None:
    with vidaccel.accelerate(wan, cache=CGTaylor(threshold=0.05, steps=STEPS)) as run:
        render(wan)
        assert not run.trace.notes
        with pytest.warns(UserWarning, match="found on runs of 12 steps, and this one has 9"):
            render(wan, steps=9)


def test_asking_wrongly(wan: Any, render: Any) -> None:
    with pytest.raises(RecipeError, match="cache 'cg-tailor' is unknown; caches: cg-taylor, easycache"):
        vidaccel.accelerate(wan, cache="cg-tailor")
    with pytest.raises(InstallError, match=r"density 0\.3 was asked for without an attention pattern"):
        vidaccel.accelerate(wan, cache="cg-taylor", density=0.3)
    with pytest.warns(UserWarning, match="a schedule was given without an attention pattern"):
        vidaccel.accelerate(wan, cache="cg-taylor", schedule=Schedule(dense_steps=3)).remove()
    with pytest.raises(InstallError, match="a cache"):
        vidaccel.accelerate(wan)
    for twice in ({"cache": "cg-taylor"}, {"attention": "radial"}):
        with vidaccel.accelerate(wan, cache="cg-taylor"), pytest.raises(InstallError, match="in one call"):
            vidaccel.accelerate(wan, **twice)
    with vidaccel.accelerate(wan, "radial"), pytest.raises(InstallError, match="in one call"):
        vidaccel.accelerate(wan, cache="cg-taylor")
    with vidaccel.accelerate(wan, cache="cg-taylor"), pytest.raises(InstallError, match="has a cache already"):
        Cache.of(wan.transformer, CACHE)
    assert not wan.transformer._forward_pre_hooks


def test_calls_without_a_pipeline_need_no_total_or_say_so(wan: Any) -> None:
    latents, states = torch.randn(1, 16, 2, 8, 8), torch.randn(1, 4, 32)
    with (
        vidaccel.accelerate(wan, cache="cg-taylor"),
        torch.no_grad(),
        pytest.raises(RecipeError, match="number of steps is unknown"),
    ):
        wan.transformer(latents, torch.tensor([900.0]), encoder_hidden_states=states)
    with vidaccel.accelerate(wan, cache=CACHE), pytest.raises(vidaccel.VidaccelError):
        wan.transformer(latents, torch.tensor([900.0]), encoder_hidden_states=states)
    with vidaccel.accelerate(wan, cache="placed"), torch.no_grad():
        wan.transformer(latents, torch.tensor([900.0]), encoder_hidden_states=states)
        with pytest.raises(RecipeError, match="their number is unknown"):
            wan.transformer(latents, torch.tensor([800.0]), encoder_hidden_states=states)
    with vidaccel.accelerate(wan, cache=TaylorSeer()), pytest.raises(InstallError, match="only infer"):
        wan.transformer(latents, torch.tensor([900.0]), encoder_hidden_states=states)


def test_sharded_blocks_are_refused(wan: Any) -> None:
    class FSDPModule:
        pass

    block = wan.transformer.blocks[1]
    block.__class__ = type("FSDPBlock", (type(block), FSDPModule), {})
    with pytest.raises(InstallError, match="FSDP"):
        vidaccel.accelerate(wan, cache=CACHE)


def test_report_tells_what_was_computed(wan: Any, render: Any) -> None:
    with vidaccel.accelerate(wan, cache=CACHE) as run:
        render(wan)
        render(wan)
    report = run.report()
    summary, calls = report.summary, report.data["calls"]
    assert summary["computed_steps"] + summary["forecast_steps"] == 2 * STEPS
    assert summary["cache_bytes"] > 0
    assert summary["saved_ms"] > 0
    assert [call["forecast"] for call in calls[::2]] == [call["forecast"] for call in calls[1::2]]
    gated = [call for call in calls[::2] if call["why"] == "rule"]
    assert all((call["gate_error"] < 0.05) == call["forecast"] for call in gated)
    for text in (report.to_markdown(), report.to_html()):
        assert "computed steps" in text
        assert "warm-up" in text


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("order", ["compile first", "cache first"])
def test_repeated_blocks_compile_to_one_graph(wan: Any, render: Any, order: str) -> None:
    """`fullgraph=True` raises at a break; the stock pipeline has one graph too."""
    from torch._dynamo.testing import CompileCounter

    policies = [CACHE, FirstBlock(threshold=0.1), EasyCache(threshold=0.2, warmup=3)]
    expected = []
    for policy in policies:
        with vidaccel.accelerate(wan, cache=policy):
            expected.append(render(wan))
    counter = CompileCounter()
    if order == "compile first":
        wan.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    for policy, video in zip(policies, expected, strict=True):
        with vidaccel.accelerate(wan, cache=policy) as run:
            if order == "cache first" and policy is policies[0]:
                wan.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
            torch.testing.assert_close(render(wan), video, atol=1e-5, rtol=1e-4)
            assert forecast_steps(run)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_repeated_blocks_with_radial_attention(wan: Any, render: Any) -> None:
    """A dense graph and a sparse one, as without the cache."""
    from torch._dynamo.testing import CompileCounter

    settings: dict[str, Any] = {"density": 0.4, "schedule": Schedule(dense_steps=3), "cache": CACHE}
    with vidaccel.accelerate(wan, Radial(block=16), **settings):
        expected = render(wan)
    counter = CompileCounter()
    wan.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    with vidaccel.accelerate(wan, Radial(block=16), **settings) as run:
        torch.testing.assert_close(render(wan), expected, atol=1e-5, rtol=1e-4)
    assert counter.frame_count <= 3
    assert all(len(call.kernels) == len(call.scheduled) for call in run.trace.calls)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_whole_model_compiles(wan: Any, render: Any) -> None:
    """With breaks at the gate, and nothing compiled again in a second video."""
    from torch._dynamo.testing import CompileCounter

    counter, plain = CompileCounter(), wan.transformer
    with vidaccel.accelerate(wan, cache=CACHE):
        expected = render(wan)
    with vidaccel.accelerate(wan, cache=CACHE) as run:
        wan.transformer = torch.compile(plain, backend=counter)
        torch.testing.assert_close(render(wan), expected, atol=1e-5, rtol=1e-4)
        compilations = counter.frame_count
        assert compilations > 0
        steps = forecast_steps(run)
        render(wan)
        assert counter.frame_count == compilations
        assert forecast_steps(run) == 2 * steps != []
    assert not plain._forward_hooks


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"replay"}))
def test_every_name_runs(wan: Any, render: Any, name: str) -> None:
    """The other families: `test_family_caching.py`."""
    with vidaccel.accelerate(wan, cache=name) as run:
        render(wan)
    assert run.recipe.cache == POLICIES[name]()
    assert run.report().summary["cache_bytes"] > 0
