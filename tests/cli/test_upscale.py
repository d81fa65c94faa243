"""Rendering in two stages: at the model's own size, enlarged and refined."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vidaccel
from vidaccel.errors import UsageError
from vidaccel.patterns import FreeSwim, PerLayer
from vidaccel.render import RenderJob, StepDone, find, open_pipeline, recipe_for, render, video
from vidaccel.render.upscale import enlarge, memory, most, noised_latents, refined_steps, second_pipeline

UP = ["render", "--prompt", "a red circle", "--seed", "7", "--upscale", "2x", "--steps", "4"]


def job_for(wan: Path, **given: Any) -> Any:
    model = find(str(wan))
    recipe = recipe_for(model, 64, 64, 9)
    return RenderJob(
        "a red circle", str(wan), recipe, seed=5, num_inference_steps=4, **{"upscale": 2, **given}
    ).complete(model)


def test_two_stages(wan: Path) -> None:
    job, steps = job_for(wan), []
    pipe = open_pipeline(job, find(str(wan)))
    found = render(pipe, job, steps.append)
    assert found.frames.shape == (9, 128, 128, 3)
    assert steps[:4] == [StepDone(n, 4, None) for n in range(4)]
    assert [step.density is not None for step in steps[4:]] == [True] * refined_steps(job) == [True] * 2
    calls = found.report.data["calls"]
    assert {call["grid"] for call in calls} == {"3x8x8"}
    assert [call["guided"] for call in calls] == ["both", "alone", "kept", "alone"]
    assert (
        pipe.transformer.attn_processors.keys() == open_pipeline(job, find(str(wan))).transformer.attn_processors.keys()
    )
    assert found.sha256 == render(pipe, job).sha256

    # The same by hand, with the pipelines alone.
    small = pipe(
        "a red circle", height=64, width=64, num_frames=9, num_inference_steps=4, guidance_scale=3.0,
        max_sequence_length=16, generator=torch.Generator().manual_seed(5), output_type="np",
    ).frames[0]  # fmt: skip
    second = second_pipeline(pipe, job)
    with vidaccel.accelerate(second, recipe=job.recipe):
        large = second(
            prompt="a red circle", height=128, width=128, num_inference_steps=4, strength=0.7, guidance_scale=3.0,
            max_sequence_length=16, latents=noised_latents(second, small, job), output_type="np",
        ).frames[0]  # fmt: skip
    assert np.array_equal(found.frames, video.to_uint8(large))


def test_latents_are_those_of_diffusers(wan: Path) -> None:
    """Its own video-to-video pipeline encodes and noises the enlarged frames to the same."""
    job = job_for(wan)
    pipe = second_pipeline(open_pipeline(job, find(str(wan))), job)
    frames = np.random.default_rng(0).random((9, 64, 64, 3), dtype=np.float32)
    ours = noised_latents(pipe, frames, job)
    pipe.scheduler.set_timesteps(4)
    timesteps, _ = pipe.get_timesteps(4, pipe.scheduler.timesteps, 0.7, "cpu")
    with torch.no_grad():
        theirs = pipe.prepare_latents(
            enlarge(frames, 128, 128), 1, 16, 128, 128, torch.float32, torch.device("cpu"),
            torch.Generator().manual_seed(6), None, timesteps[:1],
        )  # fmt: skip
    torch.testing.assert_close(ours, theirs)


def test_enlarging_keeps_flat_colours_and_order() -> None:
    frames = np.stack([np.full((4, 6, 3), shade) for shade in (0.0, 0.5, 1.0)])
    large = enlarge(frames, 8, 12)
    assert large.shape == (1, 3, 3, 8, 12)
    assert [float(large[0, 0, n].mean()) for n in range(3)] == [-1, 0, 1]


def test_memory_is_told_before_it_starts(invoke: Callable[..., Any], wan: Path, tmp_path: Path) -> None:
    dry = invoke(*UP, "-m", wan, "--dry-run", "--format", "json")
    needs = json.loads(dry.stdout)["memory_gib"]
    job, model = job_for(wan), find(str(wan))
    pipe = open_pipeline(job, model)
    parts = (pipe.text_encoder, pipe.transformer, pipe.vae)
    weights = sum(p.numel() * p.element_size() for part in parts for p in part.state_dict().values())
    assert needs["weights"] * 2**30 == pytest.approx(weights, rel=0.02)
    assert needs["cross-attention outputs kept"] * 2**30 == 2 * 192 * 64 * 4
    assert "cross-attention outputs in host memory" not in needs
    tight = replace(job, recipe=replace(job.recipe, attention=replace(job.recipe.attention, guide_gib=0.0)))
    assert memory(tight, model)["cross-attention outputs in host memory"] == needs["cross-attention outputs kept"]
    window, part = replace(job.recipe.attention, guide=0), memory(job, model)
    for layers, share in (({0: job.recipe.attention}, 1), ({0: window, 1: job.recipe.attention}, 0.5)):
        mixed = memory(replace(job, recipe=replace(job.recipe, attention=PerLayer(layers))), model)
        assert mixed["activations of a block, about"] == part["activations of a block, about"]
        assert mixed["cross-attention outputs kept"] == share * part["cross-attention outputs kept"]
    bare = memory(replace(job, recipe=replace(job.recipe, attention=PerLayer({0: window}))), model)
    assert 2 * bare["activations of a block, about"] == part["activations of a block, about"]
    assert "cross-attention outputs kept" not in bare
    # From configurations alone, as where weights are still on the hub.
    assert memory(job, replace(model, kind="hub"))["weights"] == pytest.approx(needs["weights"], rel=0.02)
    bare = replace(model, kind="hub", folder=tmp_path)
    assert memory(job, bare)["weights of text_encoder"] is None
    offloaded = memory(replace(job, offload="model"), model)
    assert offloaded["weights"] + offloaded["weights in host memory"] == pytest.approx(needs["weights"])
    assert offloaded["weights in host memory"] > 0
    decoder = needs["or, after them, the VAE's decoder, about"]
    assert most(needs) == pytest.approx(
        needs["weights"] + max(decoder, needs["activations of a block, about"] + needs["cross-attention outputs kept"])
    )

    done = invoke(*UP, "-m", wan, "-o", tmp_path / "up.mp4")
    assert done.exit_code == 0, done.output
    lines = done.stderr.splitlines()
    told = next(n for n, line in enumerate(lines) if line.startswith("refining at 128x128 needs "))
    assert told < next(n for n, line in enumerate(lines) if line.startswith("loading "))


def test_weights_of_another_kind_are_counted_by_configuration(wan: Path, tmp_path: Path) -> None:
    """They are refused where they are opened; a dry run tells what they will need, or that nobody knows."""
    job, model = job_for(wan), find(str(wan))
    expected = memory(job, model)["weights"]
    copy = Path(shutil.copytree(wan, tmp_path / "copy"))
    for file in copy.glob("*/*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    assert memory(job, find(str(copy)))["weights"] == pytest.approx(expected, rel=0.02)
    (copy / "text_encoder" / "config.json").unlink()
    unknown = memory(job, find(str(copy)))
    assert unknown["weights of text_encoder"] is None
    assert 0 < unknown["weights"] < expected


def test_rerun_makes_the_same_frames(invoke: Callable[..., Any], wan: Path, tmp_path: Path) -> None:
    assert invoke(*UP, "-m", wan, "-o", tmp_path / "up.mp4", "--strength", "0.5").exit_code == 0
    data = video.read_record(tmp_path / "up.mp4")
    assert (data["job"]["upscale"], data["job"]["strength"], data["job"]["height"]) == (2, 0.5, 64)
    assert data["recipe"]["attention"]["native"] == [4, 4]
    again = invoke("rerun", tmp_path / "up.mp4", "--strict", "--format", "json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["identical"]


def test_another_pattern_refines(invoke: Callable[..., Any], wan: Path, tmp_path: Path) -> None:
    options = ["--attention", "radial", "--density", "0.5", "--set", "attention.block=16", "--dense-layers", "0"]
    done = invoke(*UP, "-m", wan, "-o", tmp_path / "up.mp4", *options, "--dense-steps", "1")
    assert done.exit_code == 0, done.output
    assert video.read_record(tmp_path / "up.mp4")["recipe"]["attention"]["name"] == "radial"


def test_the_window_is_the_first_stages_frame(wan: Path) -> None:
    pattern = recipe_for(find(str(wan)), 64, 96, 9).attention
    assert isinstance(pattern, FreeSwim)
    assert (pattern.native, pattern.block, pattern.logit_scale, pattern.guide) == ((4, 6), 16, 2.0, 2)
    assert recipe_for(find(str(wan)), 480, 832, 81).attention.block == 128


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--upscale", "1.5x"], "give 2x, 3x or 4x"),
        (["--upscale", "8x"], "give 2x, 3x or 4x"),
        (["--upscale", "2x", "--strength", "0"], "it lies in (0, 1]"),
        (["--upscale", "2x", "--strength", "0.1"], "leaves no step to refine with; give 0.33 or more"),
        (["--strength", "0.5"], "needs a video to start from, or an upscale"),
    ],
)
def test_wrong_options_name_right_ones(
    invoke: Callable[..., Any], failed: Callable[..., None], wan: Path, options: list[str], words: str
) -> None:
    failed(invoke("render", "--prompt", "a red circle", "-m", wan, *options), 2, words)


def test_models_that_cannot(wan: Path, wan_image: Path) -> None:
    with pytest.raises(UsageError, match="works for Wan text-to-video models with one transformer"):
        RenderJob("a", str(wan_image), image=__file__, upscale=2).complete(find(str(wan_image)))
    with pytest.raises(UsageError, match="leave --image and --video out"):
        job_for(wan, video=__file__)
    with pytest.raises(UsageError, match="give 2, 3 or 4"):
        job_for(wan, upscale=5)
