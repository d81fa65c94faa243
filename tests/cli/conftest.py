"""Tiny real pipelines, built once, and a way to run commands in this process or in one of their own."""

from __future__ import annotations

import json
import os
import string
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS = {
    "height": 64,
    "width": 64,
    "num_frames": 9,
    "fps": 8,
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
    "max_sequence_length": 16,
}


def build_wan(image: bool = False) -> Any:
    """A whole Wan pipeline of a few thousand weights, its tokenizer made from printable ASCII."""
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanImageToVideoPipeline,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

    letters = string.ascii_letters + string.digits + string.punctuation
    vocabulary = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("\u2581", -2.0),
        *((letter, -3.0) for letter in letters),
    ]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)
    torch.manual_seed(0)
    text = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=32,
            d_kv=8,
            d_ff=37,
            num_layers=1,
            num_heads=4,
            dropout_rate=0.0,
            is_encoder_decoder=False,
        )
    ).eval()
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=36 if image else 16,
        out_channels=16,
        text_dim=32,
        freq_dim=64,
        ffn_dim=64,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=256,
    ).eval()
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    parts = {"tokenizer": tokenizer, "text_encoder": text, "vae": vae, "scheduler": scheduler}
    parts["transformer"] = transformer
    if image:
        return WanImageToVideoPipeline(**parts, image_processor=None, image_encoder=None)
    return WanPipeline(**parts)


def save(pipe: Any, folder: Path) -> Path:
    pipe.save_pretrained(folder)
    (folder / "defaults.json").write_text(json.dumps(DEFAULTS))
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose time to threads, and commands in a process of their own get one too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build_wan(), tmp_path_factory.mktemp("models") / "wan")


@pytest.fixture(scope="session")
def wan_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build_wan(image=True), tmp_path_factory.mktemp("models") / "wan-image")


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Run a command in this process, in an empty folder and without the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*args: object) -> Result:
        from vidaccel.cli.main import app

        with warnings.catch_warnings():
            return CliRunner().invoke(app, [str(arg) for arg in args])

    return run


@pytest.fixture
def environment() -> dict[str, str]:
    """For commands in a process of their own."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def start(tmp_path: Path, environment: dict[str, str]) -> Callable[..., subprocess.Popen[str]]:
    def run(*args: object, **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "vidaccel", *map(str, args)]
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
        )

    return run


@pytest.fixture(scope="session")
def failed() -> Callable[..., None]:
    """A command ended with one line of error that holds these words, wrote no data and no traceback."""

    def check(result: Result, status: int, *words: str) -> None:
        assert result.exit_code == status, result.output
        assert not (result.exception and not isinstance(result.exception, SystemExit)), result.exception
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, result.stderr
        assert "Traceback" not in result.output
        assert result.stdout == ""
        for word in words:
            assert word in errors[0]

    return check
