"""The Triton kernel on tensor maps, on every kind of trouble, against float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vidaccel.kernels import tma
from vidaccel.kernels.problem import Problem
from vidaccel.kernels.tensor_map import tensor_map

needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernel is compiled")


def check(case: Any) -> None:
    problem = Problem.of(case.q, case.k, case.rows, case.key_bias)
    verdict = tma.can_run(problem)
    assert verdict.ok, verdict.reason
    case.assert_right(tma.run(case.q, case.k, case.v, case.rows, case.scale, case.key_bias))


def larger(kind: dict[str, Any], block: int) -> dict[str, Any]:
    """A kind of trouble in larger blocks, with about as many of them."""
    t, y, x = kind.get("grid", (3, 4, 5))
    grid = (t, y, x) if (t, y, x) == (1, 1, 1) else (t, y, x * block // 16)
    return kind | {"grid": grid, "block": block, "tile": (1, 4, block // 4 - 1) if kind.get("tile") else None}


@needs_interpreter
def test_interpreted(make_case: Callable[..., Any], kind: dict[str, Any]) -> None:
    pytest.importorskip("triton")
    check(make_case(**larger(kind, 64), d=64, dtype=torch.float16))


@needs_interpreter
@pytest.mark.parametrize(("d", "block", "window"), [(128, 64, 1), (64, 128, 0), (128, 128, 2)])
def test_interpreted_in_bfloat16(make_case: Callable[..., Any], d: int, block: int, window: int) -> None:
    pytest.importorskip("triton")
    check(
        make_case(grid=(2, 7, 30), text=20, block=block, d=d, dtype=torch.bfloat16, heads=1, window=window, density=0.8)
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("masked", [False, True])
def test_keys_of_another_length_and_odd_strides(device: str, masked: bool) -> None:
    """Strides that TMA cannot read are copied."""
    pytest.importorskip("triton")
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("tested on the GPU")
    from vidaccel.kernels import attention
    from vidaccel.kernels.problem import Rows

    torch.manual_seed(0)
    q = torch.randn(2, 200, 3, 65, device=device).half()[..., 1:]
    k, v = (torch.randn(1, 150, 3, 64, device=device).half().expand(2, -1, -1, -1) for _ in range(2))
    rows = Rows.dense(200, 150, 64, q.device) if masked else None
    out, lse = tma.run(q, k, v, rows, 0.125, None)
    exact = attention(q.double(), k.double(), v.double(), backend="reference")
    low = attention(q, k, v, backend="reference")
    assert (out - exact[0]).abs().max() <= 2 * (low[0] - exact[0]).abs().max()
    torch.testing.assert_close(lse.double(), exact[1].double(), atol=1e-3, rtol=1e-4)


def test_maps_are_views_where_they_can_be() -> None:
    packed = torch.zeros(2, 30, 4, 3 * 64, dtype=torch.bfloat16)
    part = packed[..., 64:128]
    x, shape, strides, box = tensor_map(part, 64)
    assert x.data_ptr() == part.data_ptr()
    assert (shape, strides, box) == ([2, 4, 30, 64], [30 * 4 * 192, 192, 4 * 192, 1], [1, 1, 64, 64])
    for odd in (packed[..., 1:65], packed[:1].expand(2, -1, -1, -1)[..., :64], packed[..., :190:3]):
        x, shape, strides, _ = tensor_map(odd, 64)
        assert x.transpose(1, 2).is_contiguous()
        assert shape == list(x.shape)
    one = torch.zeros(1, 30, 1, 65, dtype=torch.float16)[:, ::2, :, :64]
    assert all(stride % 8 == 0 for stride in tensor_map(one, 64)[2][:3])


@pytest.mark.gpu
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("d", [64, 128])
def test_gpu(make_case: Callable[..., Any], kind: dict[str, Any], d: int, block: int) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    dtype = torch.bfloat16 if d == block else torch.float16
    check(make_case(**larger(kind, block), d=d, dtype=dtype, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("block", [64, 128])
def test_gpu_large_logits_and_many_tiles(make_case: Callable[..., Any], block: int) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    case = make_case(grid=(12, 16, 17), text=77, block=block, heads=5, d=128, dtype=torch.bfloat16, device="cuda")
    check(dataclasses.replace(case, q=case.q * 50))
