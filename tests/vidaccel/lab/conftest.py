"""Real models made small: the stock classes, a few layers, a few channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from vidaccel.pipelines.zoo import RealModel, real_model

SMALL = {
    "wan2.1-14b": {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 3, "ffn_dim": 64, "text_dim": 32},
    "wan2.2-ti2v-5b": {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 3, "ffn_dim": 64},
    "hunyuan-video": {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "num_layers": 2,
        "num_single_layers": 3,
        "text_embed_dim": 32,
        "pooled_projection_dim": 16,
        "rope_axes_dim": (8, 12, 12),
    },
    "hunyuan-video-1.5": {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "num_layers": 3,
        "text_embed_dim": 32,
        "text_embed_2_dim": 32,
        "image_embed_dim": 16,
        "rope_axes_dim": (8, 12, 12),
    },
    "cogvideox-5b": {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 3, "text_embed_dim": 32},
    "cogvideox-1.5": {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 3, "text_embed_dim": 32},
}


def shrink(name: str) -> RealModel:
    model = real_model(name)
    # HunyuanVideo 1.5 has 729 image and 256 glyph tokens, whatever the prompt.
    text = {"text": 729 + 256 + 24, "valid": 16} if model.padded else {}
    return replace(model, config={**model.config, **SMALL[name]}, **text)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small() -> Callable[[str], RealModel]:
    """A released model with few and narrow layers."""
    return shrink


@pytest.fixture(params=sorted(SMALL))
def small_model(request: pytest.FixtureRequest) -> RealModel:
    """Every model."""
    return shrink(request.param)


@pytest.fixture(params=["wan2.1-14b", "hunyuan-video", "hunyuan-video-1.5", "cogvideox-1.5"])
def any_model(request: pytest.FixtureRequest) -> RealModel:
    """One model of each family."""
    return shrink(request.param)


@pytest.fixture
def wan_model() -> RealModel:
    return shrink("wan2.1-14b")


@pytest.fixture
def size_of() -> Callable[[RealModel], tuple[int, int, int]]:
    """Height, width and frames that make 5x8x8 latent tokens, whatever the strides."""

    def size(model: RealModel) -> tuple[int, int, int]:
        frames = (5 * model.patch[0] - 1) * model.vae[0] + 1
        return 8 * model.vae[1] * model.patch[1], 8 * model.vae[2] * model.patch[2], frames

    return size
