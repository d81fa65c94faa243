"""Sweeps: cells run on the stock pipelines of all samples, reports go on where they stopped, numbers are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from samples.models import world
from samples.models.shared import autoencoder
from samples.train import cells, cogvideox, evaluate, fidelity, hunyuan, parts
from samples.train.cells import Cell
from samples.train.record import Record, packed, unpacked

STEPS = 8
SETTINGS = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": STEPS, "max_sequence_length": 40}


@pytest.fixture(scope="module", params=["wan", "hunyuan", "cogvideox"])
def pipe(request: pytest.FixtureRequest) -> Any:
    """The stock pipeline of a sample, with random weights and few layers."""
    from diffusers import CogVideoXPipeline, FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, WanPipeline

    torch.manual_seed(0)
    vae, tokenizer = autoencoder(), parts.build_tokenizer()
    found: Any
    if request.param == "hunyuan":
        words = hunyuan.build_template_tokenizer()
        model = hunyuan.Denoiser(len(words), dual=1, single=2).eval()
        found = HunyuanVideoPipeline(
            model.text_encoder, words, model.transformer, vae, FlowMatchEulerDiscreteScheduler(shift=3.0),
            model.text_encoder_2, tokenizer,
        )  # fmt: skip
    elif request.param == "cogvideox":
        text, transformer = parts.build_text_encoder(len(tokenizer)).eval(), cogvideox.build_transformer(3).eval()
        found = CogVideoXPipeline(tokenizer, text, vae, transformer, parts.build_scheduler())
    else:
        text, transformer = parts.build_text_encoder(len(tokenizer)).eval(), parts.build_transformer(layers=3).eval()
        found = WanPipeline(tokenizer, text, vae, parts.build_scheduler(), transformer)
    found.set_progress_bar_config(disable=True)
    return found


def run(pipe: Any, cell: Cell, **sizes: int) -> tuple[torch.Tensor, float]:
    with cell.installed(pipe), evaluate.Meter(pipe.transformer) as meter:
        (clip,) = evaluate.generate(pipe, world.unseen()[:1], SETTINGS | sizes, 1, seed=0)
    assert 0 < meter.seconds < 60
    return clip, meter.computed


@pytest.mark.slow
def test_every_cache_runs_and_leaves_nothing_behind(pipe: Any) -> None:
    plain, computed = run(pipe, cells.DENSE)
    assert computed == 1
    shares = {}
    every = {cell.name.rsplit(" ", 1)[0]: cell for cell in cells.cache_cells(STEPS)[::-1]}
    assert len(every) >= 11
    # Wan has them all; the other families are to show that their blocks can be left out, by us and by diffusers.
    some = ("taylorseer interval", "reuse computed", "random steps computed", "diffusers taylorseer interval")
    for cell in every.values() if type(pipe).__name__ == "WanPipeline" else [every[name] for name in some]:
        clip, shares[cell.name] = run(pipe, cell)
        assert clip.isfinite().all(), cell.name
    skipping = {name.rsplit(" ", 2)[0] for name, share in shares.items() if share < 1}
    assert {"taylorseer", "reuse", "random steps", "diffusers taylorseer"} <= skipping, shares
    assert shares["reuse computed 2"] == 2 / STEPS
    again, computed = run(pipe, cells.DENSE)
    assert computed == 1
    assert torch.equal(again, plain)


@pytest.mark.parametrize("pipe", ["hunyuan"], indirect=True)
def test_patterns_and_controls_run(pipe: Any) -> None:
    sizes = {"height": 128, "width": 256, "num_frames": 9, "num_inference_steps": 2}
    plain, _ = run(pipe, cells.DENSE, **sizes)
    for cell in cells.attention_cells(dense_steps=0.5):
        if cell.name in ("radial 0.5", "tempcache 0.5", "topk 0.5", "random 0.5", "first-frame 0.5"):
            clip, computed = run(pipe, cell, **sizes)
            assert computed == 1
            assert clip.isfinite().all()
            assert not torch.equal(clip, plain), cell.name


def test_a_report_goes_on_and_refuses_other_settings(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    Record(file, {"seed": 0}).add("dense", {"right": 1})
    again = Record(file, {"seed": 0})
    assert again.cells == {"dense": {"right": 1}}
    again.add("radial 0.5", {"right": 0})
    data = json.loads(file.read_text())
    assert list(data["cells"]) == ["dense", "radial 0.5"]
    assert data["versions"]["torch"] == torch.__version__
    with pytest.raises(ValueError, match="other settings"):
        Record(file, {"seed": 1})


@pytest.mark.parametrize("count", [1, 4, 5, 128])
def test_packed_answers_are_read_as_they_were(count: int) -> None:
    answers = [place % 3 == 0 for place in range(count)]
    assert len(packed(answers)) == -(-count // 4)
    assert unpacked(packed(answers), count) == answers
    assert packed([True, False, False, True, True]) == "98"


def test_prompts_are_unseen_and_differ() -> None:
    scenes = evaluate.unseen(128)
    assert len(set(scenes)) == 128
    assert all(world.is_held_out(scene.things[0]) for scene in scenes)
    assert evaluate.unseen(64) == world.unseen()
    assert len({scene.things[0].colour for scene in evaluate.unseen(16)}) == 8


def test_fidelity_of_known_pictures() -> None:
    clip = torch.rand(3, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    assert (fidelity.psnr(clip, clip + 0.1) - 20).abs().max() < 1e-3
    assert (fidelity.ssim(clip, clip) - 1).abs().max() < 1e-5
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(1))
    scores = [float(fidelity.ssim(clip, clip + width * noise).mean()) for width in (0.02, 0.1, 0.5)]
    assert scores == sorted(scores, reverse=True)
    # One window of 11x11 alone: the weighted moments written out, (Wang et al., 2004, eq. 13).
    one, other = (torch.rand(1, 11, 11, 3, generator=torch.Generator().manual_seed(n)).double() for n in (2, 3))
    bell = torch.exp(-torch.arange(-5.0, 6).double().square() / 4.5)
    weight = (bell[:, None] * bell / bell.sum() ** 2)[None, :, :, None]
    x, y = ((clip * weight).sum((1, 2)) for clip in (one, other))
    xx, yy, xy = ((a * b * weight).sum((1, 2)) for a, b in ((one, one), (other, other), (one, other)))
    wanted = (2 * x * y + 1e-4) * (2 * (xy - x * y) + 9e-4)
    wanted /= (x * x + y * y + 1e-4) * (xx - x * x + yy - y * y + 9e-4)
    assert fidelity.ssim(one, other).item() == pytest.approx(wanted.mean().item(), abs=1e-9)
    # Two flat pictures: structure is equal, and only the brightness term is left.
    one, other = torch.full((1, 16, 16, 3), 0.2), torch.full((1, 16, 16, 3), 0.6)
    assert fidelity.ssim(one, other).item() == pytest.approx((2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4), abs=1e-5)


def test_intervals() -> None:
    # Wilson's interval of 10 of 10 and of 50 of 100, from tables.
    assert fidelity.wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-3)
    assert fidelity.wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-3)
    difference, low, high = fidelity.paired([True] * 90 + [False] * 10, [True] * 80 + [False] * 20)
    assert difference == pytest.approx(0.1)
    assert 0.03 < low < 0.1 < high < 0.17
    same = fidelity.paired([True, False] * 32, [True, False] * 32)
    assert same[0] == 0
    assert same[1] < 0 < same[2]
