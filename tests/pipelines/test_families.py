"""Every pattern on every family: it equals the stock pipeline, whose own SDPA is given the same pairs.

The tests here make the support matrix of `pipelines/README.md`: those with a pattern are its cells, those with a family
alone are rows named by their docstrings, those with a variant are rows of the pipelines.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounter

import vidaccel
from vidaccel import processors
from vidaccel.errors import InstallError
from vidaccel.family import attn_processors_of, family_of
from vidaccel.patterns import PATTERNS, FlashBlock, LightForcing, Neighborhood, Pattern, Pyramid, Radial, TopK
from vidaccel.processors import RadialAttnProcessor, TopKAttnProcessor
from vidaccel.recipe import Recipe
from vidaccel.render import RenderJob, find, open_pipeline
from vidaccel.render import render as render_job
from vidaccel.schedule import Schedule

# One example of each pattern: its parameters, and the density that it is asked for.
EXAMPLES: dict[str, tuple[dict[str, Any], float | None]] = {
    "ann": ({"bits": 4}, 0.4),
    # Every head's error is above 0, so that the rest is computed anew at every step.
    "flashblock": ({"part": {"name": "topk", "block": 16}, "threshold": 0}, 0.5),
    "freeswim": ({"native": (4, 4), "sink_frames": 1}, None),
    "light-forcing": ({"keep_frames": 5}, 0.4),
    "neighborhood": ({}, 0.4),
    "per-layer": ({"layers": {0: {"name": "radial", "block": 16}, 1: {"name": "sliding-window", "block": 16}}}, 0.4),
    "per-head": ({"parts": ({"name": "radial", "block": 16}, {"name": "topk", "block": 16}), "heads": (0, 1)}, 0.4),
    "pyramid": ({}, 0.4),
    "radial": ({}, 0.4),
    "sliding-window": ({}, 0.4),
    "svg": ({}, 0.4),
    "tempcache": ({}, 0.4),
    "topk": ({}, 0.4),
    "union": (
        {"parts": ({"name": "radial", "block": 16}, {"name": "neighborhood", "window": [1, 3, 3], "block": 16})},
        0.5,
    ),
}
FAMILIES = ("wan", "hunyuan", "hunyuan15", "cogvideox")
# Small grids, on which some patterns touch nearly every block.
EVERYWHERE, LATER = Schedule(even_if_slower=True), Schedule(dense_steps=1, even_if_slower=True)
RADIAL, TOPK = Radial(block=16), TopK(block=16)
# Fixed; chosen from q and k; keys merged, with a bias; windows.
KINDS = (RADIAL, TOPK, Pyramid(block=16), Neighborhood(block=16))
PROMPTS = {"prompt": ["a cat", "two dogs that run"], "negative_prompt": ["bad", "worse"]}

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot help")
each_family = pytest.mark.parametrize("family", FAMILIES)
each_kind = pytest.mark.parametrize("how", KINDS, ids=lambda how: how.name)
# Two kinds a family, all of them in all.
COMPILED = [(family, how) for n, family in enumerate(FAMILIES) for how in (RADIAL, KINDS[n % 3 + 1])]


def build(family: str) -> Any:
    """A pipeline of two layers."""
    return tiny_pipelines.wan(layers=2) if family == "wan" else getattr(tiny_pipelines, family)()


def example(name: str) -> tuple[Pattern, float | None]:
    arguments, density = EXAMPLES[name]
    own = {} if {"part", "parts", "layers"} & set(arguments) else {"block": 16}
    return PATTERNS[name](**arguments, **own), density


def accelerate(pipe: Any, pattern: Pattern = RADIAL, schedule: Schedule = EVERYWHERE, **kwargs: Any) -> Any:
    return vidaccel.accelerate(pipe, pattern, **{"density": 0.4, "schedule": schedule, **kwargs})


@pytest.fixture(scope="module")
def pipeline() -> Callable[[str], Any]:
    """One pipeline a family; acceleration leaves no trace, so tests share them."""
    built: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in built:
            built[family] = build(family)
        return built[family]

    return get


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """A model on disk, a small job without a recipe, and the pipeline that `vidaccel render` opens."""
    opened: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in opened:
            folder = tmp_path_factory.mktemp(family)
            build(family).save_pretrained(folder)
            (folder / "defaults.json").write_text(json.dumps({"max_sequence_length": 16}))
            size = {"height": 64, "width": 96, "num_inference_steps": 1}
            model, job = find(str(folder)), RenderJob(prompt="a cat", model=str(folder), seed=1, **size)
            pipe = open_pipeline(job.complete(model), model)
            for setting in ("tokenizer_max_length", "tokenizer_2_max_length", "vision_num_semantic_tokens"):
                if hasattr(pipe, setting):  # HunyuanVideo-1.5 has 1985 text slots otherwise
                    setattr(pipe, setting, 16)
            opened[family] = model, job, pipe
        return opened[family]

    return get


@pytest.fixture
def render(render: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Two steps."""

    def run(pipe: Any, size: str = "even", **kwargs: Any) -> torch.Tensor:
        return render(pipe, size, **{"steps": 2, **kwargs})

    return run


@pytest.mark.parametrize("pattern", sorted(set(PATTERNS) - {"dense"}))
@each_family
def test_equals_stock(pipeline: Any, assert_equals_masked_stock: Any, render: Any, family: str, pattern: str) -> None:
    """At 28 tiles of 16 tokens, and at two sizes that no tile divides."""
    pipe, (how, density) = pipeline(family), example(pattern)
    for size in ("even", "ragged", "wide"):
        run = accelerate(pipe, how, density=density)
        latents = assert_equals_masked_stock(pipe, run, size)
        sites = {site.name for site in run._installations[0].sites}
        assert [call.step for call in run.trace.calls] in ([0, 1], [0, 0, 1, 1])
        assert all({name for name, _ in call.scheduled} == sites for call in run.trace.calls)
        if size == "even" and pattern != "flashblock":
            assert (latents - render(pipe)).abs().max() > 1e-3, "nothing changed, so this test could not fail"


@pytest.mark.parametrize("pattern", sorted(set(PATTERNS) - {"dense"}))
@each_family
def test_processors_of_every_pattern(pipeline: Any, render: Any, family: str, pattern: str) -> None:
    """The same video by `attn_processors` and by the named processor."""
    pipe, (how, density) = pipeline(family), example(pattern)
    with accelerate(pipe, how, density=density):
        expected = render(pipe, steps=1)
    given = {"density": density, "schedule": EVERYWHERE, "num_inference_steps": 1}
    transformer, named = pipe.transformer, getattr(processors, f"{type(how).__name__}AttnProcessor")
    for by_hand in (vidaccel.attn_processors(transformer, how, **given), None):
        settings = {field.name: getattr(how, field.name) for field in fields(how)}
        transformer.set_attn_processor(by_hand or named(transformer, **given, **settings))
        assert torch.equal(render(pipe, steps=1), expected)
        vidaccel.remove(transformer)


RENDERED = [(family, pattern) for family in FAMILIES for pattern in sorted(EXAMPLES)]


@pytest.mark.parametrize(("family", "pattern"), RENDERED)
def test_a_recipe_renders(saved: Any, family: str, pattern: str) -> None:
    """By `vidaccel render`, all layers sparse in every call."""
    how, density = example(pattern)
    model, job, pipe = saved(family)
    recipe = Recipe(attention=how, density=density and 0.8, schedule=EVERYWHERE)
    frames = 17 if pattern in ("light-forcing", "union") else 9  # what they keep needs 5 latent frames
    made = render_job(pipe, replace(job, recipe=recipe, num_frames=frames).complete(model))
    sites = len(list(family_of(pipe.transformer).sites(pipe.transformer)))
    assert made.report.summary["sparse_layer_calls"] == sites * len(made.report.data["calls"]) > 0


@each_family
def test_what_is_left_out_is_late_not_lost(pipeline: Any, render: Any, family: str) -> None:
    """flashblock: the rest of a pattern from an earlier step, measured against dropping it"""
    pipe, part = pipeline(family), {"name": "light-forcing", "keep_frames": 4, "block": 16}
    stock = render(pipe, steps=3)
    errors, spent = {}, {}
    for threshold in (0, 0.05, 1e9):
        with accelerate(pipe, FlashBlock(part, every=3, threshold=threshold), density=0.55) as run:
            errors[threshold] = float((render(pipe, steps=3) - stock).norm())
        spent[threshold] = [sum(call.densities()) / len(call.scheduled) for call in run.trace.calls]
        assert all(len(call.kernels) == len(call.scheduled) for call in run.trace.calls)
    with accelerate(pipe, LightForcing(keep_frames=4, block=16), density=0.325):
        dropped = float((render(pipe, steps=3) - stock).norm())
    assert errors[0] < 1e-3 < errors[1e9] < dropped
    assert errors[0] <= errors[0.05] <= errors[1e9]
    # The first of three calls is dense, the others have what is left of the budget.
    branches = len(spent[0]) // 3
    assert spent[0] == [1.0] * 3 * branches
    assert spent[1e9] == pytest.approx([1.0] * branches + [0.325] * 2 * branches, abs=0.02)


@each_kind
@each_family
def test_prompts_of_different_lengths(pipeline: Any, assert_equals_masked_stock: Any, family: str, how: Any) -> None:
    """several prompts in a batch, of different lengths"""
    run = accelerate(pipeline(family), how, LATER)
    assert_equals_masked_stock(pipeline(family), run, **PROMPTS)


@each_family
def test_dense_steps_and_layers(pipeline: Any, assert_equals_masked_stock: Any, family: str) -> None:
    """dense steps, dense layers"""
    run = accelerate(pipeline(family), schedule=Schedule(dense_steps=1, dense_layers=1))
    assert_equals_masked_stock(pipeline(family), run, steps=3)
    assert [bool(call.scheduled) for call in run.trace.calls if call.branch != "uncond"] == [False, True, True]
    assert all(len(call.dense) == 1 for call in run.trace.calls if call.scheduled)


@each_family
def test_all_dense_is_stock(pipeline: Any, render: Any, family: str) -> None:
    """dense layers, on the user's own backend"""
    stock, prompts = render(pipeline(family)), render(pipeline(family), **PROMPTS)
    with vidaccel.accelerate(pipeline(family), "dense"):
        dense, several = render(pipeline(family)), render(pipeline(family), **PROMPTS)
    # HunyuanVideo-1.5 leaves out what its own processor would mask.
    exact = {"atol": 0.0, "rtol": 0.0} if family != "hunyuan15" else {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(dense, stock, **exact)
    torch.testing.assert_close(several, prompts, **exact)


@each_kind
@each_family
def test_resolutions_come_and_go(pipeline: Any, render: Any, family: str, how: Any) -> None:
    """another resolution in the next call"""
    with accelerate(pipeline(family), how) as run:
        first = render(pipeline(family), "even")
        render(pipeline(family), "ragged")
        assert torch.equal(render(pipeline(family), "even"), first)
    calls = len(run.trace.calls) // 3
    assert [str(call.grid) for call in run.trace.calls] == ["7x8x8"] * calls + ["7x7x9"] * calls + ["7x8x8"] * calls


@each_kind
@each_family
def test_removal_restores(pipeline: Any, render: Any, family: str, how: Any) -> None:
    """removal gives back the very objects and the very video"""
    transformer = pipeline(family).transformer
    stock, before, state = render(pipeline(family)), attn_processors_of(transformer), set(vars(transformer))
    with accelerate(pipeline(family), how) as run:
        assert not torch.equal(render(pipeline(family)), stock)
        during = attn_processors_of(transformer)
        sites = {site.name for site in run._installations[0].sites}
        assert {name for name in before if during[name] is not before[name]} == sites
    assert all(attn_processors_of(transformer)[name] is processor for name, processor in before.items())
    assert set(vars(transformer)) == state
    assert not transformer._forward_hooks
    assert not transformer._forward_pre_hooks
    assert torch.equal(render(pipeline(family)), stock)


@each_family
def test_processors_by_hand(pipeline: Any, render: Any, family: str) -> None:
    """`attn_processors`, and named processors for all layers"""
    pipe, transformer = pipeline(family), pipeline(family).transformer
    for pattern, named in ((RADIAL, RadialAttnProcessor), (TOPK, TopKAttnProcessor)):
        with accelerate(pipe, pattern):
            expected = render(pipe)
        transformer.set_attn_processor(vidaccel.attn_processors(transformer, pattern, density=0.4))
        assert torch.equal(render(pipe), expected)
        vidaccel.remove(transformer)
        before = attn_processors_of(transformer)
        transformer.set_attn_processor(named(transformer, density=0.4, block=16))
        assert torch.equal(render(pipe), expected)
        vidaccel.remove(transformer)
        assert all(attn_processors_of(transformer)[name] is processor for name, processor in before.items())


def model_offload(transformer: Any) -> None:
    """What enable_model_cpu_offload does to a transformer, with the CPU in the place of a GPU."""
    from accelerate.hooks import CpuOffload, add_hook_to_module

    add_hook_to_module(transformer, CpuOffload(execution_device="cpu"), append=True)


def sequential_offload(transformer: Any) -> None:
    """What enable_sequential_cpu_offload does."""
    from accelerate import cpu_offload

    cpu_offload(transformer, torch.device("cpu"), offload_buffers=False)


def group_offload(transformer: Any) -> None:
    cpu = torch.device("cpu")
    transformer.enable_group_offload(cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1)


@each_kind
@each_family
def test_offload(render: Any, family: str, how: Any) -> None:
    """model, sequential and group offload, before or after (hooks tried on a CPU)"""
    for offload in (model_offload, sequential_offload, group_offload):
        pipe = build(family)
        with accelerate(pipe, how):
            expected = render(pipe)
            offload(pipe.transformer)
            assert torch.equal(render(pipe), expected)
        with accelerate(pipe, how) as run:
            assert torch.equal(render(pipe), expected)
        assert all(len(call.kernels) == 2 for call in run.trace.calls)


@each_kind
@each_family
def test_lora(assert_equals_masked_stock: Any, render: Any, family: str, how: Any) -> None:
    """LoRA, loaded before or after"""
    from peft import LoraConfig

    pipe = build(family)
    torch.manual_seed(3)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "add_v_proj"], init_lora_weights=False)
    with accelerate(pipe, how):
        plain = render(pipe)
        pipe.transformer.add_adapter(config)
        adapted = render(pipe)
    assert (adapted - plain).abs().max() > 1e-3
    assert torch.equal(assert_equals_masked_stock(pipe, accelerate(pipe, how)), adapted)


@each_kind
@each_family
def test_layerwise_casting(assert_equals_masked_stock: Any, render: Any, family: str, how: Any) -> None:
    """weights stored in fp8 (`enable_layerwise_casting`)"""
    pipe = build(family)
    full = render(pipe)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert pipe.transformer.get_submodule(first_attention(pipe.transformer)).to_q.weight.dtype == torch.float8_e4m3fn
    stored = assert_equals_masked_stock(pipe, accelerate(pipe, how))
    assert (stored - full).abs().max() > 1e-3


def first_attention(transformer: Any) -> str:
    return next(iter(family_of(transformer).sites(transformer))).name.removesuffix(".processor")


def gguf_linears(transformer: Any) -> None:
    """What loading a GGUF file makes of the blocks, by diffusers' own quantiser."""
    from diffusers import GGUFQuantizationConfig
    from diffusers.quantizers.gguf import GGUFQuantizer
    from diffusers.quantizers.gguf.utils import GGUFParameter
    from gguf import GGMLQuantizationType, quantize

    kind, weights = GGMLQuantizationType.Q8_0, dict(transformer.state_dict())
    for name, module in transformer.named_modules():
        if type(module) is torch.nn.Linear and "blocks." in name and module.in_features % 32 == 0:
            packed = quantize(weights[f"{name}.weight"].numpy(), kind)
            weights[f"{name}.weight"] = GGUFParameter(torch.from_numpy(packed), quant_type=kind)
    quantizer = GGUFQuantizer(GGUFQuantizationConfig(compute_dtype=torch.float32), pre_quantized=True)
    quantizer.preprocess_model(transformer, device_map=None, state_dict=weights)
    for name, weight in weights.items():
        quantizer.create_quantized_param(transformer, weight, name, torch.device("cpu"))


def torchao_linears(transformer: Any) -> None:
    """torchao lies where the Makefile puts it, or where a user has it."""
    sys.path.append(f"{sys.prefix}/apart")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(transformer, Int8WeightOnlyConfig())


@each_kind
@each_family
def test_quantised_linears(assert_equals_masked_stock: Any, family: str, how: Any) -> None:
    """linears with weights of another kind (GGUF, torchao): only called, never looked into"""
    for quantised, kind in ((gguf_linears, "GGUFParameter"), (torchao_linears, "Int8Tensor")):
        pipe = build(family)
        quantised(pipe.transformer)
        layer = pipe.transformer.get_submodule(first_attention(pipe.transformer))
        assert type(layer.to_q.weight).__name__ == type(layer.to_out[0].weight).__name__ == kind
        assert_equals_masked_stock(pipe, accelerate(pipe, how))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "how"), COMPILED, ids=lambda value: getattr(value, "name", value))
def test_compiled_blocks(render: Any, family: str, how: Any) -> None:
    """blocks compiled with `fullgraph=True`"""
    torch._dynamo.reset()
    pipe, counter = build(family), CompileCounter()
    with accelerate(pipe, how, LATER):
        expected = render(pipe, "ragged")
    if getattr(pipe.transformer, "_repeated_blocks", None):
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    else:  # CogVideoX names none
        for block in pipe.transformer.transformer_blocks:
            block.compile(fullgraph=True, backend=counter)
    with accelerate(pipe, how, LATER) as run:
        torch.testing.assert_close(render(pipe, "ragged"), expected, atol=1e-5, rtol=1e-4)
        compiled = counter.frame_count
        render(pipe, "ragged", prompt="two dogs that run")
        assert counter.frame_count == compiled > 0, "a prompt of another length compiled again"
        assert all(len(call.kernels) == len(call.scheduled) == 2 * (call.step > 0) for call in run.trace.calls)
    torch._dynamo.reset()


IMAGE = {"image": Image.new("RGB", (128, 128), (200, 30, 30))}
# What HunyuanVideo's image-to-video pipeline makes of a prompt and an image, by a vision model.
EMBEDS = {
    "prompt": None, "negative_prompt": None, "max_sequence_length": None,
    "prompt_embeds": torch.randn(1, 24, 16, generator=torch.Generator().manual_seed(2)),
    "pooled_prompt_embeds": torch.ones(1, 8), "prompt_attention_mask": (torch.arange(24) < 15)[None].long(),
}  # fmt: skip
VARIANTS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "HunyuanVideoImageToVideoPipeline, latents": (lambda: tiny_pipelines.hunyuan("latent_concat"), IMAGE | EMBEDS),
    "HunyuanVideoImageToVideoPipeline, tokens": (lambda: tiny_pipelines.hunyuan("token_replace"), IMAGE | EMBEDS),
    "HunyuanVideoPipeline with true guidance": (tiny_pipelines.hunyuan, {"true_cfg_scale": 3.0}),
    "CogVideoXPipeline, 2b": (lambda: tiny_pipelines.cogvideox("2b"), {}),
    "CogVideoXPipeline, 1.5": (lambda: tiny_pipelines.cogvideox("1.5"), {"num_frames": 49}),
    "CogVideoXImageToVideoPipeline, 5b": (lambda: tiny_pipelines.cogvideox(image=True), IMAGE),
    "CogVideoXImageToVideoPipeline, 1.5": (
        lambda: tiny_pipelines.cogvideox("1.5", image=True),
        IMAGE | {"num_frames": 49},
    ),
    "SkyReelsV2Pipeline": (tiny_pipelines.skyreels, {}),
    "SkyReelsV2DiffusionForcingPipeline": (lambda: tiny_pipelines.skyreels(forcing=True), {}),
    "LTXPipeline": (tiny_pipelines.ltx, {}),
    "MochiPipeline": (tiny_pipelines.mochi, {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_pipelines(assert_equals_masked_stock: Any, render: Any, variant: str) -> None:
    """Radial and top-k attention, after a dense step."""
    make, arguments = VARIANTS[variant]
    pipe = make()
    stock = render(pipe, "ragged", **arguments)
    for pattern in (RADIAL, TOPK):
        run = accelerate(pipe, pattern, Schedule(dense_steps=1))
        latents = assert_equals_masked_stock(pipe, run, "ragged", **arguments)
        assert (latents - stock).abs().max() > 1e-4
        assert {call.step for call in run.trace.calls} == {0, 1}
        assert {str(call.grid) for call in run.trace.calls} == {"7x7x9"}
    assert torch.equal(render(pipe, "ragged", **arguments), stock)


def test_frames_that_lag_behind(render: Any) -> None:
    """SkyReels-V2 with `ar_step`: the last frames wait for many steps, each of which counts."""
    pipe = tiny_pipelines.skyreels(forcing=True)
    with accelerate(pipe, TOPK, Schedule(dense_last_steps=2)) as run:
        render(pipe, ar_step=1, num_inference_steps=4)
    calls = [call for call in run.trace.calls if call.branch == "cond"]
    assert [call.step for call in calls] == list(range(calls[0].total))
    assert [bool(call.scheduled) for call in calls] == [True] * (calls[0].total - 2) + [False] * 2
    with accelerate(pipe, TOPK), pytest.raises(InstallError, match="use causal_block_size=1, which goes with any ar"):
        render(pipe, ar_step=1, causal_block_size=7)


@pytest.mark.parametrize("ar_step", [0, 1])
def test_each_stretch_of_a_long_video_begins_anew(render: Any, ar_step: int) -> None:
    """SkyReels-V2 with `overlap_history`: known frames, with next to no noise, do not hide that new ones begin."""
    pipe = tiny_pipelines.skyreels(forcing=True)
    long = {"frames": 33, "base_num_frames": 17, "overlap_history": 5, "addnoise_condition": 20}
    with accelerate(pipe, TOPK, Schedule(dense_steps=1)) as run:
        render(pipe, num_inference_steps=4, ar_step=ar_step, **long)
    calls = [call for call in run.trace.calls if call.branch == "cond"]
    stretches = [n for n, call in enumerate(calls) if call.step == 0]
    assert len(stretches) == 3
    assert stretches[1] == calls[0].total
    assert [n for n, call in enumerate(calls) if not call.scheduled] == stretches


def test_image_to_video_without_contexts_is_one_branch(render: Any) -> None:
    """HunyuanVideo's pipeline names no guidance branch; embeddings tell them apart, once a second one is seen."""
    pipe = tiny_pipelines.hunyuan("token_replace")
    with accelerate(pipe) as run:
        render(pipe, **IMAGE, **EMBEDS)
        assert [call.branch for call in run.trace.calls] == ["cond", "cond"]
        negative = {f"negative_{name}": EMBEDS[name] for name in EMBEDS if "embeds" in name or "mask" in name}
        negative["negative_prompt_embeds"] = EMBEDS["prompt_embeds"] * 0.5
        render(pipe, **IMAGE, **EMBEDS, **negative, true_cfg_scale=3.0)
        assert [call.branch for call in run.trace.calls[2:]] == ["cond", "uncond"] * 2


def test_densities_of_branches_that_come_as_one_batch(pipeline: Any, render: Any) -> None:
    schedule = Schedule(branch={"uncond": 0.9})
    with (
        vidaccel.accelerate(pipeline("cogvideox"), Radial(block=16), density=0.4, schedule=schedule),
        pytest.warns(UserWarning, match="branch uncond a density, which has no effect: .* one batch"),
    ):
        render(pipeline("cogvideox"))


def test_masks_that_are_not_built_are_counted(pipeline: Any, render: Any) -> None:
    with vidaccel.accelerate(pipeline("hunyuan15"), "dense") as run:
        render(pipeline("hunyuan15"))
    note = next(note for note in run.trace.notes if "padded text is cut off" in note)
    assert "124 text slots" in note
    assert f"{(7 * 8 * 8 + 124) ** 2 / 2**30:.3g} GiB, twice, in each of 2 layers" in note


def test_somebody_elses_processor_runs_dense_layers(render: Any) -> None:
    """HunyuanVideo-1.5's own dense path stands in for diffusers' processor alone."""
    from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0

    class Louder(HunyuanVideo15AttnProcessor2_0):  # type: ignore[misc]
        def __call__(
            self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None,
            image_rotary_emb: Any = None,
        ) -> Any:  # fmt: skip
            inputs = hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            video, text = super().__call__(attn, *inputs)
            return 2 * video, text

    pipe = tiny_pipelines.hunyuan15()
    for n in range(2):
        pipe.transformer.transformer_blocks[n].attn.set_processor(Louder())
    stock = render(pipe)
    with vidaccel.accelerate(pipe, "dense"):
        assert torch.equal(render(pipe), stock)


def test_a_grid_without_a_transformer_needs_layers_that_tell_their_model(render: Any) -> None:
    pipe = tiny_pipelines.hunyuan()
    before = attn_processors_of(pipe.transformer)
    pipe.transformer.set_attn_processor(RadialAttnProcessor(grid=(7, 8, 8), density=0.4, block=16))
    with pytest.raises(
        InstallError, match=r"Attention is not an attention layer that tells its model.*pipe\.transformer"
    ):
        render(pipe)
    pipe.transformer.set_attn_processor(before)


def test_conditions_beside_the_video_are_refused(pipeline: Any) -> None:
    transformer = tiny_pipelines.ltx().transformer
    vidaccel.attn_processors(transformer, RADIAL, density=0.4)
    latents, text = torch.randn(1, 70, 8), torch.randn(1, 4, 32)
    with pytest.raises(InstallError, match="do not say where each token stands"):
        transformer(latents, text, torch.tensor([900]), torch.ones(1, 4), num_frames=1, height=8, width=8)


def test_no_warning_in_an_ordinary_run(pipeline: Any, render: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for family in FAMILIES:
            with accelerate(pipeline(family)):
                render(pipeline(family))


def test_the_support_matrix_is_current(request: pytest.FixtureRequest, outcomes: dict[str, bool]) -> None:
    """Stands last. With `--write-matrix`, the matrix is written instead of compared."""
    items = [item for item in request.session.items if item.path == request.path]
    whole = {item.originalname for item in items} >= {name for name in globals() if name.startswith("test_")}
    if not whole:
        pytest.skip("only a part of this file was selected")
    page = Path(__file__).parents[2] / "pipelines" / "README.md"
    text = page.read_text(encoding="utf-8")
    head, _, rest = text.partition("<!-- matrix -->\n")
    _, end, tail = rest.partition("<!-- end of matrix -->\n")
    current = f"{head}<!-- matrix -->\n{matrix(items, outcomes)}{end}{tail}"
    if request.config.getoption("--write-matrix"):
        page.write_text(current, encoding="utf-8")
    assert page.read_text(encoding="utf-8") == current, "pipelines/README.md is stale: run with --write-matrix"


def matrix(items: list[Any], outcomes: dict[str, bool]) -> str:
    """Three tables: patterns, what they go together with, other pipelines. A cell is yes where its test has passed."""

    def cell(item: Any) -> str:
        return "yes" if outcomes.get(item.nodeid) else "no"

    def both(row: dict[str, str], family: str, now: str) -> None:
        row[family] = "yes" if {row.get(family, "yes"), now} == {"yes"} else "no"

    patterns: dict[str, dict[str, str]] = {}
    together: dict[str, dict[str, str]] = {}
    variants: dict[str, dict[str, str]] = {}
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        if "pattern" in given:
            both(patterns.setdefault(f"`{given['pattern']}`", {}), given["family"], cell(item))
        elif "family" in given:
            both(together.setdefault(item.function.__doc__, {}), given["family"], cell(item))
        elif "variant" in given:
            variants.setdefault(given["variant"], {})["radial, top-k"] = cell(item)
    tables = [
        table("pattern", FAMILIES, dict(sorted(patterns.items()))),
        table("together with", FAMILIES, together),
        table("other pipelines", ("radial, top-k",), variants),
    ]
    return "\n".join(tables)


def table(title: str, columns: tuple[str, ...], rows: dict[str, dict[str, str]]) -> str:
    lines = [(title, *columns), ("---",) * (1 + len(columns))]
    lines += [(name, *(row.get(column, "") for column in columns)) for name, row in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
