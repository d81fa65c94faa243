"""The causal sample: what one training pass computes is what the stream computes, chunk by chunk, from its cache."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from samples.models import path
from samples.train import causal, evaluate, evaluate_causal
from samples.train.causal_controls import drawing_lots, dropping_history
from samples.train.record import packed, unpacked
from vidaccel.kernels.attention import attention
from vidaccel.pipelines.causal_attention import CausalTransformer
from vidaccel.pipelines.causal_wan import CausalWanPipeline
from vidaccel.reuse import FlashBlock, Methods
from vidaccel.streaming import Rollout


def model(seed: int = 0) -> causal.CausalDenoiser:
    torch.manual_seed(seed)
    return causal.untrained().eval()


@torch.no_grad()
def test_one_training_pass_is_a_whole_stream() -> None:
    """Six chunks and a window of four, so that the cache evicts; every chunk at a noise level of its own."""
    trained = model()
    clean, noisy = torch.randn(2, 1, 48, causal.FRAMES, 2, 2).unbind()
    words, levels = torch.randn(1, 7, 64), torch.rand(1, causal.FRAMES // causal.CHUNK)
    expected = trained.both(clean, noisy, (torch.zeros_like(levels), levels), words)

    stock = causal.Denoiser(trained.text_encoder.config.vocab_size, layers=len(trained.transformer.blocks)).transformer
    stock.load_state_dict({k: v for k, v in trained.transformer.state_dict().items() if "rope" not in k}, strict=False)
    stream = CausalTransformer(stock.eval(), Rollout(**causal.ROLLOUT), (2, 2))
    for number, start in enumerate(range(0, causal.FRAMES, causal.CHUNK)):
        frames = slice(start, start + causal.CHUNK)
        stream.begin(causal.CHUNK)
        found = stream.flow(noisy[:, :, frames], levels[:, number] * 1000, words)
        torch.testing.assert_close(found, expected[:, :, frames], atol=2e-4, rtol=1e-3)
        stream.flow(clean[:, :, frames], torch.zeros(1), words)
        stream.commit()


@pytest.mark.slow
def test_the_export_streams_and_is_measured(tmp_path: Path) -> None:
    save_file({name: value.data for name, value in model().named_parameters()}, tmp_path / "ema.safetensors")
    folder = tmp_path / "model"
    causal.export(tmp_path / "ema.safetensors", folder)
    # Another size than that of the checker would be refused, so few frames of the right one.
    words = ["--model", str(folder), "--report", str(tmp_path / "report.json"), "--prompts", "1", "--frames", "4"]
    evaluate_causal.main([*words, "--only", "no history", "--steps", "1"])
    cells = json.loads((tmp_path / "report.json").read_text())["cells"]
    assert list(cells) == ["dense", "no history"]
    assert len(cells["dense"]["stretches"]["right"]) == 1
    assert cells["no history"]["stretches"]["psnr_to_dense"][0] < 100
    assert cells["no history"]["density"] <= cells["dense"]["density"]


@pytest.mark.slow
def test_the_shipped_model_draws_what_its_reports_say(tmp_path: Path) -> None:
    """A few prompts again, on this CPU: as in the committed run, and as in the first stretch of the large one."""
    reports = path("wan-causal-tiny") / "reports"
    few, large = (json.loads((reports / name).read_text()) for name in ("repeat.json", "causal-h200.json"))
    settings, prompts = few["settings"], few["settings"]["prompts"]
    words = ["--prompts", prompts, "--frames", settings["latent_frames"], "--seed", settings["seed"]]
    words += ["--report", tmp_path / "report.json", "--only", *few["cells"]]
    evaluate_causal.main([str(word) for word in words])
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["settings"] == settings
    assert list(again["cells"]) == list(few["cells"])
    for name, before in few["cells"].items():
        now = again["cells"][name]
        assert now["answers"] == before["answers"], name
        assert now["density"] == before["density"], name
        if name != "dense":
            found, expected = (cell["stretches"]["psnr_to_dense"][0] for cell in (now, before))
            assert found == pytest.approx(expected, abs=0.3), name
    captions = [scene.caption() for scene in evaluate.unseen(large["settings"]["prompts"])]
    places = [captions.index(scene.caption()) for scene in evaluate.unseen(prompts)]
    answers = unpacked(large["cells"]["dense"]["answers"][0], len(captions))
    assert again["cells"]["dense"]["answers"][0] == packed(answers[place] for place in places)


def test_each_evaluation_names_the_other_for_a_model_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "CausalWanPipeline"}))
    with pytest.raises(SystemExit, match=r"draws chunk by chunk.*samples\.train\.evaluate_causal"):
        evaluate.main(["--model", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"is a WanPipeline.*samples\.train\.evaluate --model wan-tiny"):
        evaluate_causal.main(["--model", "wan-tiny"])


def test_a_sample_that_is_not_here_is_named() -> None:
    with pytest.raises(SystemExit, match=r"no-such-model is neither a folder.*wan-tiny"):
        evaluate_causal.main(["--model", "no-such-model"])


def test_every_way_is_taken_by_the_stream() -> None:
    from diffusers import WanPipeline

    parts = WanPipeline.from_pretrained(path("wan-tiny"), transformer=None, dtype=torch.float32).components
    parts["transformer"] = causal.Denoiser(parts["text_encoder"].config.vocab_size, layers=1).transformer.eval()
    parts.pop("transformer_2")
    pipe = CausalWanPipeline(**parts, rollout=causal.ROLLOUT | {"steps": (1000,)})
    settings = {"height": 64, "width": 64, "num_frames": 33, "guidance_scale": 1.0, "max_sequence_length": 16}
    # One budget of each method and of each control: the second one runs the same code.
    kinds = {
        (tuple(map(type, way.methods)), way.control, bool(way.changes)): (name, way)
        for name, way in evaluate_causal.ways(9, causal.CHUNK).items()
    }
    assert len(kinds) >= 17
    for name, way in kinds.values():
        clips, result = evaluate_causal.generate(pipe, evaluate_causal.unseen(1), way, settings, 0)
        assert clips.shape == (1, 33, 64, 64, 3), name
        assert result["density"] > 0, name
    assert pipe.rollout == Rollout.of(causal.ROLLOUT | {"steps": (1000,)})


@torch.no_grad()
def late(control: AbstractContextManager[None]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[float]]:
    """FlashBlock at a second step, where the queries of the last of three heads are others: what comes out, what
    attention to all and to the own chunk would be, and how many heads reused of how many."""
    transformer = causal.Denoiser(11, layers=1).transformer.eval()
    model = CausalTransformer(transformer, Rollout(**causal.ROLLOUT), (2, 2), methods=Methods.of((FlashBlock(),), 1))
    generator = torch.Generator().manual_seed(0)
    past, now, other = (torch.randn(3, 1, causal.CHUNK * 4, 3, 64, generator=generator) for _ in range(3))
    model.begin(causal.CHUNK)
    model.flow(torch.zeros(1, 48, causal.CHUNK, 2, 2), torch.zeros(1), torch.zeros(1, 7, 64))
    (memory,), turn = model.memories["cond"], model.turns["cond"]
    memory.attend(*past)
    model.commit()
    model.begin(causal.CHUNK)
    turn.calls = 0
    memory.attend(*now)
    turn.calls = 1
    q, k, v = now.clone()
    q[:, :, 2] = other[0, :, :, 2]
    with control:
        out = memory.attend(q, k, v)
    whole = attention(q, torch.cat([past[1], k], 1), torch.cat([past[2], v], 1))[0]
    return out, whole, attention(q, k, v)[0], turn.reused.tolist()


def off(found: torch.Tensor, expected: torch.Tensor) -> list[bool]:
    """Which heads are not as expected."""
    return ((found - expected).abs().amax((0, 1, 3)) > 1e-5).tolist()


def test_controls_reuse_as_many_heads_and_go_without_what_the_method_rests_on() -> None:
    out, whole, own, reused = late(nullcontext())
    assert reused == [2, 3]
    assert off(out, whole) == [False, False, False], "two heads have the queries they had, the third is computed anew"
    out, whole, own, reused = late(dropping_history())
    assert reused == [2, 3]
    assert off(out, own) == [False, False, True]
    assert off(out, whole) == [True, True, False]
    out, whole, own, reused = late(drawing_lots())
    assert reused == [2, 3]
    assert off(out, whole) == [False, False, True], "the lot falls on another head to be computed anew"
    assert off(late(nullcontext())[0], whole) == [False, False, False], "a control is over where its block ends"
