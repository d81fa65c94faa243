"""Caches on the other families: two lists of blocks, two streams, batched guidance, modulated inputs.

`test_caching.py` has everything that users do to a cached Wan; the mechanism is the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny_pipelines
import torch

import vidaccel
from vidaccel.caching import (
    POLICIES,
    CachePolicy,
    CGTaylor,
    EasyCache,
    FirstBlock,
    MagCache,
    TaylorSeer,
    TeaCache,
    estimate_bytes,
)
from vidaccel.caching.published import CG_TAYLOR, TEACACHE, published
from vidaccel.family import family_of
from vidaccel.patterns import Radial
from vidaccel.schedule import Schedule

INFINITE = math.inf
STEPS = 9
FAMILIES = ("hunyuan", "hunyuan15", "cogvideox")
# Forecasts some of the steps after a warm-up of two or three.
SOME = [
    CGTaylor(threshold=0.3, warmup=2, gate_order=1),
    FirstBlock(threshold=0.5),
    TeaCache(threshold=3.0, coefficients=(1.0, 0.0), warmup=2),
    EasyCache(threshold=0.5, warmup=3),
    MagCache(ratios=(1.0, 0.98, 0.97), warmup=0.3),
    TaylorSeer(interval=3, site="output"),
]
NONE = [CGTaylor(threshold=0.0), TeaCache(threshold=0.0), EasyCache(threshold=0.0)]

each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def pipeline() -> Callable[[str], Any]:
    """Two blocks, for HunyuanVideo one of each kind; caches leave no trace, so tests share them."""
    built: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in built:
            built[family] = getattr(tiny_pipelines, family)()
        return built[family]

    return get


@pytest.fixture
def render(render: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A shorter video of more steps."""

    def run(pipe: Any, size: str = "even", **kwargs: Any) -> torch.Tensor:
        return render(pipe, size, **{"steps": STEPS, "frames": 9, **kwargs})

    return run


def blocks_of(transformer: Any) -> list[Any]:
    lists = family_of(transformer).stack(transformer).lists
    return [block for name in lists for block in getattr(transformer, name)]


@contextmanager
def counted(transformer: Any) -> Iterator[Counter[int]]:
    """How often each block really runs."""
    calls: Counter[int] = Counter()
    blocks = blocks_of(transformer)
    hooks = [block.register_forward_pre_hook(lambda *_, n=n: calls.update([n])) for n, block in enumerate(blocks)]
    yield calls
    for hook in hooks:
        hook.remove()


def forecast_steps(run: Any) -> list[int]:
    return [call.step for call in run.trace.calls if call.forecast and call.branch != "uncond"]


@each_family
def test_a_zero_threshold_is_bit_exact(pipeline: Any, render: Any, family: str) -> None:
    pipe = pipeline(family)
    stock = render(pipe)
    for policy in NONE:
        with vidaccel.accelerate(pipe, cache=policy) as run:
            assert torch.equal(render(pipe), stock), policy.name
        assert not forecast_steps(run)


@each_family
@pytest.mark.parametrize("policy", SOME, ids=lambda policy: policy.name)
def test_some_steps_are_forecast_alike_in_a_second_run(
    pipeline: Any, render: Any, policy: CachePolicy, family: str
) -> None:
    """In memory that was predicted."""
    pipe = pipeline(family)
    stock = render(pipe)
    with vidaccel.accelerate(pipe, cache=policy) as run:
        first, steps = render(pipe), forecast_steps(run)
        assert torch.equal(render(pipe), first)
        assert forecast_steps(run) == 2 * steps
    assert 0 < len(steps) < STEPS
    assert 0 < (first - stock).norm() < stock.norm()
    assert torch.equal(render(pipe), stock)
    branches = {call.branch for call in run.trace.calls}
    batch = 2 if branches == {"cond_uncond"} else 1
    predicted = estimate_bytes(policy, pipe.transformer, (3, 8, 8), batch=batch, branches=len(branches))
    assert run.report().summary["cache_bytes"] == predicted


@each_family
@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"replay"}))
def test_every_name_runs(pipeline: Any, render: Any, name: str, family: str) -> None:
    """What nobody has published for a model of this size is said."""
    with vidaccel.accelerate(pipeline(family), cache=name) as run:
        assert render(pipeline(family)).isfinite().all()
    assert run.report().summary["computed_steps"] > 0
    told = any("nobody has published" in note for note in run.trace.notes)
    needed = name == "magcache" or (name in ("cg-taylor", "easycache", "teacache") and family != "hunyuan")
    assert told == needed


@each_family
@pytest.mark.parametrize(
    ("policy", "computed", "first"),
    [
        (CGTaylor(threshold=INFINITE, warmup=3, last=2), [0, 1, 2, 7, 8], True),
        (FirstBlock(threshold=INFINITE), [0], True),
        (TeaCache(threshold=INFINITE, warmup=2, last=1), [0, 1, 8], False),
        (TaylorSeer(interval=4), [0, 4, 8], False),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_an_infinite_threshold_computes_what_the_caps_say(
    pipeline: Any, render: Any, policy: CachePolicy, computed: list[int], first: bool, family: str
) -> None:
    """`first`: the first block runs at every step, to be looked at; of guided branches, for the one that decides."""
    pipe = pipeline(family)
    with vidaccel.accelerate(pipe, cache=policy) as run, counted(pipe.transformer) as calls:
        render(pipe)
    assert forecast_steps(run) == [n for n in range(STEPS) if n not in computed]
    branches = len({call.branch for call in run.trace.calls})
    others = {n: branches * len(computed) for n in range(1, len(blocks_of(pipe.transformer)))}
    followers = STEPS if policy.name == "first-block" else len(computed)
    assert calls == {0: STEPS + (branches - 1) * followers if first else branches * len(computed)} | others


@each_family
def test_together_with_radial_attention(pipeline: Any, render: Any, family: str) -> None:
    pipe, layers = pipeline(family), len(blocks_of(pipeline(family).transformer))
    settings: dict[str, Any] = {"density": 0.4, "schedule": Schedule(dense_steps=3, dense_layers=1)}
    with vidaccel.accelerate(pipe, Radial(block=16), **settings):
        sparse = render(pipe)
    with vidaccel.accelerate(pipe, Radial(block=16), **settings, cache=CGTaylor(threshold=0.0)):
        assert torch.equal(render(pipe), sparse)
    with vidaccel.accelerate(pipe, Radial(block=16), **settings, cache=SOME[0]) as run:
        both = render(pipe)
        assert torch.equal(render(pipe), both)
    assert not torch.equal(both, sparse)
    assert forecast_steps(run)
    assert not any("did not run" in note for note in run.trace.notes)
    for call in run.trace.calls:
        assert len(call.kernels) == len(call.scheduled)
        assert len(call.scheduled) + len(call.dense) + len(call.skipped) == layers


def test_branches_whose_texts_are_cut_to_different_lengths(pipeline: Any, render: Any) -> None:
    """HunyuanVideo-1.5 is read with as much text as is used: 64 slots here, 124 there."""
    pipe = pipeline("hunyuan15")
    with vidaccel.accelerate(pipe, Radial(block=16), density=0.4, cache=SOME[0]) as run:
        render(pipe, prompt="a cat that plays the piano in a room with a blue door and two windows")
    assert {call.branch: call.text for call in run.trace.calls} == {"cond": 124, "uncond": 64}
    assert forecast_steps(run) == [call.step for call in run.trace.calls if call.forecast and call.branch == "uncond"]
    assert forecast_steps(run)
    assert not any("did not run" in note for note in run.trace.notes)


@each_family
@pytest.mark.parametrize("at", [0, -1])
def test_an_exception_puts_every_list_back(pipeline: Any, render: Any, family: str, at: int) -> None:
    transformer = pipeline(family).transformer
    before = blocks_of(transformer)

    def fail(*_: Any) -> None:
        raise KeyError("boom")

    with vidaccel.accelerate(pipeline(family), cache=SOME[0]) as run:
        expected = render(pipeline(family))
        hook = before[at].register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            render(pipeline(family))
        hook.remove()
        assert all(now is then for now, then in zip(blocks_of(transformer), before, strict=True))
        assert run.trace.calls[-1].failed
        assert torch.equal(render(pipeline(family)), expected)


def test_image_to_video_is_one_branch(render: Any) -> None:
    """HunyuanVideo's pipeline names no context, so its embeddings tell the branch."""
    from PIL import Image

    pipe = tiny_pipelines.hunyuan("token_replace")
    embeds = {
        "prompt_embeds": torch.randn(1, 24, 16), "pooled_prompt_embeds": torch.ones(1, 8),
        "prompt_attention_mask": (torch.arange(24) < 15)[None].long(), "prompt": None, "negative_prompt": None,
        "max_sequence_length": None, "image": Image.new("RGB", (128, 128), (200, 30, 30)),
    }  # fmt: skip
    stock = render(pipe, **embeds)
    for policy in (SOME[0], SOME[2]):
        with vidaccel.accelerate(pipe, cache=policy) as run:
            cached = render(pipe, **embeds)
        assert {call.branch for call in run.trace.calls} == {"cond"}
        assert forecast_steps(run)
        assert not torch.equal(cached, stock)
    with vidaccel.accelerate(pipe, cache=TeaCache(threshold=0.0)):
        assert torch.equal(render(pipe, **embeds), stock)


@pytest.mark.parametrize(
    ("cls", "config", "model"),
    [
        ("HunyuanVideoTransformer3DModel", {}, "hunyuan"),
        ("HunyuanVideo15Transformer3DModel", {}, "hunyuan15"),
        ("CogVideoXTransformer3DModel", {}, "cogvideox-2b"),
        ("CogVideoXTransformer3DModel", {"num_layers": 42, "num_attention_heads": 48}, "cogvideox-5b"),
        (
            "CogVideoXTransformer3DModel",
            {"num_layers": 42, "num_attention_heads": 48, "in_channels": 32},
            "cogvideox-5b-i2v",
        ),
        (
            "CogVideoXTransformer3DModel",
            {"num_layers": 42, "num_attention_heads": 48, "patch_size_t": 2, "patch_bias": False},
            "cogvideox1.5-t2v-5b",
        ),
        (
            "CogVideoXTransformer3DModel",
            {"num_layers": 42, "num_attention_heads": 48, "patch_size_t": 2, "patch_bias": False, "in_channels": 32},
            "cogvideox1.5-i2v-5b",
        ),
    ],
)
def test_real_configurations_have_their_published_parameters(cls: str, config: dict[str, Any], model: str) -> None:
    """On the meta device, so that nothing is held."""
    import diffusers

    with torch.device("meta"):
        transformer = getattr(diffusers, cls)(**config)
    assert family_of(transformer).stack(transformer).model == model
    coefficients = published(TEACACHE, model)
    assert (coefficients is None) == (model == "hunyuan15")
    assert (published(CG_TAYLOR, model) is not None) == (model == "hunyuan")
    if model == "cogvideox-5b-i2v":  # the authors give it those of text to video
        assert coefficients == TEACACHE["cogvideox-5b"]
