"""torch.compile, in either order: few graphs, no break, the same video."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_pipelines
import torch
from torch._dynamo.testing import CompileCounter

import vidaccel
from vidaccel.patterns import Radial, TopK
from vidaccel.schedule import Schedule

RADIAL = Radial(block=16)
# Step 0 dense; then two densities, so that plans of different lengths follow one another.
SCHEDULE = Schedule(dense_steps=1, dense_layers=1, branch={"uncond": 0.3})


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("order", ["compile first", "accelerate first"])
def test_repeated_blocks_fullgraph(make_wan: Any, render: Any, order: str) -> None:
    """At most one dense and two sparse graphs a resolution, whatever the layers, steps and plans."""
    pipe, counter = make_wan(layers=9), CompileCounter()
    with vidaccel.accelerate(pipe, RADIAL, density=0.5, schedule=SCHEDULE):
        expected = {size: render(pipe, size, steps=2) for size in ("even", "ragged")}
    if order == "compile first":
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    with vidaccel.accelerate(pipe, RADIAL, density=0.5, schedule=SCHEDULE) as run:
        if order == "accelerate first":
            pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
        seen = 0
        for size in ("even", "ragged"):
            first = render(pipe, size, steps=2)
            torch.testing.assert_close(first, expected[size], atol=1e-5, rtol=1e-4)
            assert counter.frame_count - seen <= 3, f"{counter.frame_count - seen} graphs for one resolution"
            seen = counter.frame_count
            assert torch.equal(render(pipe, size, steps=2), first)
            assert counter.frame_count == seen, "a second render compiled again"
        assert all(len(call.kernels) == len(call.scheduled) for call in run.trace.calls)
        assert any(call.kernels for call in run.trace.calls)


@pytest.mark.slow
def test_joint_blocks_that_choose(render: Any) -> None:
    """A pattern that chooses from q and k, in blocks with text beside the video."""
    pipe, counter = tiny_pipelines.hunyuan(), CompileCounter()
    pattern, schedule = TopK(block=16), Schedule(dense_steps=1)
    with vidaccel.accelerate(pipe, pattern, density=0.5, schedule=schedule):
        expected = render(pipe, "ragged")
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    with vidaccel.accelerate(pipe, pattern, density=0.5, schedule=schedule) as run:
        torch.testing.assert_close(render(pipe, "ragged"), expected, atol=1e-5, rtol=1e-4)
        assert counter.frame_count > 0
        assert all(len(call.kernels) == len(call.scheduled) for call in run.trace.calls)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["compile first", "accelerate first"])
def test_whole_model(wan: Any, render: Any, order: str) -> None:
    """The front door sees every call through torch.compile(transformer)."""
    with vidaccel.accelerate(wan, RADIAL, density=0.5, schedule=SCHEDULE):
        expected = render(wan)
    counter, plain = CompileCounter(), wan.transformer
    compiled = torch.compile(plain, backend=counter)
    if order == "compile first":
        wan.transformer = compiled
    with vidaccel.accelerate(wan, RADIAL, density=0.5, schedule=SCHEDULE) as run:
        wan.transformer = compiled
        torch.testing.assert_close(render(wan), expected, atol=1e-5, rtol=1e-4)
        assert len(run.trace.calls) == 8
        assert all(len(call.kernels) == len(call.scheduled) for call in run.trace.calls)
        compilations = counter.frame_count
        render(wan)
        assert counter.frame_count == compilations, "a second render compiled again"
    assert compilations > 0
    assert not plain._forward_hooks


@pytest.mark.slow
def test_removal_after_a_compiled_run_is_seen(wan: Any, render: Any) -> None:
    stock = render(wan)
    wan.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    with vidaccel.accelerate(wan, RADIAL, density=0.4):
        assert (render(wan) - stock).abs().max() > 1e-3
    torch.testing.assert_close(render(wan), stock, atol=1e-6, rtol=1e-5)
