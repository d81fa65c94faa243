"""Shared fixtures: tiny real pipelines, and fresh memory that is full of NaN."""

from __future__ import annotations

import gc
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


@pytest.fixture(autouse=True)
def gpu_memory_is_shared(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test took of the GPU goes back before the next one: other workers run on the same GPU."""
    yield
    if request.node.get_closest_marker("gpu") and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def wan() -> Any:
    """A tiny Wan 2.1 text-to-video pipeline."""
    return tiny_pipelines.wan()


@pytest.fixture
def make_wan() -> Callable[..., Any]:
    """Builds tiny Wan pipelines of any kind."""
    return tiny_pipelines.wan


@pytest.fixture
def render() -> Callable[..., torch.Tensor]:
    """Runs a pipeline on a fixed seed and gives its latents, such as (b, channels, frames, height, width)."""
    return tiny_pipelines.render
