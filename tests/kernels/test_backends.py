"""Every backend on every kind of trouble, against float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vidaccel.blocks import BlockMask
from vidaccel.grid import TokenLayout
from vidaccel.kernels import attention, gluon
from vidaccel.kernels.canary import error_budget, largest_error
from vidaccel.window import Window


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpu(make_case: Callable[..., Any], kind: dict[str, object], dtype: torch.dtype) -> None:
    case = make_case(**kind, dtype=dtype)
    case.assert_right(attention(case.q, case.k, case.v, **case.kwargs("cpu")))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_cpu_other_dtypes(make_case: Callable[..., Any], dtype: torch.dtype) -> None:
    # 600 keys: torch's own kernel reads an fp32 mask of fp64 tensors wrongly from 512 keys on.
    case = make_case(grid=(6, 10, 10), density=0.9, window=2, bias=(1, 1), dtype=dtype)
    case.assert_right(attention(case.q, case.k, case.v, **case.kwargs("cpu")))


def test_cpu_in_parts_and_without_kept_windows(make_case: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from vidaccel.kernels import cpu, gather

    monkeypatch.setattr(cpu, "CHUNK_BYTES", 1)
    monkeypatch.setattr(gather, "KEPT_WINDOW_BYTES", 0)
    for shared in (False, True):
        case = make_case(grid=(3, 5, 5), tile=(2, 2, 3), window=2, shared=shared, bias=(1, 2), heads=2)
        case.assert_right(attention(case.q, case.k, case.v, **case.kwargs("cpu")))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)),
    text=st.integers(0, 40),
    block=st.sampled_from([16, 32]),
    tile=st.sampled_from([None, (1, 2, 5), (2, 2, 2), (1, 4, 4)]),
    heads=st.integers(1, 3),
    shared=st.booleans(),
    density=st.floats(0, 1),
    window=st.integers(0, 2),
    lengths=st.booleans(),
    seed=st.integers(0, 99),
)
def test_cpu_on_anything(make_case: Callable[..., Any], **kwargs: Any) -> None:
    case = make_case(**kwargs)
    case.assert_right(attention(case.q, case.k, case.v, **case.kwargs("cpu")))


@pytest.mark.parametrize("backend", ["reference", "cpu", "portable"])
@pytest.mark.parametrize("bias", [None, (1, 1), (2, 3)])
def test_no_mask(make_dense: Callable[..., Any], backend: str, bias: tuple[int, int] | None) -> None:
    if backend == "portable" and torch.cuda.is_available():
        pytest.skip("tested on the GPU")
    case = make_dense(bias)
    case.assert_right(attention(case.q, case.k, case.v, **case.kwargs(backend)))


# The interpreter takes milliseconds for each tile, so each kind is run once, in the precision that tells most.
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernel is compiled")


@needs_interpreter
def test_portable_interpreted(make_case: Callable[..., Any], kind: dict[str, object]) -> None:
    pytest.importorskip("triton")
    case = make_case(**kind)
    case.assert_right(attention(case.q, case.k, case.v, **case.kwargs("portable")))


@needs_interpreter
@pytest.mark.parametrize("window", [0, 1, 2])
def test_portable_interpreted_bias_of_any_strides(make_case: Callable[..., Any], window: int) -> None:
    pytest.importorskip("triton")
    case = make_case(window=window, bias=(1, 2))
    apart = case.key_bias.transpose(1, 2).contiguous().transpose(1, 2)
    for bias in (apart, torch.full((1, 1, 1), 0.5).expand(1, 2, case.k.shape[1])):
        other = dataclasses.replace(case, key_bias=bias)
        other.assert_right(attention(other.q, other.k, other.v, **other.kwargs("portable")))


@needs_interpreter
@pytest.mark.parametrize(
    ("dtype", "block", "d"),
    [(torch.float16, 64, 64), (torch.float16, 128, 32), (torch.bfloat16, 32, 32), (torch.float32, 128, 16)],
    ids=str,
)
def test_portable_interpreted_dtypes_and_blocks(
    make_case: Callable[..., Any], dtype: torch.dtype, block: int, d: int
) -> None:
    pytest.importorskip("triton")
    case = make_case(grid=(2, 7, 11), block=block, d=d, dtype=dtype, heads=1, window=2, density=0.8)
    case.assert_right(attention(case.q, case.k, case.v, **case.kwargs("portable")))


@pytest.mark.parametrize(
    "backend",
    ["cpu", pytest.param("portable", id="portable-interpreted")]
    + [pytest.param(name, marks=pytest.mark.gpu, id=f"{name}-gpu") for name in ("portable", "tma", "gluon")],
)
def test_a_window_that_takes_all_bits(
    make_case: Callable[..., Any], request: pytest.FixtureRequest, backend: str
) -> None:
    """The sign too."""
    on_gpu = request.node.get_closest_marker("gpu") is not None
    if backend == "portable" and not on_gpu:
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("tested on the GPU")
    if backend == "gluon":
        needs_hopper()
    block, d = (128, 64) if on_gpu else (16, 16)
    # Kinds of blocks are drawn in any case; what partial ones keep is another matter here.
    case = make_case(grid=(3, 4, 5 * block // 16), block=block, d=d, window=1, dtype=torch.float16)
    place = case.mask.layout.positions * torch.tensor([127, 85, 5])
    extents, length = (255, 255, 1023), torch.tensor([40, 100, 30])
    window = Window.of(place - length // 2, place - length // 2 + length, place, extents)
    assert window.hi is None
    assert window.guards < 0
    mask = dataclasses.replace(case.mask, window=window)
    device = "cuda" if on_gpu else "cpu"
    case = dataclasses.replace(case, mask=mask.to(device), **{x: getattr(case, x).to(device) for x in "qkv"})
    case.assert_right(attention(case.q, case.k, case.v, **case.kwargs(backend)))


def needs_hopper() -> None:
    """The Gluon kernel runs on nothing else; where it should run and cannot, the tests fail."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")


def larger(kind: dict[str, Any], block: int) -> dict[str, Any]:
    """A kind of trouble in larger blocks, with about as many of them."""
    t, y, x = kind.get("grid", (3, 4, 5))
    grid = (t, y, x) if (t, y, x) == (1, 1, 1) else (t, 2 * y, x * block // 32)
    return kind | {"grid": grid, "block": block, "tile": (1, 4, block // 4 - 1) if kind.get("tile") else None}


@pytest.mark.parametrize("block", [32, 128])
def test_cpu_in_larger_blocks(make_case: Callable[..., Any], kind: dict[str, Any], block: int) -> None:
    case = make_case(**larger(kind, block))
    case.assert_right(attention(case.q, case.k, case.v, **case.kwargs("cpu")))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "d", "block"),
    [
        (torch.bfloat16, 128, 128),
        (torch.bfloat16, 64, 64),
        (torch.float16, 64, 128),
        (torch.float16, 16, 16),
        (torch.float32, 32, 32),
    ],
    ids=str,
)
def test_gpu(make_case: Callable[..., Any], kind: dict[str, Any], dtype: torch.dtype, d: int, block: int) -> None:
    case = make_case(**larger(kind, block), d=d, dtype=dtype, device="cuda")
    case.assert_right(attention(case.q, case.k, case.v, **case.kwargs("portable")))


@pytest.mark.gpu
@pytest.mark.parametrize(("d", "block"), list(gluon.CONFIGS))
def test_gpu_gluon(make_case: Callable[..., Any], kind: dict[str, Any], d: int, block: int) -> None:
    needs_hopper()
    dtype = torch.bfloat16 if d == block else torch.float16
    case = make_case(**larger(kind, block), d=d, dtype=dtype, device="cuda")
    case.assert_right(attention(case.q, case.k, case.v, **case.kwargs("gluon")))


@pytest.mark.gpu
@pytest.mark.parametrize(("d", "block"), list(gluon.CONFIGS))
def test_gpu_gluon_blocks_that_hold_nothing(d: int, block: int) -> None:
    """Lists may name them. Nothing lies before the values, where their tensor map begins."""
    needs_hopper()
    generator = torch.Generator("cuda").manual_seed(0)
    layout = TokenLayout.of((4, 16, 16), 2 * block, block).with_valid_text(torch.tensor([0]))
    mask = BlockMask.of(torch.ones(1, layout.blocks, layout.blocks, dtype=torch.bool), layout).to("cuda")
    shape = (1, layout.slots, 2, d)
    q, k = (torch.randn(shape, device="cuda", generator=generator).bfloat16() for _ in range(2))
    # An allocation of its own.
    v = torch.randn(64 << 20, device="cuda", generator=generator).bfloat16()[: q.numel()].view(shape)
    v[:, layout.grid.tokens :] = torch.nan
    out, lse = attention(q, k, v, mask, backend="gluon")
    there = slice(layout.grid.tokens)
    true, true_lse = attention(q.double(), k[:, there].double(), v[:, there].double(), backend="reference")
    near, _ = attention(q, k[:, there], v[:, there], backend="reference")
    assert largest_error(out.double(), true) <= error_budget(true, near, torch.bfloat16)
    assert (lse - true_lse).abs().max() < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize(("d", "block"), list(gluon.CONFIGS))
@pytest.mark.parametrize("seed", range(6))
def test_gpu_gluon_on_anything(make_case: Callable[..., Any], d: int, block: int, seed: int) -> None:
    """More tiles than processors, so that the rings go round and programs draw several tiles.

    Seed 2 has windows of one length, 3 a bias, 5 a bias and windows of two lengths.
    """
    needs_hopper()
    generator = torch.Generator().manual_seed(seed)
    t, y, x = (int(n) for n in torch.randint(5, 15, (3,), generator=generator))
    case = make_case(
        grid=(2 * t, y, 2 * x), text=7 * seed, block=block, d=d, heads=5,
        batch=1 + seed % 2,
        density=0.15 * (seed + 1), shared=seed == 4, lengths=seed % 3 == 1, window=seed // 2 if seed % 3 == 2 else 0,
        bias=(1, 5) if seed in (3, 5) else None, dtype=torch.bfloat16, device="cuda", seed=seed,
    )  # fmt: skip
    case.assert_right(attention(case.q, case.k, case.v, **case.kwargs("gluon")))


@pytest.mark.gpu
@pytest.mark.parametrize(("d", "block"), list(gluon.CONFIGS))
def test_gpu_gluon_large_logits(make_case: Callable[..., Any], d: int, block: int) -> None:
    needs_hopper()
    case = make_case(grid=(6, 16, 16), block=block, d=d, dtype=torch.float16, device="cuda")
    case = dataclasses.replace(case, q=case.q * 50)
    case.assert_right(attention(case.q, case.k, case.v, **case.kwargs("gluon")))


@pytest.mark.gpu
def test_gpu_gluon_no_mask_and_odd_strides() -> None:
    """Strides that TMA cannot read are copied; keys of another length than queries."""
    needs_hopper()
    torch.manual_seed(0)
    q = torch.randn(2, 700, 3, 65, device="cuda").bfloat16()[..., 1:]
    k, v = (torch.randn(1, 333, 3, 64, device="cuda").bfloat16().expand(2, -1, -1, -1) for _ in range(2))
    out, lse = attention(q, k, v, backend="gluon")
    exact = attention(q.double(), k.double(), v.double(), backend="reference")
    low = attention(q, k, v, backend="reference")
    assert (out - exact[0]).abs().max() <= 2 * (low[0] - exact[0]).abs().max()
    torch.testing.assert_close(lse.double(), exact[1].double(), atol=1e-3, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [None, (2, 3)])
def test_gpu_no_mask(make_dense: Callable[..., Any], bias: tuple[int, int] | None) -> None:
    case = make_dense(bias, "cuda", torch.float16)
    case.assert_right(attention(case.q, case.k, case.v, **case.kwargs("portable")))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["partial", "valid text", "bias", "nothing"], indirect=True)
def test_gpu_flex(make_case: Callable[..., Any], kind: dict[str, Any]) -> None:
    torch.compiler.reset()
    case = make_case(**larger(kind, 128), d=64, dtype=torch.bfloat16, device="cuda")
    case.assert_right(attention(case.q, case.k, case.v, **case.kwargs("flex")))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["gluon", "portable"])
def test_gpu_beyond_32_bit_offsets(make_case: Callable[..., Any], backend: str) -> None:
    """q, k and v are views into one buffer, 2^31 elements and more from its start."""
    case = make_case(grid=(4, 8, 8), block=64, d=128, batch=2, dtype=torch.bfloat16, device="cuda")
    far = []
    for x in (case.q, case.k, case.v):
        apart = torch.empty(2, 2**31 + 2**20, dtype=x.dtype, device="cuda")
        view = apart[:, -x[0].numel() :].view(2, *x.shape[1:])
        far.append(view.copy_(x))
    result = attention(*far, **case.kwargs(backend))
    case.assert_right(result)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["gluon", "portable"])
def test_gpu_needs_no_synchronisation(make_case: Callable[..., Any], backend: str) -> None:
    case = make_case(grid=(4, 8, 8), block=64, d=128, window=1, dtype=torch.bfloat16, device="cuda")
    call = lambda: attention(case.q, case.k, case.v, **case.kwargs(backend))  # noqa: E731
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["gluon", "portable"])
def test_gpu_is_deterministic(make_case: Callable[..., Any], backend: str) -> None:
    case = make_case(grid=(4, 16, 16), block=128, d=128, dtype=torch.bfloat16, device="cuda")
    first = attention(case.q, case.k, case.v, **case.kwargs(backend))
    for _ in range(20):
        again = attention(case.q, case.k, case.v, **case.kwargs(backend))
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["gluon", "portable"])
@pytest.mark.parametrize("block", [64, 128])
def test_gpu_real_length(block: int, backend: str) -> None:
    """32,760 tokens, which no block divides; sampled rows are compared."""
    from vidaccel.kernels import bench, canary
    from vidaccel.kernels.problem import Rows

    case = bench.Case("Wan 480p", (21, 30, 52), 0, 8, 128, block, 0.25, "bfloat16")
    q, k, v, mask = case.tensors("cuda")
    out, lse = attention(q, k, v, mask, backend=backend)
    assert all(x.ok for x in canary.compare(out, lse, q, k, v, Rows.of(mask), q.shape[-1] ** -0.5, None))
