"""The trainings of the sample models: they run, go on, export; and what they train is what the stock pipelines run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from samples.models.shared import autoencoder, shared_parts
from samples.train import causal, cogvideox, few_steps, flow, hints, hunyuan, joint, packed
from samples.train.parts import build_tokenizer

CAPTION = "a small red circle moves up-left and a blue star moves down, camera pans left"
QUICK = ["--steps", "1", "--batch", "4", "--held", "2", "--log-every", "1", "--matrix-rate", "0"]


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `encode` writes it, of clips four latent places wide."""
    folder = tmp_path_factory.mktemp("latents")
    clips = torch.randn(8, 48, causal.FRAMES, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"latents": clips}, folder / "latents-0000.safetensors")
    (folder / "latents-0000.json").write_text(json.dumps([[CAPTION, "a red circle moves right"]] * 8))
    (folder / "stats.json").write_text(json.dumps({"mean": [0.0] * 48, "std": [1.0] * 48}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [hunyuan, cogvideox])
def test_a_training_runs_goes_on_and_exports_a_stock_pipeline(recipe: object, latents: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    words = ["--latents", str(latents), "--out", str(tmp_path / "run"), *QUICK]
    recipe.main(words)
    first = (tmp_path / "run" / "ema.safetensors").read_bytes()
    recipe.main(words)
    assert (tmp_path / "run" / "ema.safetensors").read_bytes() != first
    assert json.loads((tmp_path / "run" / "training.json").read_text())["steps"] == 1

    folder = tmp_path / "model"
    recipe.main(["--out", str(tmp_path / "run"), "--export", str(folder)])
    assert sum(file.stat().st_size for file in (folder / "transformer").iterdir()) <= 6 * 2**20
    assert not list((folder / "vae").glob("*.safetensors"))
    pipe = DiffusionPipeline.from_pretrained(folder, **shared_parts(folder), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    settings = json.loads((folder / "defaults.json").read_text())
    settings |= {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}
    del settings["fps"]
    video = pipe(CAPTION, output_type="pt", **settings).frames[0]
    assert video.shape == (9, 3, 64, 64)
    assert video.isfinite().all()


def words_of(count: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask as the trainings see them."""
    tokens = build_tokenizer()([CAPTION], padding="max_length", max_length=count)
    ids = torch.tensor(tokens["input_ids"])
    return ids, (ids != 0).float()


def test_hunyuan_is_trained_on_what_its_pipeline_computes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = hunyuan.Denoiser(len(build_tokenizer(hunyuan.INSTRUCTION))).eval()
    save_file({name: value.data for name, value in model.named_parameters()}, tmp_path / "ema.safetensors")
    pipe = hunyuan.assemble(tmp_path / "ema.safetensors")
    x, time, strength = torch.randn(1, 48, 3, 4, 4), torch.tensor([0.4]), torch.tensor([3.0])
    with torch.no_grad():
        embeds, pooled, mask = pipe.encode_prompt(CAPTION, max_sequence_length=64)
        stock = pipe.transformer(x, time * 1000, embeds, mask, pooled, strength * 1000, return_dict=False)[0]
        own = model(x, time, *words_of(40), strength)
    torch.testing.assert_close(own, stock, atol=1e-4, rtol=1e-4)


def test_cogvideox_is_trained_on_what_its_pipeline_computes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = cogvideox.Denoiser(len(build_tokenizer()), layers=2).eval()
    text = model.text_encoder
    x = torch.randn(1, 48, 5, 16, 16)
    pipe = cogvideox.CogVideoXPipeline(
        build_tokenizer(), text, autoencoder(), model.transformer, cogvideox.build_scheduler()
    )
    with torch.no_grad():
        embeds, _ = pipe.encode_prompt(CAPTION, do_classifier_free_guidance=False, max_sequence_length=cogvideox.SLOTS)
        rotary = pipe._prepare_rotary_positional_embeddings(256, 256, 5, x.device)
        stock = pipe.transformer(
            x.transpose(1, 2), embeds, torch.tensor([400.0]), image_rotary_emb=rotary, return_dict=False
        )[0]
        own = model(x, torch.tensor([0.4]), words_of(cogvideox.SLOTS)[0])
    torch.testing.assert_close(own, stock.transpose(1, 2), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_teacher_says_what_the_pipeline_of_wan_tiny_computes_and_is_strengthened_as_asked() -> None:
    from diffusers import WanPipeline

    from samples.models import path

    pipe = WanPipeline.from_pretrained(path("wan-tiny"), vae=None, dtype=torch.float32)
    x, time, ids = torch.randn(2, 48, 2, 4, 4), torch.tensor([0.4, 0.9]), words_of(40)[0].expand(2, -1)
    with_words, without = pipe.encode_prompt([CAPTION] * 2, max_sequence_length=joint.TEACHER_SLOTS)
    one, none = (pipe.transformer(x, time * 1000, text, return_dict=False)[0] for text in (with_words, without))
    teacher = joint.Teacher()
    words = teacher.words(ids)
    torch.testing.assert_close(teacher(x, time, words), one, atol=1e-4, rtol=1e-4)
    empty = torch.tensor(build_tokenizer()([""], padding="max_length", max_length=40)["input_ids"])
    target = joint.guided(teacher, x, time, words, teacher.words(empty)[0], torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(target, torch.stack((none[0] + 3 * (one[0] - none[0]), one[1])), atol=1e-4, rtol=1e-4)


def test_attention_without_a_mask_serves_the_stock_model() -> None:
    torch.manual_seed(0)
    model = hunyuan.Denoiser(len(build_tokenizer(hunyuan.INSTRUCTION)), dual=1, single=1).eval()
    x, time, strength = torch.randn(1, 48, 3, 4, 4), torch.tensor([0.4]), torch.tensor([3.0])
    with torch.no_grad():
        stock = model(x, time, *words_of(40), strength)
        for block in model.blocks:
            block.attn.set_processor(packed.PackedAttention())
        torch.testing.assert_close(model(x, time, *words_of(40), strength), stock, atol=1e-5, rtol=1e-5)


def test_hints_ask_nothing_of_a_student_that_holds_what_its_teacher_holds_on_another_scale() -> None:
    torch.manual_seed(0)
    student, teacher = (torch.nn.Sequential(*(torch.nn.Identity() for _ in range(6))) for _ in range(2))
    watch = hints.Hints(student, teacher, 8, 8)
    for read in watch.maps:
        torch.nn.init.eye_(read.weight)
        torch.nn.init.zeros_(read.bias)
    scales = torch.logspace(-1, 1, 8)
    for right in (True, False):
        held = torch.randn(4, 500, 8)
        told = held if right else torch.randn(4, 500, 8)
        student(held)
        teacher(torch.cat((3 + told * scales, torch.randn(4, 500, 8))))
        assert (watch() < 1e-2) == right


def test_the_autoencoder_keeps_its_function_when_its_scale_moves_into_the_weights() -> None:
    from diffusers import AutoencoderKLWan

    from samples.models import path

    stock = AutoencoderKLWan.from_pretrained(path("wan-tiny") / "vae", dtype=torch.float32).eval()
    moved = autoencoder()
    mean, std = (torch.tensor(x)[:, None, None, None] for x in (stock.config.latents_mean, stock.config.latents_std))
    video = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        one, other = stock.encode(video).latent_dist, moved.encode(video).latent_dist
        torch.testing.assert_close((one.mean - mean) / std, other.mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.std / std, other.std, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(stock.decode(one.mean).sample, moved.decode(other.mean).sample, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_causal_trainings_run_one_after_the_other(latents: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "causal", tmp_path / "few"
    causal.main(["--latents", str(latents), "--out", str(one), "--drop", "2", *QUICK])
    few_steps.main(["--latents", str(latents), "--start", str(one), "--out", str(other), *QUICK])
    causal.main(["--out", str(other), "--export", str(tmp_path / "model")])
    file = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    assert file.stat().st_size <= 5 * 2**20


def test_a_perfect_teacher_leaves_a_consistent_student_nothing_to_learn() -> None:
    """With one clip in the world, the velocity (x - clip) / level is exact, and every level leads to the same clip."""
    clip = torch.randn(2, 48, 6, 2, 2, generator=torch.Generator().manual_seed(0))

    class Perfect:
        def both(self, clean: Tensor, noisy: Tensor, levels: tuple[Tensor, Tensor], words: Tensor) -> Tensor:
            return (noisy - clip) / causal.frames_of(levels[1]).clamp(min=1e-6)

    text = torch.zeros(2, 4, 8)
    loss = few_steps.consistency_loss(
        *(Perfect(),) * 3, clip, text, text, guidance=3.0, generator=torch.Generator().manual_seed(1)
    )
    assert loss < 1e-8


def test_times_are_spread_evenly_and_shifted() -> None:
    drawn = flow.times((100, 10), torch.Generator().manual_seed(0)).flatten().sort().values
    even = (torch.arange(1000) + 0.5) / 1000
    assert (drawn - flow.shifted(even)).abs().max() < 2e-3
    assert flow.shifted(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]
