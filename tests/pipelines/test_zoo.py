"""The table of released models against what was published about them."""

from __future__ import annotations

import json

import pytest
import torch

from vidaccel import _samples
from vidaccel.errors import UsageError
from vidaccel.pipelines.zoo import REAL_MODELS, parameters, real_model

# Latent tokens of the default sizes: model cards and pipelines' own defaults.
GRIDS = {
    "wan2.1-1.3b": (21, 30, 52),
    "wan2.1-14b": (21, 45, 80),
    "wan2.2-ti2v-5b": (31, 22, 40),
    "hunyuan-video": (33, 45, 80),
    "hunyuan-video-1.5": (31, 45, 80),
    "cogvideox-5b": (13, 30, 45),
    "cogvideox-1.5": (11, 48, 85),
}


@pytest.mark.parametrize("name", sorted(REAL_MODELS))
def test_parameters_as_published(name: str) -> None:
    assert parameters(real_model(name)) / 1e9 == pytest.approx(real_model(name).parameters, rel=0.01)


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_grids_as_published(name: str) -> None:
    model = real_model(name)
    grid = model.grid(*model.size)
    assert grid == GRIDS[name]
    latents = model.inputs(grid, "cpu", torch.bfloat16)["hidden_states"]
    assert latents.numel() == model.batch * grid.tokens * model.config["in_channels"] * torch.tensor(model.patch).prod()


def test_wan_tiny_is_the_sample() -> None:
    config = json.loads((_samples.path("wan-tiny") / "transformer" / "config.json").read_text())
    for key, value in real_model("wan-tiny").config.items():
        assert config.get(key, value) == (list(value) if isinstance(value, tuple) else value)


@pytest.mark.parametrize("size", [(721, 1280, 81), (720, 1281, 81), (720, 1280, 80), (0, 1280, 81)])
def test_sizes_that_do_not_fit(size: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match=r"takes (multiples of 16|4k\+1)"):
        real_model("wan2.1-14b").grid(*size)


def test_unknown_models_are_told_the_known_ones() -> None:
    with pytest.raises(UsageError, match="hunyuan-video"):
        real_model("sora")
