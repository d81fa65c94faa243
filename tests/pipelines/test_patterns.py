"""Every pattern on the tiny Wan pipeline: it equals the stock one, whose own SDPA is given the same mask."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounter

import vidaccel
from vidaccel import install, processors, trace
from vidaccel.caching import CGTaylor
from vidaccel.errors import InstallError, MaskError, PatternError, VidaccelWarning
from vidaccel.family import Call, family_named, family_of
from vidaccel.grid import Site, TokenLayout, VideoGrid
from vidaccel.patterns import (
    PATTERNS,
    Ann,
    FlashBlock,
    FreeSwim,
    LightForcing,
    Neighborhood,
    Pattern,
    PerHead,
    PerLayer,
    Plan,
    Pyramid,
    Radial,
    SlidingWindow,
    SparseVideoGen,
    TempCache,
    TopK,
    Union,
)
from vidaccel.pipelines.wan import WAN
from vidaccel.schedule import Schedule

# Small grids, on which some patterns touch nearly every block.
EVERYWHERE = Schedule(even_if_slower=True)
# 7 latent frames of 8x8, 7x9 and 5x11: 28 blocks of 16 and more.
CASES: dict[str, tuple[Pattern, float | None]] = {
    "radial": (Radial(block=16), 0.4),
    "neighborhood": (Neighborhood(block=16), 0.4),
    "neighborhood, strides": (Neighborhood((5, 3, 4), (2, 1, 3), block=16), None),
    "neighborhood, dilated": (Neighborhood((3, 2, 3), dilation=(2, 2, 2), block=16), None),
    "neighborhood, causal": (Neighborhood((4, 5, 5), causal=(True, False, False), block=16, sink_frames=1), None),
    "sliding-window": (SlidingWindow(block=16), 0.4),
    "sliding-window, heads": (SlidingWindow(heads=((3, 1, 2), (1, 2, 0)), tile=(1, 4, 4), block=16), None),
    "sliding-window, line": (SlidingWindow(5, block=16), None),
    "freeswim": (FreeSwim((4, 4), block=16, sink_frames=1), None),
    "per-head": (PerHead((Neighborhood(block=16), SlidingWindow(block=16)), (1, 0)), 0.4),
    "union": (Union((Neighborhood(block=16), Neighborhood((0, 1, 1), block=16)), sink_frames=1), 0.6),
    "per-layer": (PerLayer({0: Radial(block=16), 1: SlidingWindow(block=16)}), 0.4),
}
# What they leave out at one step was computed at another.
LATE: dict[str, tuple[Pattern, float]] = {
    "flashblock": (FlashBlock({"name": "topk", "block": 16}, every=2, threshold=0.05), 0.8),
}
PARTS = {
    "flashblock": {"part": {"name": "radial", "block": 16}, "every": 2},
    "per-head": {"parts": ({"name": "radial", "block": 16}, {"name": "topk", "block": 16}), "heads": (0, 1)},
    "union": {"parts": ({"name": "radial", "block": 16}, {"name": "sliding-window", "window": [1, 1, 1], "block": 16})},
    "per-layer": {"layers": {0: {"name": "radial", "block": 16}, 2: {"name": "neighborhood", "block": 16}}},
}
DYNAMIC: dict[str, tuple[Pattern, float]] = {
    "ann": (Ann(bits=4, block=16), 0.4),
    "light-forcing": (LightForcing(keep_frames=5, block=16), 0.4),
    "svg": (SparseVideoGen(block=16), 0.4),
    "topk": (TopK(block=16), 0.4),
    "topk, adaptive": (TopK(adaptive=True, block=16), 0.4),
    "topk, top-p": (TopK(top_p=0.5, block=16), 0.5),
    "topk, union": (Union((TopK(block=16), SlidingWindow(3, block=16)), sink_frames=1), 0.7),
    "topk, per head": (PerHead((TopK(block=16), SlidingWindow(block=16)), (1, 0)), 0.4),
}
# Their keys are no tokens, so that no mask of the stock pipeline says the same.
MERGED: dict[str, tuple[Pattern, float]] = {
    "pyramid": (Pyramid(block=16), 0.45),
    "tempcache": (TempCache(block=16), 0.45),
}
NAMED = {
    "flashblock": processors.FlashBlockAttnProcessor,
    "ann": processors.AnnAttnProcessor,
    "light-forcing": processors.LightForcingAttnProcessor,
    "freeswim": processors.FreeSwimAttnProcessor,
    "neighborhood": processors.NeighborhoodAttnProcessor,
    "per-head": processors.PerHeadAttnProcessor,
    "per-layer": processors.PerLayerAttnProcessor,
    "pyramid": processors.PyramidAttnProcessor,
    "radial": processors.RadialAttnProcessor,
    "sliding-window": processors.SlidingWindowAttnProcessor,
    "svg": processors.SparseVideoGenAttnProcessor,
    "tempcache": processors.TempCacheAttnProcessor,
    "topk": processors.TopKAttnProcessor,
    "union": processors.UnionAttnProcessor,
}


@pytest.mark.parametrize("size", ["even", "ragged", "wide"])
@pytest.mark.parametrize("case", CASES)
def test_equals_stock_with_dense_mask(
    wan: Any, assert_equals_masked_stock: Any, render: Any, case: str, size: str
) -> None:
    pattern, density = CASES[case]
    stock = render(wan, size, steps=2)
    run = vidaccel.accelerate(wan, pattern, density=density, schedule=EVERYWHERE)
    latents = assert_equals_masked_stock(wan, run, size, steps=2)
    assert (latents - stock).abs().max() > 1e-3, "the mask changed nothing, so this test could not fail"
    assert all(len(call.kernels) == 3 for call in run.trace.calls)


@pytest.mark.parametrize("case", CASES)
def test_several_prompts(wan: Any, assert_equals_masked_stock: Any, case: str) -> None:
    pattern, density = CASES[case]
    run = vidaccel.accelerate(wan, pattern, density=density, schedule=Schedule(dense_steps=1))
    prompts = {"prompt": ["a cat", "two dogs"], "negative_prompt": ["bad", "worse"]}
    assert_equals_masked_stock(wan, run, steps=2, **prompts)


@pytest.mark.parametrize("name", sorted(NAMED))
def test_named_processor_agrees(wan: Any, render: Any, name: str) -> None:
    arguments = PARTS.get(name, {"block": 16})
    with vidaccel.accelerate(wan, PATTERNS[name](**arguments), density=0.6, schedule=EVERYWHERE):
        expected = render(wan, steps=2)
    wan.transformer.set_attn_processor(NAMED[name](wan.transformer, density=0.6, **arguments))
    assert torch.equal(render(wan, steps=2), expected)


class ChoosingProcessor:
    """A layer's stock processor; its own SDPA is given what the plan's `select` chooses from this layer's q and k."""

    def __init__(self, stock: Any, plan: Plan) -> None:
        self.stock = stock
        self.plan = plan

    def __call__(
        self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None,
        rope: Any = None,
    ) -> Any:  # fmt: skip
        batch = hidden_states.shape[0]
        projected = WAN.project(attn, self.plan.layout, hidden_states, None, None, rope)
        mask = dense_choice(self.plan, *(x.transpose(0, 1).flatten(1, 2)[None] for x in projected))
        mask = mask.unflatten(0, (batch, -1))
        return self.stock(attn, hidden_states, encoder_hidden_states, mask, rope)


def dense_choice(plan: Plan, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(h, tokens, tokens) bool in model order: the pairs that a plan chooses, wherever it moves the tokens."""
    assert plan.select is not None
    _, slots, heads, width = key.shape
    number = torch.arange(slots, dtype=torch.float32)[:, None, None].expand(slots, heads, width)[None]
    chosen = plan.select.apply(plan.select.choose(query, key, value), key, number)
    here = number[..., 0].long()
    rows = (here if chosen.order is None else chosen.order)[0].T
    columns = chosen.v[0, ..., 0].long().T
    dense = torch.zeros(heads, slots, slots, dtype=torch.bool)
    dense[torch.arange(heads)[:, None, None], rows[:, :, None], columns[:, None]] = chosen.mask.to_slots()
    slot = plan.layout.slot_of
    return dense[:, slot][:, :, slot]


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("size", ["even", "ragged", "wide"])
@pytest.mark.parametrize("case", DYNAMIC)
def test_dynamic_equals_stock_with_dense_mask(wan: Any, render: Any, case: str, size: str, prompts: int) -> None:
    pattern, density = DYNAMIC[case]
    given = {"prompt": ["a cat", "two dogs"][:prompts], "negative_prompt": ["bad", "worse"][:prompts], "steps": 2}
    stock = render(wan, size, **given)
    with vidaccel.accelerate(wan, pattern, density=density, schedule=EVERYWHERE) as run:
        latents = render(wan, size, **given)
        plan = next(iter(run._installations[0].plans.values()))
        assert all(len(call.kernels) == 3 for call in run.trace.calls)
        assert all(delivered == plan.delivered for call in run.trace.calls for _, delivered in call.scheduled)
    assert plan.mask is None
    originals = dict(wan.transformer.attn_processors)
    wan.transformer.set_attn_processor(
        {name: ChoosingProcessor(p, plan) if ".attn1." in name else p for name, p in originals.items()}
    )
    torch.testing.assert_close(latents, render(wan, size, **given), atol=2e-5, rtol=1e-4)
    assert (latents - stock).abs().max() > 1e-3, "the mask changed nothing, so this test could not fail"


class HoldingProcessor(ChoosingProcessor):
    """Chooses at every second step; cond and uncond take turns, and each has its own mask."""

    def __init__(self, stock: Any, plan: Plan) -> None:
        super().__init__(stock, plan)
        self.calls = 0
        self.masks: dict[int, torch.Tensor] = {}

    def __call__(
        self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None,
        rope: Any = None,
    ) -> Any:  # fmt: skip
        step, branch = divmod(self.calls, 2)
        self.calls += 1
        if step % 2 == 0:
            projected = WAN.project(attn, self.plan.layout, hidden_states, None, None, rope)
            folded = (x.transpose(0, 1).flatten(1, 2)[None] for x in projected)
            self.masks[branch] = dense_choice(self.plan, *folded)[None]
        return self.stock(attn, hidden_states, encoder_hidden_states, self.masks[branch], rope)


@pytest.mark.parametrize("name", ["svg", "topk, adaptive", "light-forcing", "pyramid", "tempcache"])
def test_drift_is_told_of_every_pattern_that_chooses(wan: Any, render: Any, name: str) -> None:
    pattern, density = (DYNAMIC | MERGED)[name]
    with vidaccel.accelerate(wan, replace(pattern, reselect=2), density=density, schedule=EVERYWHERE) as run:
        render(wan, "ragged", steps=5)
    told = [float(share) for call in run.trace.calls for share in call.drift.values()]
    assert told
    assert all(0 <= share <= 1 for share in told)


@pytest.mark.parametrize("pattern", [TopK(block=16, reselect=2), Ann(bits=4, block=16, reselect=2)], ids=str)
def test_choices_serve_two_steps(wan: Any, render: Any, pattern: Any) -> None:
    fresh = replace(pattern, reselect=1)
    with vidaccel.accelerate(wan, fresh, density=0.4, schedule=EVERYWHERE):
        every_step = render(wan, "ragged")
    with vidaccel.accelerate(wan, pattern, density=0.4, schedule=EVERYWHERE) as run:
        latents = render(wan, "ragged")
        again = render(wan, "ragged")
        plan = next(iter(run._installations[0].plans.values()))
        report = run.report()
    assert torch.equal(latents, again), "a choice of the first video served the second"
    assert not torch.equal(latents, every_step)
    for call in run.trace.calls:
        assert len(call.held) == 3 * (call.step % 2)
        assert len(call.drift) == 3 * (call.step == 2)
        assert all(0 <= float(share) < 1 for share in call.drift.values())
    assert 0 < report.summary["selection_drift"] < 1
    drift = [float(share) for share in run.trace.calls[4].drift.values()]
    assert report.data["calls"][4]["drift"] == pytest.approx(sum(drift) / 3)
    assert len({tuple(call) for call in report.data["calls"]}) == 1, "calls with different columns make no table"
    originals = dict(wan.transformer.attn_processors)
    wan.transformer.set_attn_processor(
        {name: HoldingProcessor(p, plan) if ".attn1." in name else p for name, p in originals.items()}
    )
    torch.testing.assert_close(latents, render(wan, "ragged"), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("pattern", [TopK(block=16, reselect=9), FlashBlock(TopK(block=16))], ids=lambda p: p.name)
def test_choices_are_given_back_after_the_last_step(make_wan: Any, render: Any, pattern: Any) -> None:
    """Before the VAE decodes, and of both experts."""
    for pipe, kept in ((make_wan(), 6), (make_wan(experts=True), 6)):
        with vidaccel.accelerate(pipe, pattern, density=0.5, schedule=EVERYWHERE) as run:
            counts = []

            def count(pipe: Any, step: int, timestep: Any, given: Any, run: Any = run, to: Any = counts) -> Any:
                to.append(len(run._installations[0].choices._kept))
                return {}

            render(pipe, steps=4, callback_on_step_end=count)
            assert counts == [kept] * 3 + [0]
            with pytest.raises(RuntimeError):
                render(pipe, steps=4, callback_on_step_end=interrupt)
            assert run._installations[0].choices._kept
        assert not run._installations[0].choices._kept


def interrupt(*_: Any) -> Any:
    raise RuntimeError("enough")


def test_the_trace_has_the_density_that_was_kept(wan: Any, render: Any) -> None:
    with vidaccel.accelerate(wan, TopK(top_p=0.5, block=16), density=0.6, schedule=EVERYWHERE) as run:
        render(wan, "ragged", steps=2)
        report = run.report()
    call = run.trace.calls[0]
    assert all(float(call.measured[name]) < most for name, most in call.scheduled)
    assert call.densities() == [float(call.measured[name]) for name, _ in call.scheduled]
    assert report.summary["delivered_density"] < 0.5


class SpelledOutProcessor(ChoosingProcessor):
    """One softmax over what the plan's `select` gives this layer, token by token, with torch alone."""

    def __call__(
        self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None,
        rope: Any = None,
    ) -> Any:  # fmt: skip
        batch, layout = hidden_states.shape[0], self.plan.layout
        projected = WAN.project(attn, layout, hidden_states, None, None, rope)
        query, key, value = (x.transpose(0, 1).flatten(1, 2)[None] for x in projected)
        chosen = self.plan.select(query, key, value)
        block, lengths = layout.block, chosen.mask.lengths
        kept = chosen.mask.block_map().repeat_interleave(block, 1)[:, : layout.slots].repeat_interleave(block, 2) > 0
        kept &= torch.arange(kept.shape[2]) % block < lengths.repeat_interleave(block)
        logits = torch.einsum("bqhd,bkhd->bhqk", query, chosen.k) / query.shape[-1] ** 0.5 + chosen.key_bias[:, :, None]
        weights = logits.masked_fill(~kept, -torch.inf).softmax(-1)
        out = torch.einsum("bhqk,bkhd->bqhd", weights, chosen.v)[0].unflatten(1, (batch, -1)).transpose(0, 1)
        return WAN.output(attn, layout.to_model(out), hidden_states)


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("size", ["even", "ragged", "wide"])
@pytest.mark.parametrize("case", MERGED)
def test_merged_keys_spelled_out(wan: Any, render: Any, case: str, size: str, prompts: int) -> None:
    pattern, density = MERGED[case]
    given = {"prompt": ["a cat", "two dogs"][:prompts], "negative_prompt": ["bad", "worse"][:prompts], "steps": 2}
    stock = render(wan, size, **given)
    with vidaccel.accelerate(wan, pattern, density=density, schedule=EVERYWHERE) as run:
        latents = render(wan, size, **given)
        plan = next(iter(run._installations[0].plans.values()))
        assert all(len(call.kernels) == 3 for call in run.trace.calls)
    originals = dict(wan.transformer.attn_processors)
    wan.transformer.set_attn_processor(
        {name: SpelledOutProcessor(p, plan) if ".attn1." in name else p for name, p in originals.items()}
    )
    torch.testing.assert_close(latents, render(wan, size, **given), atol=2e-5, rtol=1e-4)
    assert (latents - stock).abs().max() > 1e-3, "the means changed nothing, so this test could not fail"


@pytest.mark.slow
@pytest.mark.parametrize("case", DYNAMIC | MERGED | LATE)
def test_dynamic_compiles_whole(wan: Any, render: Any, case: str) -> None:
    pattern, density = (DYNAMIC | MERGED | LATE)[case]
    schedule = Schedule(dense_steps=1, branch={"uncond": 0.6})
    with vidaccel.accelerate(wan, pattern, density=density, schedule=schedule):
        expected = render(wan, "ragged", steps=3)
    torch._dynamo.reset()
    counter = CompileCounter()
    with vidaccel.accelerate(wan, pattern, density=density, schedule=schedule) as run:
        wan.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
        torch.testing.assert_close(render(wan, "ragged", steps=3), expected, atol=1e-5, rtol=1e-4)
        compiled = counter.frame_count
        render(wan, "ragged", steps=3)
        # Dense layers, and sparse ones of two densities; where a rest is kept or used, each of both.
        assert counter.frame_count == compiled <= (5 if case in LATE else 3)
        assert all(len(call.kernels) == len(call.scheduled) for call in run.trace.calls)
    torch._dynamo.reset()


@pytest.mark.slow
def test_held_choices_compile_whole(wan: Any, render: Any) -> None:
    pattern = Ann(bits=4, block=16, reselect=2)
    with vidaccel.accelerate(wan, pattern, density=0.4, schedule=Schedule(dense_steps=1)):
        expected = render(wan, "ragged")
    torch._dynamo.reset()
    counter = CompileCounter()
    with vidaccel.accelerate(wan, pattern, density=0.4, schedule=Schedule(dense_steps=1)) as run:
        wan.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
        torch.testing.assert_close(render(wan, "ragged"), expected, atol=1e-5, rtol=1e-4)
        compiled = counter.frame_count
        render(wan, "ragged")
        assert counter.frame_count == compiled <= 3
        assert [len(call.held) for call in run.trace.calls[:8]] == [0, 0, 0, 0, 3, 3, 0, 0]
    torch._dynamo.reset()


def test_every_pattern_has_its_cases() -> None:
    sparse = set(PATTERNS) - {"dense"}
    assert {case.split(",")[0] for case in CASES | DYNAMIC | MERGED | LATE} == sparse == set(NAMED)


def test_a_pattern_that_keeps_everything_says_so(wan: Any, render: Any) -> None:
    pattern = FreeSwim(block=16)
    with vidaccel.accelerate(wan, pattern), pytest.warns(UserWarning, match="keeps every pair at this size"):
        render(wan)


NEEDY = ["ann", "flashblock", "light-forcing", "neighborhood", "pyramid", "sliding-window", "svg", "tempcache", "topk"]


@pytest.mark.parametrize("name", NEEDY)
def test_who_needs_a_density_says_so_before_anything_runs(wan: Any, name: str) -> None:
    stock = dict(wan.transformer.attn_processors)
    named = {cls.pattern_type.name: cls for cls in processors.NamedAttnProcessor.__subclasses__()}[name]
    for ask in (
        lambda: vidaccel.accelerate(wan, name),
        lambda: vidaccel.attn_processors(wan.transformer, name),
        lambda: named(wan.transformer),
        lambda: named(grid=(3, 4, 4)),
        lambda: vidaccel.accelerate(wan, PerLayer({0: Radial(), 1: {"name": name}})),
        lambda: vidaccel.accelerate(wan, name, schedule=Schedule(branch={"uncond": 0.3})),
    ):
        with pytest.raises(PatternError, match="no density of its own"):
            ask()
    assert wan.transformer.attn_processors == stock
    vidaccel.accelerate(wan, name, schedule=Schedule(branch={"cond": 0.5, "uncond": 0.3})).remove()
    vidaccel.accelerate(wan, name, density=0.4).remove()


def test_a_density_beside_what_decides_it_is_refused_before_anything_runs(wan: Any) -> None:
    for pattern in (Radial(decay=0.2), Neighborhood((3, 3, 3)), FreeSwim(native=(4, 4)), Union((Radial(decay=0.2),))):
        with pytest.raises(PatternError, match="were both given"):
            vidaccel.attn_processors(wan.transformer, pattern, density=0.4)
    with pytest.raises(PatternError, match=r"one in 5, take 0\.200 already"):
        vidaccel.accelerate(wan, FlashBlock(), density=0.1)
    with pytest.raises(PatternError, match="'ranked' has no density of its own"):
        vidaccel.accelerate(wan, Radial(rule="ranked"))


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: NAMED["radial"](grid=(7, 8, 8), density=0.4, schedule=Schedule(dense_steps=1)), "schedule="),
        (lambda: NAMED["topk"](grid=(7, 8, 8), density=0.4, reselect=2), "reselect="),
        (
            lambda: NAMED["union"](parts=({"name": "topk", "reselect": (0, 2)},), grid=(7, 8, 8), density=0.4),
            "reselect=",
        ),
        (lambda: NAMED["flashblock"](grid=(7, 8, 8), density=0.4), "flashblock"),
        (lambda: NAMED["per-layer"](layers={0: "topk"}, grid=(7, 8, 8), density=0.4), "a pattern for each layer"),
        (lambda: NAMED["radial"](grid=(7, 8, 8), density=0.4, num_inference_steps=4), "num_inference_steps="),
    ],
)
def test_a_fixed_grid_refuses_what_differs_between_layers_and_steps(make: Any, what: str) -> None:
    with pytest.raises(InstallError, match=rf"was given grid= and {what}, but.*name the transformer, or use vidaccel"):
        make()


HEADS = {
    "fixed": PerHead((Radial(block=16), SlidingWindow(block=16)), (0, 1, 1)),
    "choosing": PerHead((TopK(block=16),), (0,)),
    "windows": SlidingWindow(heads=((1, 1, 1),) * 4, block=16),
    "per layer": PerLayer({0: Radial(block=16), 1: PerHead((TopK(block=16), Radial(block=16)), (0, 1, 0))}),
}


@pytest.mark.parametrize("name", HEADS)
def test_another_number_of_heads_is_refused(wan: Any, name: str) -> None:
    density = None if name == "windows" else 0.4
    with pytest.raises(PatternError, match=r"with [134] heads, but the model has 2; name as many"):
        vidaccel.accelerate(wan, HEADS[name], density=density)
    if name != "per layer":
        named = NAMED[HEADS[name].name](grid=(7, 8, 8), density=density, **vars_of(HEADS[name]))
        attn = wan.transformer.blocks[0].attn1
        with pytest.raises(PatternError, match="but the model has 2"):
            named(attn, torch.randn(1, 448, 64))


def vars_of(pattern: Any) -> dict[str, Any]:
    return {each.name: getattr(pattern, each.name) for each in fields(pattern)}


def test_layers_that_the_model_does_not_have_are_refused(wan: Any) -> None:
    with pytest.raises(PatternError, match=r"from layers \[0, 2, 3\] on.*has 3 layers, 0 to 2; leave out 3"):
        vidaccel.accelerate(wan, PerLayer({0: "radial", 2: "topk", 3: "radial"}), density=0.4)


def test_plans_in_use_are_not_made_again(make_wan: Any, render: Any, monkeypatch: Any) -> None:
    """However many layers, branches and resolutions there are; those that are not in use go."""
    monkeypatch.setattr(install, "_MOST_PLANS", 5)
    wan, made = make_wan(layers=4), []
    plan = SlidingWindow.plan
    monkeypatch.setattr(SlidingWindow, "plan", lambda *given: (made.append(given), plan(*given))[1])
    pattern = PerLayer({0: SlidingWindow(block=16)})
    schedule = Schedule(branch={"uncond": 0.3}, even_if_slower=True)
    with vidaccel.accelerate(wan, pattern, density=0.5, schedule=schedule) as run:
        plans = run._installations[0].plans
        render(wan, "even")
        assert len(made) == len(plans) == 8
        render(wan, "ragged")
        assert len(made) == 16
        assert {str(each.layout.grid) for each in plans.values()} == {"7x7x9"}
        render(wan, "ragged")
        assert len(made) == 16


SIZES = {
    "wan": (30, 52), "hunyuan": (45, 80), "hunyuan15": (30, 53), "cogvideox": (30, 45), "mochi": (30, 53),
    "ltx": (16, 22), "skyreels": (34, 60),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_freeswim_knows_the_size_of_a_family(name: str) -> None:
    transformer = getattr(tiny_pipelines, name)().transformer
    height, width = SIZES[name]
    family = family_of(transformer)
    grid = VideoGrid(2, 2 * height, 2 * width)
    layout = family.layout(Call(grid, 0, torch.zeros(1), None, torch.device("cpu")), 128)
    plan = FreeSwim(logit_scale=2.0).plan(layout, None, family.sites(transformer)[0])
    assert plan.rule == f"window 2x{height // 2 * 2 + 1}x{width // 2 * 2 + 1}"
    assert plan.scale == pytest.approx((math.log(2 * height * width) / math.log(height * width)) ** 0.5)


def test_freeswim_tells_checkpoints_of_a_family_apart() -> None:
    for name, config, size in (
        ("CogVideoX", {"patch_size_t": 2}, (48, 85)),
        ("HunyuanVideo15", {"target_size": 960}, (45, 80)),
        ("Wan", {"out_channels": 48}, (22, 40)),
    ):
        assert family_named(f"{name}Transformer3DModel").native(config) == size


def test_a_trace_keeps_the_latest_calls(wan: Any, render: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(trace, "MOST_CALLS", 10)
    with vidaccel.accelerate(wan, "radial", density=0.4) as run:
        render(wan)
        assert not any("are recorded" in note for note in run.trace.notes)
        render(wan)
        assert [(call.trajectory or 0, call.step) for call in run.trace.calls] == [
            (0, step) for step in (3, 3, 0, 0, 1, 1, 2, 2, 3, 3)
        ]
        assert any(
            "only the last 10 calls of the transformer are recorded" in note for note in run.report().data["notes"]
        )


def test_parameters_that_do_not_fit_the_video(wan: Any, render: Any) -> None:
    pattern = Neighborhood((9, 3, 3), block=16)
    with (
        vidaccel.accelerate(wan, pattern),
        pytest.raises(PatternError, match="window 9 along time was asked for, but a 7x8x8 grid has room for 7"),
    ):
        render(wan)


def sample(name: str) -> Any:
    """A module of samples/patterns, loaded as a user's file."""
    path = Path(__file__).parents[2] / "samples" / "patterns" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gates(tmp_path: Path, query: torch.Tensor) -> str:
    """A file with the weights of a selector for three layers of heads of 32."""
    file = tmp_path / "gates.safetensors"
    save_file({"query": query, "key": torch.eye(32).expand(3, 32, 32).contiguous()}, file)
    return str(file)


@pytest.mark.parametrize("own", ["loudest", "clusters", "clusters for two steps", "learned"])
def test_a_users_own_pattern_that_chooses(wan: Any, render: Any, tmp_path: Path, own: str) -> None:
    """By rule, by clusters, or by weights of its own: on stock SDPA with the pairs that it chooses."""
    if own == "loudest":
        pattern = sample("loudest").Loudest(block=16)
    elif own == "learned":
        weights = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(1))
        pattern = sample("learned").Learned(gates(tmp_path, weights), block=16)
    else:
        pattern = sample("clusters").Clusters(clusters=8, block=16, reselect=2 if "two" in own else 1)
    stock = render(wan, "ragged", steps=2)
    with vidaccel.accelerate(wan, pattern, density=0.4, schedule=EVERYWHERE) as run:
        latents = render(wan, "ragged", steps=2)
        installation = run._installations[0]
        plans = {site.name: plan for site in installation.sites for key, plan in installation.plans.items()
                 if not pattern.per_site or site in key}  # fmt: skip
    assert all(len(call.kernels) == 3 for call in run.trace.calls)
    assert [len(call.held) for call in run.trace.calls] == [0, 0, *([3, 3] if "two" in own else [0, 0])]
    originals = dict(wan.transformer.attn_processors)
    kind = HoldingProcessor if "two" in own else ChoosingProcessor
    wan.transformer.set_attn_processor(
        {name: kind(p, plans[name]) if ".attn1." in name else p for name, p in originals.items()}
    )
    torch.testing.assert_close(latents, render(wan, "ragged", steps=2), atol=2e-5, rtol=1e-4)
    assert (latents - stock).abs().max() > 1e-3


def test_lists_of_a_users_own_pattern_are_looked_at(wan: Any, render: Any) -> None:
    """A block that does not exist would be somebody else's memory."""
    board = sample("checkerboard").Checkerboard(block=16)
    made = type(board).plan

    def beyond(self: Any, *given: Any) -> Any:
        plan = made(self, *given)
        return replace(plan, mask=replace(plan.mask, idx=plan.mask.idx + 1))

    type(board).plan = beyond
    with (
        vidaccel.accelerate(wan, board, schedule=EVERYWHERE),
        pytest.raises(MaskError, match="a block that does not exist"),
    ):
        render(wan)


def test_a_selector_that_projects_nothing_is_top_k(wan: Any, render: Any, tmp_path: Path) -> None:
    learned = sample("learned").Learned(gates(tmp_path, torch.eye(32).expand(3, 32, 32).contiguous()), block=16)
    videos = []
    for pattern in (learned, TopK(block=16, sink_frames=0)):
        with vidaccel.accelerate(wan, pattern, density=0.4, schedule=EVERYWHERE):
            videos.append(render(wan, "ragged", steps=2))
    torch.testing.assert_close(*videos)


def test_clusters_stand_together() -> None:
    """Tokens of four kinds, strewn over the video: sorted, hardly a block holds two, and blocks keep their own kind."""
    random = torch.Generator().manual_seed(0)
    kinds = torch.randperm(256, generator=random) % 4
    x = torch.eye(4)[kinds][None, :, None] * 5 + 0.1 * torch.randn(1, 256, 2, 4, generator=random)
    pattern, layout = sample("clusters").Clusters(clusters=8, block=16), TokenLayout.of((4, 8, 8), block=16)
    choice = pattern.plan(layout, 0.25, Site("", 0, "self", "wan")).select.choose(x, x, x)
    assert torch.nn.functional.one_hot(kinds.view(16, 16)).sum(1).amax(1).sum() < 0.6 * 256
    for head in range(2):
        there = torch.nn.functional.one_hot(kinds[choice.k_order[0, :, head]].view(16, 16)).sum(1)
        assert there.amax(1).sum() >= 0.8 * 256
        same = there.argmax(1)
        kept = choice.mask.video_map()[head] > 0
        assert (same[:, None] == same)[kept].float().mean() > 0.8


def test_a_users_own_pattern(wan: Any, assert_equals_masked_stock: Any) -> None:
    run = vidaccel.accelerate(wan, sample("checkerboard").Checkerboard(block=16), schedule=EVERYWHERE)
    assert_equals_masked_stock(wan, run, "ragged", steps=2)
    even, odd = (density for _, density in run.trace.calls[0].scheduled[:2])
    assert even == pytest.approx(0.5, abs=0.06)
    assert even != odd


def test_a_pattern_that_cannot_help_gives_way_to_dense_attention(wan: Any, render: Any) -> None:
    """Said before the run, with what would do better; who insists has the pattern."""
    pattern, said = Neighborhood(block=64), r"neighborhood cannot help on a 7x8x8 grid .* stride=\(.*\) visits 0"
    stock = render(wan)
    ran = []
    for schedule in (Schedule(), EVERYWHERE):
        with (
            vidaccel.accelerate(wan, pattern, density=0.4, schedule=schedule) as run,
            pytest.warns(VidaccelWarning, match=said) as told,
        ):
            ran.append(render(wan))
        instead = [each for each in told if "Dense attention runs instead" in str(each.message)]
        assert len(instead) == (not schedule.even_if_slower)
        call = run.trace.calls[0]
        assert bool(call.dense) == (not schedule.even_if_slower) == (not call.scheduled)
        assert run.report().data["summary"]["effective_density"] == pytest.approx(
            1 if instead else call.scheduled[0][1], abs=1e-6
        )
    torch.testing.assert_close(ran[0], stock, atol=0, rtol=0)
    assert not torch.equal(ran[1], stock)


@pytest.mark.parametrize("case", [*CASES, *DYNAMIC, *MERGED, *LATE])
def test_every_pattern_beside_a_cache(wan: Any, render: Any, case: str) -> None:
    """The layers of skipped steps are neither sparse nor dense, and a second video is the first one again."""
    pattern, density = (CASES | DYNAMIC | MERGED | LATE)[case]
    cache = CGTaylor(threshold=0.05, warmup=2)
    with vidaccel.accelerate(wan, pattern, density=density, schedule=EVERYWHERE, cache=cache) as run:
        first = render(wan, steps=6)
        assert torch.equal(render(wan, steps=6), first)
    computed = [call for call in run.trace.calls if not call.forecast]
    assert 0 < len(computed) < len(run.trace.calls)
    assert all(call.kernels for call in computed)
    assert not any(call.kernels for call in run.trace.calls if call.forecast and call.branch == "uncond")
