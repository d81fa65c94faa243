"""`CausalWanPipeline` as a user meets it: whole videos, streams, prompts that change, interruptions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.callbacks import PipelineCallback
from PIL import Image

from vidaccel.errors import StreamError, UsageError
from vidaccel.kernels.attention import attention
from vidaccel.pipelines.causal_calibration import calibrated
from vidaccel.pipelines.causal_wan import CausalWanPipeline
from vidaccel.pipelines.streaming_vae import StreamingDecoder, channels_last, encode, to_vae
from vidaccel.reuse import (
    AnnCross,
    CausalAnn,
    CausalLightForcing,
    FlashBlock,
    HybridMemory,
    TempCache,
    cross,
    memory,
    parts,
)
from vidaccel.streaming import Rollout

ROLLOUT = Rollout(chunk=2, window=6, sink=2, steps=(1000, 500))


@pytest.fixture
def pipe(make_wan: Callable[..., Any]) -> CausalWanPipeline:
    parts = make_wan(layers=2).components
    found = CausalWanPipeline(
        **{name: parts[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")},
        rollout=ROLLOUT,
    )
    found.set_progress_bar_config(disable=True)
    return found


EMBEDS = torch.ones(3, 8, 32)
GIVEN: dict[str, Any] = {"prompt": None, "prompt_embeds": EMBEDS}


def settings(**changes: Any) -> dict[str, Any]:
    """A tiny clip of 7 latent frames."""
    common = {"prompt": "a cat", "height": 32, "width": 48, "num_frames": 25, "max_sequence_length": 8}
    given = common | {"generator": torch.Generator().manual_seed(3), "output_type": "latent"} | changes
    return {name: value for name, value in given.items() if value is not None}


def latents(pipe: CausalWanPipeline, **changes: Any) -> torch.Tensor:
    found: torch.Tensor = pipe(**settings(**changes)).frames
    return found


def test_a_video_of_every_kind_of_output(pipe: CausalWanPipeline) -> None:
    expected = latents(pipe)
    assert expected.shape == (1, 16, 7, 4, 6)
    assert torch.equal(latents(pipe), expected), "the same seed made another video"
    pixels = pipe(**settings(num_frames=9, output_type="np")).frames
    assert pixels.shape == (1, 9, 32, 48, 3)
    as_torch = pipe(**settings(num_frames=9, output_type="pt"), return_dict=False)[0]
    assert as_torch.shape == (1, 9, 3, 32, 48)
    np.testing.assert_array_equal(as_torch.permute(0, 1, 3, 4, 2).numpy(), pixels)
    pictures = pipe(**settings(num_frames=9, output_type="pil")).frames
    assert len(pictures[0]) == 9
    assert pictures[0][0].size == (48, 32)


def test_the_stream_is_the_video_chunk_by_chunk(pipe: CausalWanPipeline) -> None:
    whole = pipe(**settings(output_type="np")).frames
    chunks = list(pipe.stream(**settings(output_type="np")))
    np.testing.assert_array_equal(np.concatenate([chunk.frames for chunk in chunks], 1), whole)
    assert [chunk.start for chunk in chunks] == [0, 2, 4, 6]
    assert [chunk.frames.shape[1] for chunk in chunks] == [5, 8, 8, 4]
    assert [chunk.history for chunk in chunks] == [0, 2, 4, 5]
    assert len({chunk.cache_bytes for chunk in chunks}) == 1


def test_an_endless_stream_goes_on_at_constant_memory(pipe: CausalWanPipeline) -> None:
    stream = pipe.stream(**settings(num_frames=None))
    taken = [next(stream) for _ in range(12)]
    assert stream.position == 24
    assert {chunk.history for chunk in taken[2:]} == {4}
    assert len({chunk.cache_bytes for chunk in taken}) == 1
    assert all(chunk.latents.isfinite().all() for chunk in taken)


@pytest.mark.parametrize("patch", [None, 2])
def test_streamed_decoding_has_no_seams(patch: int | None) -> None:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    more: dict[str, Any] = {} if patch is None else {"patch_size": 2, "in_channels": 12, "out_channels": 12}
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        is_residual=patch is not None, **more,
    ).eval()  # fmt: skip
    z = torch.randn(2, 16, 6, 3, 4)
    with torch.no_grad():
        whole = vae.decode(to_vae(z, vae)).sample
        stream = StreamingDecoder(vae)
        parts = [stream(part) for part in z.split([1, 2, 3], 2)]
        moment = stream.snapshot()
        again = stream(z[:, :, :2])
        stream.restore(moment)
        assert torch.equal(stream(z[:, :, :2]), again)
    assert [part.shape[2] for part in parts] == [1, 8, 12]
    assert torch.equal(torch.cat(parts, 2), whole)


def test_a_vae_that_waits_in_host_memory_is_fetched_for_the_beginning() -> None:
    """`meta` stands for a GPU: what is elsewhere does not mix with it."""
    from accelerate import cpu_offload_with_hook
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    cpu_offload_with_hook(vae, "meta")
    assert encode(vae, torch.zeros(1, 3, 1, 32, 48)).device.type == "meta"


def test_a_vae_whose_weights_come_one_by_one_makes_the_same(pipe: CausalWanPipeline) -> None:
    from accelerate import cpu_offload

    how = settings(num_frames=9, image=Image.new("RGB", (48, 32), "red"), output_type="pt")
    expected = pipe(**how).frames
    cpu_offload(pipe.vae, execution_device=torch.device("cpu"))
    assert pipe.vae.device.type == "meta"
    assert torch.equal(pipe(**how | {"generator": torch.Generator().manual_seed(3)}).frames, expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_decoder_laid_out_for_gpus_or_compiled_makes_the_same(device: str) -> None:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1).eval()
    parts = torch.randn(1, 16, 5, 4, 6).split([2, 2, 1], 2)

    def decoded() -> torch.Tensor:
        stream = StreamingDecoder(vae)
        return torch.cat([stream(part.to(vae.device)) for part in parts], 2).cpu()

    # cuDNN rounds fp32 to TF32 unless told otherwise.
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        plain = decoded()
        vae.to(device)
        channels_last(vae.decoder)
        weight = vae.decoder.conv_in.weight
        assert weight.is_contiguous(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(decoded(), plain, atol=1e-4, rtol=0)
        vae.decoder.compile(dynamic=False, backend="eager")
        torch.testing.assert_close(decoded(), plain, atol=1e-4, rtol=0)


def test_nothing_is_lost_where_decoding_or_rewriting_is_interrupted(pipe: CausalWanPipeline) -> None:
    expected = [chunk.start for chunk in pipe.stream(**settings())]
    stream = pipe.stream(**settings(output_type="pt"))
    made = [next(stream)]
    decode, write = stream._postprocess, stream._write

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    stream._postprocess = interrupted
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    stream._postprocess = decode
    moment = stream.snapshot()
    made.append(next(stream))
    stream.restore(moment)
    assert torch.equal(next(stream).frames, made[1].frames), "a chunk that was not decoded yet is in no snapshot"
    stream._write = interrupted  # type: ignore[method-assign]
    position = stream.position
    with pytest.raises(KeyboardInterrupt):
        stream.switch_prompt("a dog")
    stream._write = write  # type: ignore[method-assign]
    made += list(stream)
    assert position == made[1].start + made[1].latents.shape[2]
    assert [chunk.start for chunk in made] == expected
    assert [chunk.number for chunk in made] == list(range(len(expected)))


def test_an_interruption_ends_its_own_stream_alone(pipe: CausalWanPipeline) -> None:
    def stop(pipe: Any, step: int, timestep: float, given: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step > 0
        return given

    other = pipe.stream(**settings())
    assert not list(pipe.stream(**settings(callback_on_step_end=stop)))
    assert len(list(other)) == len(list(pipe.stream(**settings())))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_inference_steps": 0}, "one step or more"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "there are latents, prompt_embeds"),
        ({"latents": torch.zeros(1, 16, 1, 4, 6)}, "this video takes"),
        ({"latents": torch.zeros(1, 16, 4, 6)}, "this video takes"),
        ({"output_type": "npy"}, "there are np, pt, pil, latent"),
        ({"video": []}, "without frames"),
        ({"video": np.zeros((29, 32, 48, 3))}, "a video of 29 frames was given, longer than"),
        ({"video": torch.zeros(2, 5, 3, 32, 48), "prompt": ["a"] * 3}, "2 videos were given for a batch of 3"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    pipe: CausalWanPipeline, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        pipe.stream(**settings(**given))


def test_a_video_without_an_end_is_a_stream(pipe: CausalWanPipeline) -> None:
    with pytest.raises(UsageError, match="iterate over `stream`"):
        pipe(**settings() | {"num_frames": None})
    stream = pipe.stream(**settings())
    with pytest.raises(UsageError, match="3 prompts were given for a stream of 1"):
        stream.switch_prompt(["a", "b", "c"])


def test_noise_that_ends_before_the_stream_is_said(pipe: CausalWanPipeline) -> None:
    stream = pipe.stream(**settings(num_frames=None, latents=torch.zeros(1, 16, 3, 4, 6)))
    next(stream)
    with pytest.raises(StreamError, match="noise of 3 frames was given, and the next chunk ends with frame 4"):
        next(stream)


def test_a_finished_chunk_is_written_as_clean_as_its_rollout_says(pipe: CausalWanPipeline) -> None:
    """The keys that stay are those of the finished latents at the timestep of context noise, in each branch."""
    pipe.register_to_config(rollout=(ROLLOUT.to_dict() | {"context_noise": 100.0}))
    stream = pipe.stream(**settings(guidance_scale=3.0))
    chunk = next(stream)
    kept = {branch: cache.layers[1].keys[:, :2].clone() for branch, cache in stream.model.caches.items()}
    for timestep in (100.0, 0.0):
        fresh = pipe.stream(**settings(guidance_scale=3.0)).model
        fresh.begin(2)
        for branch, text in stream._guidance.embeds.items():
            with torch.no_grad():
                fresh.flow(chunk.latents, torch.tensor([timestep]), text, branch, writes=True)
            same = torch.equal(fresh.caches[branch].layers[1].keys[:, :2], kept[branch])
            assert same == (timestep == 100.0)


def test_a_budget_is_that_of_the_video_that_is_made(pipe: CausalWanPipeline) -> None:
    light = CausalLightForcing(block=16)
    for num_frames, frames in ((25, 7), (None, light.frames)):
        stream = pipe.stream(**settings() | {"num_frames": num_frames}, methods=[light], density=0.5)
        assert stream.model.methods.select == replace(light, density=0.5, frames=frames)


def test_guidance_has_two_caches_and_none_changes_nothing(pipe: CausalWanPipeline) -> None:
    plain = latents(pipe)
    guided = pipe.stream(**settings(guidance_scale=4.0, negative_prompt="a dog"))
    assert set(guided.model.caches) == {"cond", "uncond"}
    found = torch.cat([chunk.latents for chunk in guided], 2)
    assert (found - plain).abs().max() > 1e-3
    same = latents(pipe, guidance_scale=4.0, negative_prompt="a cat")
    torch.testing.assert_close(same, plain, atol=1e-4, rtol=0)
    # One that is given serves the whole batch.
    _, none = pipe.encode_prompt("a cat", "", max_sequence_length=8)
    few = {"num_frames": 5, "guidance_scale": 4.0, "prompt": ["a cat"] * 2}
    noise = torch.randn(2, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    each = [latents(pipe, latents=noise, negative_prompt_embeds=x, **few) for x in (none, none.expand(2, -1, -1))]
    assert torch.equal(*each)


def test_many_steps_follow_the_scheduler_in_every_chunk(pipe: CausalWanPipeline) -> None:
    """One chunk without history is what the stock pipeline makes of the same noise."""
    from diffusers import WanPipeline

    noise = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    found = latents(pipe, num_frames=5, num_inference_steps=4, guidance_scale=3.0, latents=noise)
    stock = WanPipeline(**dict(pipe.components.items()), transformer_2=None)
    stock.set_progress_bar_config(disable=True)
    name = "flow_shift" if "flow_shift" in pipe.scheduler.config else "shift"
    assert pipe.scheduler.config[name] != ROLLOUT.shift
    stock.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **{name: ROLLOUT.shift})
    expected = stock(**settings(num_frames=5, num_inference_steps=4, guidance_scale=3.0, latents=noise)).frames
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    long = latents(pipe, num_inference_steps=3)
    assert long.shape[2] == 7
    assert long.isfinite().all()


def test_a_batch_is_its_samples(pipe: CausalWanPipeline) -> None:
    noise = torch.randn(2, 16, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    one_step = {"num_frames": 13, "num_inference_steps": 2}
    both = latents(pipe, prompt=["a cat", "a dog"], latents=noise, **one_step)
    for number, prompt in enumerate(("a cat", "a dog")):
        alone = latents(pipe, prompt=prompt, latents=noise[number, None], **one_step)
        torch.testing.assert_close(both[number, None], alone, atol=1e-4, rtol=1e-4)


def test_an_image_or_a_video_comes_first(pipe: CausalWanPipeline) -> None:
    frames = pipe(**settings(output_type="pil", num_frames=9)).frames[0]
    pixels = pipe.video_processor.preprocess_video(frames, height=32, width=48)
    with torch.no_grad():
        first, known = encode(pipe.vae, pixels[:, :, :1]), encode(pipe.vae, pixels)
    chunks = list(pipe.stream(**settings(image=frames[0], num_frames=13)))
    assert [chunk.latents.shape[2] for chunk in chunks] == [1, 2, 1]
    torch.testing.assert_close(chunks[0].latents, first, atol=1e-5, rtol=0)
    chunks = list(pipe.stream(**settings(video=frames, num_frames=25)))
    assert [chunk.start for chunk in chunks] == [0, 2, 3, 5]
    assert pipe.stream(**settings(video=frames, num_frames=25)).chunks == len(chunks)
    torch.testing.assert_close(torch.cat([chunk.latents for chunk in chunks[:2]], 2), known, atol=1e-5, rtol=0)
    other = list(pipe.stream(**settings(video=frames[::-1], num_frames=25)))
    assert (other[-1].latents - chunks[-1].latents).abs().max() > 1e-3, "the beginning has no influence on the end"


def test_a_new_prompt_with_recache_is_a_fresh_run_on_the_same_frames(pipe: CausalWanPipeline) -> None:
    pipe.register_to_config(rollout=Rollout(chunk=2, window=6, steps=(1000, 500)).to_dict())
    noise = torch.randn(1, 16, 8, 4, 6, generator=torch.Generator().manual_seed(0))
    stream = pipe.stream(**settings(num_frames=None, num_inference_steps=2, latents=noise))
    before = torch.cat([next(stream).latents for _ in range(2)], 2)
    stream.switch_prompt("a dog runs")
    after = next(stream).latents

    fresh = pipe.stream(**settings(prompt="a dog runs", num_frames=None, num_inference_steps=2, latents=noise))
    fresh._prefix = before
    expected = [next(fresh).latents for _ in range(3)][-1]
    assert torch.equal(after, expected)

    stale = pipe.stream(**settings(num_frames=None, num_inference_steps=2, latents=noise))
    for _ in range(2):
        next(stale)
    stale.switch_prompt("a dog runs", recache=False)
    assert not torch.equal(next(stale).latents, expected)


def test_a_prompt_changes_late_in_a_stream_with_first_frames(pipe: CausalWanPipeline) -> None:
    stream = pipe.stream(**settings(num_frames=None, guidance_scale=3.0))
    for _ in range(6):
        next(stream)
    seen = [sorted(cache.frames) for cache in stream.model.caches.values()]
    first = [cache.layers[0].keys[:, :2].clone() for cache in stream.model.caches.values()]
    stream.switch_prompt("a dog")
    assert [sorted(cache.frames) for cache in stream.model.caches.values()] == seen == [[0, 1, 8, 9, 10, 11]] * 2
    for cache, kept in zip(stream.model.caches.values(), first, strict=True):
        assert torch.equal(cache.layers[0].keys[:, :2], kept), "the first frames were written anew"
    assert next(stream).start == 12


def test_going_back_makes_the_same_again_and_another_prompt_another(pipe: CausalWanPipeline) -> None:
    stream = pipe.stream(**settings(num_frames=None, output_type="np"))
    for _ in range(3):
        next(stream)
    moment = stream.snapshot()
    first = [next(stream).frames for _ in range(2)]
    stream.restore(moment)
    np.testing.assert_array_equal([next(stream).frames for _ in range(2)], first)
    stream.restore(moment)
    stream.switch_prompt("a dog")
    assert np.abs(next(stream).frames - first[0]).max() > 1e-4
    with pytest.raises(StreamError, match="generator"):
        pipe.stream(**settings(generator=None)).snapshot()


def test_callbacks_see_every_step_and_can_change_it(pipe: CausalWanPipeline) -> None:
    steps: list[tuple[int, float]] = []

    def watch(host: Any, step: int, timestep: float, values: dict[str, Any]) -> dict[str, Any]:
        assert list(values) == ["latents"]
        steps.append((step, timestep))
        return {"latents": torch.zeros_like(values["latents"])} if step == 7 else {}

    found = latents(pipe, callback_on_step_end=watch)
    assert [step for step, _ in steps] == list(range(8))
    steps.clear()
    latents(pipe, callback_on_step_end=watch, image=Image.new("RGB", (48, 32)))
    # The first frame is given, six are made.
    assert [step for step, _ in steps] == list(range(6))
    steps.clear()
    stream = pipe.stream(**settings(callback_on_step_end=watch, image=Image.new("RGB", (48, 32))))
    write, stream._write = stream._write, lambda latents: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        next(stream)
    stream._write = write  # type: ignore[method-assign]
    list(stream)
    # An interruption while the given frame was written changes nothing.
    assert [step for step, _ in steps] == list(range(6))
    assert {timestep for _, timestep in steps} == set(ROLLOUT.timesteps)
    assert found[:, :, 6:].abs().max() == 0
    assert found[:, :, :6].abs().min() > 0


def test_callbacks_of_diffusers_name_what_they_want(pipe: CausalWanPipeline) -> None:
    class Watch(PipelineCallback):  # type: ignore[misc]
        tensor_inputs = ("prompt_embeds", "negative_prompt_embeds")
        seen: list[Any] = []

        def callback_fn(self, host: Any, step: int, timestep: float, values: dict[str, Any]) -> dict[str, Any]:
            self.seen.append(values)
            return values

    latents(pipe, num_frames=5, guidance_scale=3.0, callback_on_step_end=Watch())
    assert [list(values) for values in Watch.seen] == [["prompt_embeds", "negative_prompt_embeds"]] * 2
    assert all(values[name].shape[:2] == (1, 8) for values in Watch.seen for name in values)


def test_an_interruption_keeps_what_is_finished(pipe: CausalWanPipeline) -> None:
    whole = latents(pipe)

    def stop(host: Any, step: int, timestep: float, values: dict[str, Any]) -> dict[str, Any]:
        host._interrupt = step == 5
        return {}

    assert torch.equal(latents(pipe, callback_on_step_end=stop), whole[:, :, :4])
    assert torch.equal(latents(pipe), whole), "an interruption is remembered"
    stream = pipe.stream(**settings(num_frames=None))
    next(stream)
    stream.stop()
    assert list(stream) == []


def test_two_streams_share_one_transformer(pipe: CausalWanPipeline) -> None:
    expected = [latents(pipe), latents(pipe, prompt="a dog")]
    streams = [pipe.stream(**settings()), pipe.stream(**settings(prompt="a dog"))]
    turns = list(zip(*streams, strict=True))
    for number in (0, 1):
        assert torch.equal(torch.cat([turn[number].latents for turn in turns], 2), expected[number])


def test_saved_and_loaded_it_is_the_same(pipe: CausalWanPipeline, tmp_path: Path) -> None:
    expected = latents(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = CausalWanPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.rollout == ROLLOUT
    assert torch.equal(latents(loaded), expected)
    assert CausalWanPipeline.from_pretrained(tmp_path, rollout="longlive").rollout.window == 12


def test_flashblock_can_be_calibrated_from_a_few_videos(pipe: CausalWanPipeline) -> None:
    """At the strictest limits every head recomputes, which is dense; at none every head reuses."""
    dense, errors = latents(pipe), {}
    shape = {"height": 32, "width": 48, "num_frames": 25, "max_sequence_length": 8}
    for cosine, drift in ((1.1, 0.0), (-2.0, 1e9)):
        flash = calibrated(pipe, ["a cat", "two dogs"], cosine=cosine, drift=drift, **shape)
        layers, heads = len(pipe.transformer.blocks), pipe.transformer.config.num_attention_heads
        assert flash.calibrated == (((cosine > 1,) * heads,) * layers,) * (len(ROLLOUT.timesteps) - 1)
        errors[cosine] = float((latents(pipe, methods=[flash]) - dense).norm() / dense.norm())
    assert errors[1.1] < 1e-4 < errors[-2.0]
    with pytest.raises(UsageError, match="two chunks or more"):
        calibrated(pipe, ["a cat"], **shape | {"num_frames": 5})
    with pytest.raises(UsageError, match="list with one"):
        calibrated(pipe, "a cat")


@pytest.mark.parametrize(
    "methods",
    [
        (),
        (FlashBlock(), TempCache(frames=2), CausalLightForcing(block=16), AnnCross(block=1)),
        (FlashBlock(), CausalAnn(block=16), HybridMemory(frames=1)),
    ],
    ids=len,
)
def test_no_step_reads_anything_back(
    pipe: CausalWanPipeline, monkeypatch: pytest.MonkeyPatch, methods: tuple[Any, ...]
) -> None:
    """On a GPU each of these would wait for it."""
    stream = pipe.stream(**settings(num_frames=None, methods=methods, even_if_slower=True, guidance_scale=3.0))
    for _ in range(4):
        next(stream)
    inside: list[str] = []
    denoise = stream.sampler.run
    running = [False]
    tickets = {each.ticket.data_ptr() for layers in stream.model.memories.values() for each in layers}

    def run(*args: Any) -> Any:
        running[0] = True
        try:
            return denoise(*args)
        finally:
            running[0] = False

    def kernel(*args: Any, **kwargs: Any) -> Any:
        """The reference on CPUs may look at masks; kernels of GPUs do not."""
        before, running[0] = running[0], False
        try:
            return attention(*args, **kwargs)
        finally:
            running[0] = before

    def watched(name: str) -> Callable[..., Any]:
        original = getattr(torch.Tensor, name)

        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            # A layer finds its memory by a number in host memory.
            if running[0] and tensor.data_ptr() not in tickets:
                inside.append(name)
            return original(tensor, *args, **kwargs)

        return call

    monkeypatch.setattr(stream.sampler, "run", run)
    for module in (cross, memory, parts):
        monkeypatch.setattr(module, "attention", kernel)
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, watched(name))
    next(stream)
    assert inside == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"height": 40}, "height 40 was given; this model takes multiples of 16"),
        ({"num_frames": 24}, "21 or 25"),
        ({"prompt": None}, "prompt"),
        ({"image": "x", "video": "y"}, "one of them"),
        ({"cuda_graphs": True}, "CUDA GPU"),
        ({"negative_prompt": "x", "negative_prompt_embeds": EMBEDS}, "either a negative_prompt or"),
        (GIVEN | {"negative_prompt_embeds": EMBEDS[:2], "guidance_scale": 3.0}, "for a batch of 3"),
        (GIVEN | {"generator": [torch.Generator()] * 2}, "2 generators"),
    ],
)
def test_what_cannot_be_is_said(pipe: CausalWanPipeline, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        pipe.stream(**(settings() | changes))
