"""Shared fixtures: tiny real pipelines, and fresh memory that is full of NaN."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny_pipelines
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of single tests."""
    parser.addoption("--write-matrix", action="store_true", help="write the support matrix of pipelines/README.md")


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """`torch.empty` gives NaN, so that a slot which nobody wrote is seen. Tests that measure time do without."""
    if request.node.get_closest_marker("slow") or request.node.get_closest_marker("gpu"):
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def wan() -> Any:
    """A tiny Wan 2.1 text-to-video pipeline."""
    return tiny_pipelines.wan()


@pytest.fixture
def make_wan() -> Callable[..., Any]:
    """Builds tiny Wan pipelines of any kind."""
    return tiny_pipelines.wan


# 7 latent frames of 8x8, and two sizes that 16 does not divide: 7 x 7x9 = 441 and 7 x 5x11 = 385 tokens.
SIZES = {"even": (128, 128), "ragged": (112, 144), "wide": (80, 176)}


@pytest.fixture
def render() -> Callable[..., torch.Tensor]:
    """Runs a pipeline on a fixed seed and gives its latents, such as (b, channels, frames, height, width)."""

    def run(pipe: Any, size: str = "even", *, steps: int = 4, frames: int = 25, **kwargs: Any) -> torch.Tensor:
        name = type(pipe).__name__
        height, width = (side * tiny_pipelines.SCALES.get(name, 1) for side in SIZES[size])
        possible = inspect.signature(pipe.__call__).parameters
        arguments: dict[str, Any] = {
            "prompt": "a cat",
            "negative_prompt": "bad",
            "height": height,
            "width": width,
            "num_frames": frames,
            "num_inference_steps": steps,
            "guidance_scale": 3.0,
            "max_sequence_length": 16,
            "output_type": "latent",
            "generator": torch.Generator().manual_seed(1),
        }
        arguments = {key: value for key, value in arguments.items() if key in possible}
        arguments |= tiny_pipelines.CALLS.get(name, {}) | kwargs
        given = {key: value for key, value in arguments.items() if value is not None}
        latents: torch.Tensor = pipe(**given).frames
        return latents

    return run
