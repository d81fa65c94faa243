"""On a GPU: kernels inside the pipelines of every family, offload with a real device, inductor."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_pipelines
import torch

import vidaccel
from vidaccel.patterns import Radial, TopK
from vidaccel.schedule import Schedule

pytestmark = pytest.mark.gpu

RADIAL = Radial(block=64)
SCHEDULE = Schedule(dense_steps=1, dense_layers=1)
FRAMES = 49  # 13 latent frames of 8x8 and of ragged sizes: 13 tiles of 64 or more


def cuda_wan(make_wan: Any, dtype: torch.dtype = torch.bfloat16, **kwargs: Any) -> Any:
    return make_wan(head_dim=64, **kwargs).to("cuda", dtype)


def accelerate(pipe: Any) -> Any:
    return vidaccel.accelerate(pipe, RADIAL, density=0.5, schedule=SCHEDULE)


@pytest.mark.parametrize("size", ["even", "ragged", "wide"])
def test_equals_stock_with_dense_mask_in_fp32(make_wan: Any, assert_equals_masked_stock: Any, size: str) -> None:
    pipe = cuda_wan(make_wan, torch.float32)
    run = accelerate(pipe)
    assert_equals_masked_stock(pipe, run, size, tolerance=5e-3, frames=FRAMES)
    assert {name for call in run.trace.calls for name in call.kernels} == {"portable"}


@pytest.mark.parametrize("pattern", [RADIAL, TopK(block=64)], ids=lambda pattern: pattern.name)
@pytest.mark.parametrize("family", ["hunyuan", "hunyuan15", "cogvideox", "mochi", "ltx", "skyreels"])
def test_every_family_equals_stock(assert_equals_masked_stock: Any, render: Any, family: str, pattern: Any) -> None:
    """In fp32; in bf16 the error is that of the stock pipeline, unless rounding makes a pattern choose otherwise."""
    kinds = (torch.float32, torch.bfloat16)
    exact, low = (getattr(tiny_pipelines, family)(head_dim=64).to("cuda", dtype) for dtype in kinds)
    frames = 2 * FRAMES if family in ("mochi", "ltx") else FRAMES
    given = {"num_frames": frames - frames % 12 + 1, "steps": 2}
    stock_error = (render(low, **given).float() - render(exact, **given).float()).norm()
    settings: dict[str, Any] = {"density": 0.5, "schedule": Schedule(dense_steps=1)}
    with vidaccel.accelerate(exact, pattern, **settings), vidaccel.accelerate(low, pattern, **settings) as run:
        video = render(low, **given).float()
        error = (video - render(exact, **given).float()).norm()
        assert "reference" not in {name for call in run.trace.calls for name in call.kernels}
    assert video.isfinite().all()
    if pattern is RADIAL:
        assert error <= 2 * stock_error
    run = vidaccel.accelerate(exact, pattern, **settings)
    assert_equals_masked_stock(exact, run, "ragged", tolerance=5e-3, **given)


def test_bf16_error_is_that_of_the_stock_pipeline(make_wan: Any, render: Any) -> None:
    """Against the fp32 run of the same plan: at most twice the error of the stock pipeline in bf16 against its own."""
    exact, low = cuda_wan(make_wan, torch.float32), cuda_wan(make_wan)
    stock_error = (render(low, frames=FRAMES).float() - render(exact, frames=FRAMES)).norm()
    with accelerate(exact), accelerate(low):
        ours_error = (render(low, frames=FRAMES).float() - render(exact, frames=FRAMES)).norm()
    assert ours_error <= 2 * stock_error


def test_same_seed_same_video(make_wan: Any, render: Any) -> None:
    pipe = cuda_wan(make_wan)
    with accelerate(pipe):
        first = render(pipe, frames=FRAMES)
        assert all(torch.equal(render(pipe, frames=FRAMES), first) for _ in range(3))


@pytest.mark.parametrize("order", ["offload first", "accelerate first"])
@pytest.mark.parametrize("kind", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offload(make_wan: Any, render: Any, order: str, kind: str) -> None:
    resident = cuda_wan(make_wan)
    with accelerate(resident):
        expected = render(resident, frames=FRAMES)
    pipe = make_wan(head_dim=64).to(dtype=torch.bfloat16)
    if order == "offload first":
        getattr(pipe, kind)()
    with accelerate(pipe) as run:
        if order == "accelerate first":
            getattr(pipe, kind)()
        for _ in range(2):
            torch.testing.assert_close(render(pipe, frames=FRAMES).cpu(), expected.cpu(), atol=0.05, rtol=0.05)
        assert all(len(call.kernels) == len(call.scheduled) for call in run.trace.calls)
        assert sum(len(call.kernels) for call in run.trace.calls) == 2 * 3 * 2 * 2


def test_compiled_with_inductor(make_wan: Any, render: Any) -> None:
    pipe = cuda_wan(make_wan, layers=9)
    sizes = ("even", "ragged")
    with accelerate(pipe) as run:
        expected = {size: render(pipe, size, frames=FRAMES) for size in sizes}
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
        for size in sizes:
            error = (render(pipe, size, frames=FRAMES).float() - expected[size].float()).norm()
            assert error <= 0.05 * expected[size].float().norm()
        assert all(len(call.kernels) == len(call.scheduled) for call in run.trace.calls)


def test_report_times_come_from_the_gpu(make_wan: Any, render: Any) -> None:
    pipe = cuda_wan(make_wan)
    with accelerate(pipe) as run:
        render(pipe, frames=FRAMES)
    summary = run.report().summary
    assert summary["transformer_ms"] > 0
    assert sum(summary["kernels"].values()) == 3 * 2 * 2
    assert "reference" not in summary["kernels"]
