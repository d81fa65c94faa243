"""Samples that leave their autoencoder to wan-tiny: complete for who asks for the shared part, refused otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline

from samples.models.shared import autoencoder, shared_parts
from samples.train import cogvideox, joint, parts
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
