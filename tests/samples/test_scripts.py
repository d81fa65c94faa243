"""The scripts that users copy run as they stand: each on the tiny sample, on a CPU."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipelines
import torch
from PIL import Image

from vidaccel.render.video import read_frames

SAMPLES = Path(__file__).parents[2] / "samples"
SMALL = ("--size", "128x128x17", "--steps", "2")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Runs a script in an empty folder, as `python samples/NAME.py ...` would."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(SAMPLES))

    def run(name: str, *words: object) -> None:
        runpy.run_path(str(SAMPLES / f"{name}.py"))["main"]([str(word) for word in words])

    yield run
    for name in [name for name in sys.modules if name.split(".")[0] == "patterns"]:
        del sys.modules[name]


def effective(capsys: pytest.CaptureFixture[str]) -> float:
    return float(re.findall(r"effective density ([\d.]+)", capsys.readouterr().out)[0])


def test_lora(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers import WanPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = WanPipeline.from_pretrained(SAMPLES / "models" / "wan-tiny", dtype=torch.float32)
    pipe.transformer.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    torch.manual_seed(0)
    weights = {name: torch.randn_like(x) for name, x in get_peft_model_state_dict(pipe.transformer).items()}
    WanPipeline.save_lora_weights(tmp_path, transformer_lora_layers=weights)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    script("lora", "--lora", file, *SMALL)
    assert effective(capsys) < 1
    script("lora", "--lora", file, "--strength", 0, "--output", "without.mp4", *SMALL)
    first, second = (read_frames(tmp_path / name, 17) for name in ("lora.mp4", "without.mp4"))
    assert first.shape == (17, 128, 128, 3)
    assert np.abs(first.astype(int) - second).mean() > 1


def test_image_to_video(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_pipelines.wan("WanImageToVideoPipeline", in_channels=36).save_pretrained(tmp_path / "model")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "first.png")
    script("image_to_video", "first.png", "--model", tmp_path / "model", *SMALL)
    assert effective(capsys) < 1
    assert read_frames(tmp_path / "image_to_video.mp4", 99).shape == (17, 128, 128, 3)


def test_small_gpu(script: Any, tmp_path: Path) -> None:
    script("small_gpu", *SMALL)
    assert len(read_frames(tmp_path / "small_gpu.mp4", 99)) == 17
    assert (tmp_path / "small_gpu" / "report.html").is_file()


def test_several_prompts(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle moves right\n\na blue star moves up\n")
    script("several_prompts", "prompts.txt", *SMALL)
    found = re.findall(r"([\d.]+) dB, motion x [\d.]+: (.*)", capsys.readouterr().out)
    assert [prompt for _, prompt in found] == ["a red circle moves right", "a blue star moves up"]
    assert all(10 < float(db) < 60 for db, _ in found)
    for folder in ("dense", "sparse"):
        assert sorted(path.name for path in (tmp_path / "out" / folder).iterdir()) == ["000.mp4", "001.mp4"]


def test_own_pattern(script: Any, tmp_path: Path) -> None:
    script("own_pattern", "--block", 16, *SMALL)
    assert len(read_frames(tmp_path / "own_pattern.mp4", 99)) == 17


def test_all_are_described_and_tested() -> None:
    scripts = {path.stem for path in SAMPLES.glob("*.py")}
    described = set(re.findall(r"^\| \[`(\w+)\.py`\]", (SAMPLES / "README.md").read_text(), re.MULTILINE))
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert scripts == described
    assert scripts < tested
