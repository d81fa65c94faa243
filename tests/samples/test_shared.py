"""Samples that leave parts out of their folders: complete for who asks for these parts, refused otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline
from transformers import UMT5EncoderModel

from samples.models import path
from samples.models.shared import autoencoder, leave_out, shared_parts, text_encoder
from samples.train import cogvideox, hunyuan, joint, parts
from vidaccel.render import RenderJob, find, open_pipeline, render


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = parts.build_tokenizer()
    pipe = CogVideoXPipeline(
        tokenizer,
        parts.build_text_encoder(len(tokenizer)),
        autoencoder(),
        cogvideox.build_transformer(1),
        parts.build_scheduler(),
    )
    folder = tmp_path_factory.mktemp("sample")
    joint.write(pipe, folder, cogvideox.DEFAULTS)
    return folder


def test_the_folder_holds_no_weights_of_the_shared_part_and_says_whose_they_are(folder: Path) -> None:
    assert [file.name for file in (folder / "vae").iterdir()] == ["config.json"]
    assert json.loads((folder / "vae" / "config.json").read_text())["shared_with"] == "wan-tiny"
    with pytest.raises(ValueError, match="vae"):
        CogVideoXPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe = CogVideoXPipeline.from_pretrained(folder, **shared_parts(folder), dtype=torch.float32)
    for name, weights in autoencoder().state_dict().items():
        assert torch.equal(pipe.vae.state_dict()[name], weights), name


def test_no_sample_says_where_it_was_made() -> None:
    files = [file for file in path("hunyuan-tiny").parent.rglob("*.json") if "/reports/" not in file.as_posix()]
    assert len(files) > 20
    for file in files:
        settings = json.loads(file.read_text())
        assert not isinstance(settings, dict) or "_name_or_path" not in settings, file


def test_only_a_folder_that_names_the_owner_gets_the_part(folder: Path, tmp_path: Path) -> None:
    assert not shared_parts(tmp_path)
    (tmp_path / "vae").mkdir()
    config = json.loads((folder / "vae" / "config.json").read_text())
    del config["shared_with"]
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    assert not shared_parts(tmp_path)


def test_it_renders_from_the_command_lines_own_opening(folder: Path) -> None:
    model = find(str(folder))
    assert tuple(model.grid(256, 256, 33)) == (9, 16, 16)
    job = RenderJob("a red circle", str(folder), height=64, width=64, num_frames=5, num_inference_steps=1, seed=0)
    job = job.complete(model)
    assert job.guidance_scale == cogvideox.DEFAULTS["guidance_scale"]
    frames = render(open_pipeline(job, model), job).frames
    assert tuple(frames.shape) == (5, 64, 64, 3)


def test_layers_that_nothing_reads_are_made_and_not_stored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = parts.build_text_encoder(20, layers=3).eval()
    for parameter in encoder.encoder.block[1:].parameters():
        torch.nn.init.zeros_(parameter)
    encoder.save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "vae").mkdir()
    for name in ("model_index.json", "vae/config.json"):
        (tmp_path / name).write_text("{}")
    file = tmp_path / "text_encoder" / "model.safetensors"
    before = file.stat().st_size
    leave_out(tmp_path, unread=2)
    assert file.stat().st_size < 0.6 * before
    assert json.loads((tmp_path / "model_index.json").read_text())["text_encoder"] == [None, None]
    again = text_encoder(tmp_path)
    assert again.config.num_layers == 3
    ids = torch.arange(3, 9)[None]
    states = [one(ids, output_hidden_states=True).hidden_states for one in (encoder, again)]
    assert all(torch.equal(*pair) for pair in zip(*states, strict=True))


@pytest.mark.parametrize("name", ["hunyuan-tiny", "cogvideox-tiny"])
def test_a_sample_fits_into_six_mebibytes_with_its_reports(name: str) -> None:
    assert sum(file.stat().st_size for file in path(name).rglob("*") if file.is_file()) <= 6 * 2**20


def test_hunyuan_tiny_reads_the_last_layer_that_it_stores() -> None:
    encoder = shared_parts(path("hunyuan-tiny"))["text_encoder"]
    assert isinstance(encoder, UMT5EncoderModel)
    unread = [block.layer[0].SelfAttention.q.weight.abs().max().item() for block in encoder.encoder.block]
    assert [largest == 0 for largest in unread] == [False, False] + hunyuan.UNREAD * [True]
