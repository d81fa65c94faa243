"""Wan through the stock diffusers classes: what is sparse, when, and that nothing else changes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import vidaccel
from vidaccel.errors import InstallError, PatternError, RecipeError
from vidaccel.patterns import Radial
from vidaccel.processors import RadialAttnProcessor
from vidaccel.schedule import Schedule

RADIAL = Radial(block=16)
# Small grids, on which some patterns touch nearly every block.
EVERYWHERE = Schedule(even_if_slower=True)


def accelerate(pipe: Any, density: float = 0.4, schedule: Schedule = EVERYWHERE, **kwargs: Any) -> Any:
    return vidaccel.accelerate(pipe, RADIAL, density=density, schedule=schedule, **kwargs)


@pytest.mark.parametrize("size", ["even", "ragged", "wide"])
def test_equals_stock_with_dense_mask(wan: Any, assert_equals_masked_stock: Any, render: Any, size: str) -> None:
    stock = render(wan, size)
    latents = assert_equals_masked_stock(wan, accelerate(wan), size)
    assert (latents - stock).abs().max() > 1e-3, "the mask changed nothing, so this test could not fail"
    torch.testing.assert_close(render(wan, size), stock, atol=0, rtol=0)


def test_released_rule_and_several_prompts(wan: Any, assert_equals_masked_stock: Any) -> None:
    run = vidaccel.accelerate(wan, Radial(rule="released", decay=0.3, block=16), schedule=EVERYWHERE)
    assert_equals_masked_stock(wan, run, prompt=["a cat", "two dogs"], negative_prompt=["bad", "worse"])


@pytest.mark.parametrize(
    ("schedule", "sparse"),
    [
        (Schedule(dense_steps=1), lambda step, layer, branch: step >= 1),
        (Schedule(dense_steps=0.5), lambda step, layer, branch: step >= 2),
        (Schedule(dense_last_steps=1), lambda step, layer, branch: step < 3),
        (Schedule(dense_layers=1), lambda step, layer, branch: layer >= 1),
        (Schedule(dense_layers=(1, -1)), lambda step, layer, branch: layer == 0),
        (Schedule(branch={"cond": 1}), lambda step, layer, branch: branch == "uncond"),
    ],
)
def test_schedules(wan: Any, assert_equals_masked_stock: Any, schedule: Schedule, sparse: Any) -> None:
    run = accelerate(wan, schedule=schedule)
    assert_equals_masked_stock(wan, run)
    assert [(c.step, c.branch) for c in run.trace.calls] == [(s, b) for s in range(4) for b in ("cond", "uncond")]
    for call in run.trace.calls:
        names = {name for name, _ in call.scheduled}
        assert names == {f"blocks.{n}.attn1.processor" for n in range(3) if sparse(call.step, n, call.branch)}


def test_kernels_are_tuned_once_before_the_first_step(wan: Any, render: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("vidaccel.install.prepare", lambda *given: asked.append((given, len(run.trace.calls))))
    with accelerate(wan, schedule=Schedule(dense_steps=1)) as run:
        render(wan)
    d = wan.transformer.config.attention_head_dim
    assert asked == [((d, RADIAL.block, torch.float32, torch.device("cpu")), 0)]


def test_densities_of_branches_differ(wan: Any, assert_equals_masked_stock: Any) -> None:
    run = accelerate(wan, 0.6, Schedule(branch={"uncond": 0.3}))
    assert_equals_masked_stock(wan, run)
    found = {call.branch: call.scheduled[0][1] for call in run.trace.calls}
    assert found["cond"] == pytest.approx(0.6, abs=0.04)
    assert found["uncond"] == pytest.approx(0.3, abs=0.04)


def test_two_experts_share_one_clock(make_wan: Any, assert_equals_masked_stock: Any) -> None:
    pipe = make_wan(experts=True)
    run = accelerate(pipe, 0.6, Schedule(expert={"high": 1.0, "low": 0.3}))
    assert_equals_masked_stock(pipe, run, steps=6)
    experts = [(call.step, call.expert) for call in run.trace.calls[::2]]
    assert [step for step, _ in experts] == list(range(6))
    assert {expert for _, expert in experts} == {"high", "low"}
    assert all(bool(call.scheduled) == (call.expert == "low") for call in run.trace.calls)


def test_ti2v_timesteps_per_token(make_wan: Any, assert_equals_masked_stock: Any) -> None:
    pipe = make_wan(ti2v=True)
    assert_equals_masked_stock(pipe, accelerate(pipe, schedule=Schedule(dense_steps=1)))


def test_image_to_video(make_wan: Any, assert_equals_masked_stock: Any) -> None:
    from PIL import Image

    pipe = make_wan("WanImageToVideoPipeline", in_channels=36)
    run = accelerate(pipe, schedule=Schedule(dense_steps=1))
    assert_equals_masked_stock(pipe, run, image=Image.new("RGB", (128, 128), (200, 30, 30)))


def test_vace_has_sparse_control_blocks_too(make_wan: Any, assert_equals_masked_stock: Any) -> None:
    pipe = make_wan("WanVACEPipeline", vace_layers=[0, 2], vace_in_channels=96)
    run = accelerate(pipe)
    assert_equals_masked_stock(pipe, run)
    assert [name for name, _ in run.trace.calls[0].scheduled][:2] == [
        "vace_blocks.0.attn1.processor",
        "vace_blocks.1.attn1.processor",
    ]


def test_video_to_video_tells_branches_by_embeddings(make_wan: Any, assert_equals_masked_stock: Any) -> None:
    from PIL import Image

    pipe = make_wan("WanVideoToVideoPipeline")
    video = [Image.new("RGB", (128, 128), (8 * n, 90, 30)) for n in range(25)]
    run = accelerate(pipe, schedule=Schedule(branch={"cond": 1}))
    assert_equals_masked_stock(pipe, run, video=video, strength=0.8, num_frames=None)
    assert {call.branch for call in run.trace.calls} == {"cond", "uncond"}
    assert any("text embeddings" in note for note in run.trace.notes)


def test_guidance_off_and_resolution_change(wan: Any, render: Any) -> None:
    expected = [render(wan, "even"), render(wan, "ragged", guidance_scale=1.0)]
    with accelerate(wan, 0.4) as run:
        first = render(wan, "even")
        second = render(wan, "ragged", guidance_scale=1.0)
        again = render(wan, "even")
    assert torch.equal(first, again)
    assert second.shape == expected[1].shape
    grids = [str(call.grid) for call in run.trace.calls]
    assert grids == ["7x8x8"] * 8 + ["7x7x9"] * 4 + ["7x8x8"] * 8
    assert [call.step for call in run.trace.calls[8:12]] == [0, 1, 2, 3]
    assert {call.branch for call in run.trace.calls[8:12]} == {"cond"}


def test_removal_restores_the_very_objects(wan: Any, render: Any) -> None:
    transformer = wan.transformer
    stock = render(wan)
    before, state = dict(transformer.attn_processors), dict(vars(transformer))
    run = accelerate(wan)
    render(wan)
    assert transformer.attn_processors["blocks.0.attn2.processor"] is before["blocks.0.attn2.processor"]
    run.remove()
    run.remove()
    after = transformer.attn_processors
    assert all(after[name] is before[name] for name in before)
    assert vars(transformer).keys() == state.keys()
    assert not transformer._forward_hooks
    assert not transformer._forward_pre_hooks
    assert torch.equal(render(wan), stock)


def test_dict_of_processors_and_named_processor_agree(wan: Any, render: Any) -> None:
    with accelerate(wan):
        expected = render(wan)
    transformer = wan.transformer
    before = dict(transformer.attn_processors)
    transformer.set_attn_processor(vidaccel.attn_processors(transformer, RADIAL, density=0.4))
    assert torch.equal(render(wan), expected)
    vidaccel.remove(transformer)

    transformer.set_attn_processor(RadialAttnProcessor(transformer, density=0.4, block=16))
    assert torch.equal(render(wan), expected)
    vidaccel.remove(transformer)
    assert all(transformer.attn_processors[name] is before[name] for name in before)

    transformer.set_attn_processor(RadialAttnProcessor(grid=(7, 8, 8), density=0.4, block=16))
    assert torch.equal(render(wan), expected)


def test_named_processor_without_a_transformer_says_what_to_do(wan: Any, render: Any) -> None:
    wan.transformer.set_attn_processor(RadialAttnProcessor(density=0.4))
    with pytest.raises(InstallError, match=r"pipe\.transformer.*grid=\(t, y, x\)"):
        render(wan)


def test_named_processor_is_removed_before_its_first_call(wan: Any) -> None:
    before = dict(wan.transformer.attn_processors)
    wan.transformer.set_attn_processor(RadialAttnProcessor(wan.transformer, density=0.4))
    vidaccel.remove(wan.transformer)
    assert all(wan.transformer.attn_processors[name] is before[name] for name in before)


def test_fractions_by_hand_need_the_number_of_steps(wan: Any, render: Any) -> None:
    schedule = Schedule(dense_last_steps=1)
    wan.transformer.set_attn_processor(
        vidaccel.attn_processors(wan.transformer, RADIAL, density=0.4, schedule=schedule)
    )
    render(wan)  # WanPipeline names its steps itself, so this works without being told
    vidaccel.remove(wan.transformer)
    processors = vidaccel.attn_processors(wan.transformer, RADIAL, density=0.4, schedule=schedule)
    wan.transformer.set_attn_processor(processors)
    with pytest.raises(RecipeError, match="num_inference_steps="), torch.no_grad():
        wan.transformer(torch.randn(1, 16, 3, 8, 8), torch.tensor([900.0]), torch.randn(1, 4, 32))


def test_an_exception_in_a_callback_leaves_no_trace(wan: Any, render: Any) -> None:
    with accelerate(wan, schedule=Schedule(dense_steps=1)) as run:
        expected = render(wan)

        def fail(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            if step == 1:
                raise KeyError("the user's own")
            return kwargs

        with pytest.raises(KeyError):
            render(wan, callback_on_step_end=fail)
        start = len(run.trace.calls)
        assert torch.equal(render(wan), expected)
        assert [call.step for call in run.trace.calls[start::2]] == [0, 1, 2, 3]


def test_an_exception_inside_the_transformer_leaves_no_plan(wan: Any, render: Any) -> None:
    with accelerate(wan) as run:
        expected = render(wan)
        hook = wan.transformer.blocks[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("boom")))
        with pytest.raises(KeyError):
            render(wan)
        hook.remove()
        assert run.trace.calls[-1].failed
        assert all(getattr(p, "plan", None) is None for p in wan.transformer.attn_processors.values())
        assert torch.equal(render(wan), expected)


def test_twice_is_refused(wan: Any) -> None:
    with accelerate(wan):
        with pytest.raises(InstallError, match="accelerated already"):
            accelerate(wan)
        with pytest.raises(InstallError, match="accelerated already"):
            vidaccel.attn_processors(wan.transformer, "radial")
    with pytest.raises(InstallError, match="not accelerated"):
        vidaccel.remove(wan.transformer)


def test_a_refused_second_expert_leaves_the_first_clean(make_wan: Any) -> None:
    pipe = make_wan(experts=True)
    before = dict(pipe.transformer.attn_processors)
    vidaccel.attn_processors(pipe.transformer_2, "radial")
    with pytest.raises(InstallError, match="accelerated already"):
        accelerate(pipe)
    assert all(pipe.transformer.attn_processors[name] is before[name] for name in before)


def test_two_pipelines_of_a_class(make_wan: Any, render: Any) -> None:
    one, two = make_wan(seed=0), make_wan(seed=7)
    expected = []
    for pipe, density in ((one, 0.3), (two, 0.6)):
        with accelerate(pipe, density):
            expected.append(render(pipe))
    with accelerate(one, 0.3), accelerate(two, 0.6):
        assert torch.equal(render(one), expected[0])
        assert torch.equal(render(two), expected[1])


def test_displaced_processors_are_noticed(wan: Any, render: Any) -> None:
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    stock = render(wan)
    run = accelerate(wan)
    wan.transformer.set_attn_processor(WanAttnProcessor())
    with pytest.warns(UserWarning, match="3 of 3 attention layers do not hold"):
        displaced = render(wan)
    assert torch.equal(displaced, stock)
    with pytest.warns(UserWarning, match="left as they are"):
        run.remove()


def test_density_one_runs_dense_and_says_so(wan: Any, render: Any) -> None:
    stock = render(wan)
    with pytest.warns(UserWarning, match="density 1"), accelerate(wan, 1.0) as run:
        assert torch.equal(render(wan), stock)
    assert not any(call.kernels for call in run.trace.calls)


@pytest.mark.parametrize("make", [vidaccel.accelerate, vidaccel.attn_processors, RadialAttnProcessor])
def test_warnings_of_a_call_name_its_line(wan: Any, make: Any) -> None:
    on = wan if make is vidaccel.accelerate else wan.transformer
    given = () if make is RadialAttnProcessor else (RADIAL,)
    with pytest.warns(UserWarning, match="density 1") as told:
        make(on, *given, density=1.0)
    assert [each.filename for each in told] == [__file__]


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (Schedule(dense_layers=99), "dense_layers=99 is all of the 3 layers"),
        (Schedule(dense_steps=50), "dense_steps=50 and dense_last_steps=0 are all 2 steps"),
        (Schedule(dense_last_steps=1.0), "are all 2 steps"),
    ],
)
def test_an_all_dense_schedule_is_told_once(wan: Any, render: Any, schedule: Schedule, words: str) -> None:
    with accelerate(wan, 0.4, schedule) as run:
        with pytest.warns(UserWarning, match=words) as told:
            render(wan, steps=2)
        assert len(told) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            render(wan, steps=2)
    assert any(words in note for note in run.trace.notes)


def test_an_expert_that_is_none_is_told(wan: Any, make_wan: Any) -> None:
    with pytest.warns(UserWarning, match="expert low a density, which has no effect") as told:
        accelerate(wan, 0.4, Schedule(expert={"low": 0.3})).remove()
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerate(make_wan(experts=True), 0.4, Schedule(expert={"low": 0.3})).remove()


def test_arguments_of_another_kind_are_named(wan: Any) -> None:
    with pytest.raises(RecipeError, match=r"takes a vidaccel.Schedule"):
        accelerate(wan, schedule={"dense_steps": 1})
    with pytest.raises(RecipeError, match=r"takes a vidaccel.Schedule"):
        vidaccel.attn_processors(wan.transformer, RADIAL, density=0.4, schedule={"dense_steps": 1})
    with pytest.raises(PatternError, match="density 'a' was asked for"):
        accelerate(wan, "a")
    with pytest.raises(PatternError, match="density 'a' was asked for"):
        vidaccel.attn_processors(wan.transformer, RADIAL, density="a")


def test_the_users_backend_reaches_dense_layers(wan: Any) -> None:
    with accelerate(wan):
        wan.transformer.set_attention_backend("_native_math")
        processor = wan.transformer.attn_processors["blocks.0.attn1.processor"]
        assert processor.wrapped._attention_backend == "_native_math"
    assert wan.transformer.attn_processors["blocks.0.attn1.processor"]._attention_backend == "_native_math"
    wan.transformer.set_attention_backend("native")


def test_save_pretrained_while_accelerated(wan: Any, render: Any, tmp_path: Path) -> None:
    from diffusers import WanPipeline

    stock, keys = render(wan), set(wan.transformer.state_dict())
    with accelerate(wan):
        render(wan)
        assert set(wan.transformer.state_dict()) == keys
        wan.save_pretrained(tmp_path)
    loaded = WanPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(render(loaded), stock)


def test_lora_loaded_and_unloaded(wan: Any, render: Any, tmp_path: Path) -> None:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(3)
    # Alpha equal to the rank: a file without metadata is loaded that way.
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    wan.transformer.add_adapter(config)
    with accelerate(wan):
        expected = render(wan)
    wan.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(wan.transformer))
    wan.transformer.delete_adapters("default")
    with accelerate(wan) as run:
        plain = render(wan)
        wan.load_lora_weights(tmp_path)
        assert (render(wan) - plain).abs().max() > 1e-3
        torch.testing.assert_close(render(wan), expected)
        wan.unload_lora_weights()
        assert torch.equal(render(wan), plain)
        assert all(len(call.kernels) == 3 for call in run.trace.calls)


def test_model_offload_hooks_before_and_after(wan: Any, render: Any) -> None:
    from accelerate.hooks import CpuOffload, add_hook_to_module, remove_hook_from_module

    with accelerate(wan):
        expected = render(wan)
        # What enable_model_cpu_offload does to a transformer, with the CPU in the place of a GPU.
        add_hook_to_module(wan.transformer, CpuOffload(execution_device="cpu"), append=True)
        assert torch.equal(render(wan), expected)
        remove_hook_from_module(wan.transformer, recurse=True)
        assert torch.equal(render(wan), expected)
    add_hook_to_module(wan.transformer, CpuOffload(execution_device="cpu"), append=True)
    with accelerate(wan) as run:
        assert torch.equal(render(wan), expected)
        remove_hook_from_module(wan.transformer, recurse=True)
        assert torch.equal(render(wan), expected)
        assert all(len(call.kernels) == 3 for call in run.trace.calls)


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offload(wan: Any, render: Any, level: str) -> None:
    with accelerate(wan):
        expected = render(wan)
    device = torch.device("cpu")
    arguments = {"num_blocks_per_group": 1} if level == "block_level" else {}
    wan.transformer.enable_group_offload(device, offload_device=device, offload_type=level, **arguments)
    with accelerate(wan) as run:
        assert torch.equal(render(wan), expected)
        assert all(len(call.kernels) == 3 for call in run.trace.calls)


def test_fused_projections(wan: Any, render: Any) -> None:
    with accelerate(wan):
        expected = render(wan)
        wan.transformer.fuse_qkv_projections()
        torch.testing.assert_close(render(wan), expected, atol=1e-5, rtol=1e-4)


def test_autocast(wan: Any, render: Any) -> None:
    with accelerate(wan):
        exact = render(wan)
        with torch.autocast("cpu", torch.bfloat16):
            low = render(wan)
    assert 0 < (low - exact).norm() < 0.1 * exact.norm()


def test_gradients_are_refused(wan: Any) -> None:
    latents = torch.randn(1, 16, 7, 16, 16, requires_grad=True)
    with accelerate(wan), pytest.raises(vidaccel.VidaccelError, match="only infer"):
        wan.transformer(latents, torch.tensor([900.0]), torch.randn(1, 4, 32))


def test_unknown_transformers_are_refused() -> None:
    class Pipe:
        transformer = torch.nn.Linear(2, 2)

    with pytest.raises(
        InstallError, match=r"Linear is not a transformer that vidaccel knows; it knows CogVideoX.*, Wan"
    ):
        vidaccel.accelerate(Pipe(), "radial")
    with pytest.raises(InstallError, match="has no transformer"):
        vidaccel.accelerate(object(), "radial")


def test_same_seed_same_video_and_global_generator_untouched(wan: Any, render: Any) -> None:
    with accelerate(wan):
        torch.manual_seed(5)
        first = render(wan)
        drawn = torch.rand(1)
        torch.manual_seed(5)
        assert torch.equal(render(wan), first)
        assert torch.equal(torch.rand(1), drawn)


def test_no_warning_in_an_ordinary_run(wan: Any, render: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with accelerate(wan):
            render(wan)
