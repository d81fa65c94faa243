"""The public function: what it refuses, what it chooses, and how it behaves inside a compiled model."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vidaccel import kernels
from vidaccel.blocks import BlockMask, Window
from vidaccel.errors import BackendError, MaskError
from vidaccel.grid import TokenLayout, VideoGrid
from vidaccel.kernels import Problem, attention, backends, canary, gluon
from vidaccel.kernels.attention import BACKENDS, choose
from vidaccel.kernels.problem import Rows
from vidaccel.trace import CallRecord, Trace


def test_exports() -> None:
    assert kernels.__all__ == sorted(kernels.__all__)
    assert all(hasattr(kernels, name) for name in kernels.__all__)


def test_importing_needs_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import vidaccel.kernels as k, torch; x = torch.ones(1, 4, 1, 16)"
    run = (
        f"{code}; print(float(k.attention(x, x, x)[0].sum()), k.backends(k.Problem(1, 1, 4, 4, 16, x.dtype, x.device)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", run], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("64.0")
    assert "triton is not installed" in done.stdout


def test_every_backend_gives_a_verdict() -> None:
    problem = Problem(1, 2, 64, 64, 16, torch.float32, torch.device("cpu"), block=16)
    verdicts = backends(problem)
    assert list(verdicts) == sorted(BACKENDS)
    assert verdicts["cpu"].ok
    assert verdicts["reference"].ok
    assert "no LSE" in verdicts["flex"].reason
    assert all(verdict.ok == (not verdict.reason) for verdict in verdicts.values())


def test_auto_says_once_what_it_chose(caplog: pytest.LogCaptureFixture) -> None:
    choose.cache_clear()
    problem = Problem(1, 2, 64, 64, 16, torch.float32, torch.device("cpu"), block=16)
    with caplog.at_level(logging.INFO, logger="vidaccel"):
        assert {choose(problem), choose(problem)} == {"cpu"}
    assert [record.getMessage().split(" runs ")[0] for record in caplog.records] == ["cpu"]


def test_auto_warns_with_reasons_where_only_the_reference_is_left(caplog: pytest.LogCaptureFixture) -> None:
    choose.cache_clear()
    problem = Problem(1, 2, 64, 64, 80, torch.float64, torch.device("cuda"), block=64)
    with caplog.at_level(logging.INFO, logger="vidaccel"):
        assert choose(problem) == "reference"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "not portable: " in record.getMessage()
    choose.cache_clear()


def test_a_named_backend_is_never_replaced(make_case: Callable[..., Any]) -> None:
    case = make_case()
    with pytest.raises(BackendError, match=r"backend='flex' was asked for.*no LSE.*one of cpu"):
        attention(case.q, case.k, case.v, case.mask, backend="flex")
    with pytest.raises(
        BackendError, match=r"there are auto, cpu, fa3, fa4, flashinfer, flex, gluon, portable, reference, tma"
    ):
        attention(case.q, case.k, case.v, case.mask, backend="fastest")


def test_refusals(make_case: Callable[..., Any]) -> None:
    case = make_case(grid=(3, 4, 5), text=20)
    q, k, v, mask = case.q, case.k, case.v, case.mask
    slots = q.shape[1]
    refused: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (BackendError, "they must be", (q[0], k, v), {}),
        (BackendError, "they must be", (q, k, v[:, 1:]), {}),
        (BackendError, "they must be", (q, k[..., :8], v[..., :8]), {}),
        (BackendError, "one float dtype", (q, k.double(), v), {}),
        (BackendError, "one float dtype", (q.int(), k.int(), v.int()), {}),
        (BackendError, "one device", (q, k.to("meta"), v), {}),
        (BackendError, "no_grad", (q.clone().requires_grad_(), k, v), {}),
        (BackendError, "above 0", (q, k, v), {"scale": 0.0}),
        (BackendError, "key_bias", (q, k, v), {"key_bias": torch.zeros(3, 1, slots)}),
        (BackendError, "key_bias", (q, k, v), {"key_bias": torch.zeros(slots)}),
        (BackendError, r"torch\.float32", (q, k, v), {"key_bias": torch.zeros(1, 1, slots).half()}),
        (BackendError, "no_grad", (q, k, v), {"key_bias": torch.zeros(1, 1, slots, requires_grad=True)}),
        (MaskError, "to_kernel", (q[:, :-40], k, v, mask), {}),
        (MaskError, "to_kernel", (q, k[:, :-40], v[:, :-40], mask), {}),
        (MaskError, "give 1 or as many", (*(torch.cat([x, x], 2) for x in (q, k, v)), mask), {}),
        (MaskError, r"mask\.to", (q, k, v, mask.to("meta")), {}),
        (MaskError, r"idx is torch\.int64", (q, k, v, dataclasses.replace(mask, idx=mask.idx.long())), {}),
        (MaskError, "k_len is torch.float32", (q, k, v, dataclasses.replace(mask, k_len=mask.lengths.float())), {}),
        (MaskError, "starts of rows", (q, k, v, dataclasses.replace(mask, ptr=mask.ptr[:-1])), {}),
    ]
    more = dataclasses.replace(
        mask, ptr=torch.cat([mask.ptr, mask.ptr[-1:]]), n_full=torch.cat([mask.n_full, mask.n_full[:1]])
    )
    refused.append((MaskError, "13 rows, 6 a head, was given for 2 heads", (q, k, v, more), {}))
    long = dataclasses.replace(mask.layout, q_len=mask.layout.q_len.long(), k_len=mask.layout.k_len)
    refused.append((MaskError, "q_len is torch.int64", (q, k, v, dataclasses.replace(mask, layout=long)), {}))
    per_sample = dataclasses.replace(mask, layout=mask.layout.with_valid_text(torch.tensor([1, 2, 3])))
    refused.append((MaskError, "with_valid_text", (q, k, v, per_sample), {}))
    window = make_case(grid=(3, 4, 5), window=2).mask
    short = window.window._replace(pos=window.window.pos[1:])
    tensors = tuple(x[:, :60] for x in (q, k, v))
    refused.append((MaskError, "layout.positions", (*tensors, dataclasses.replace(window, window=short)), {}))
    tables = window.window._replace(lo=window.window.axes()[0])
    refused.append(
        (
            MaskError,
            r"lo \(60, 3\) was given; it must be one torch.int32",
            (*tensors, dataclasses.replace(window, window=tables)),
            {},
        )
    )
    for error, words, args, kwargs in refused:
        with pytest.raises(error, match=words):
            attention(*args, **kwargs)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("sizes", [(4, 0, 2), (0, 4, 2), (0, 0, 2), (4, 4, 0)])
def test_nothing_to_attend_to_gives_zeros(backend: str, sizes: tuple[int, int, int]) -> None:
    lq, lk, heads = sizes
    out, lse = attention(
        torch.randn(1, lq, heads, 16), *(torch.randn(1, lk, heads, 16) for _ in range(2)), backend=backend
    )
    assert torch.equal(out, torch.zeros(1, lq, heads, 16))
    assert torch.equal(lse, torch.full((1, heads, lq), -torch.inf))


def test_lists_of_any_strides_are_read_as_what_they_hold(make_case: Callable[..., Any]) -> None:
    case = make_case(grid=(3, 4, 5), text=20)
    mask = case.mask

    def strided(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, torch.full_like(x, 99)], -1)[..., 0]

    spread = dataclasses.replace(mask, **{name: strided(getattr(mask, name)) for name in ("ptr", "idx", "n_full")})
    rows = Rows.of(spread)
    assert all(x.is_contiguous() for x in rows[:5])
    plain = attention(case.q, case.k, case.v, mask)
    for one, other in zip(attention(case.q, case.k, case.v, spread), plain, strict=True):
        assert torch.equal(one, other)


def test_a_bias_of_any_strides_reaches_the_kernel_key_by_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch alone needs a GPU; what it is given is looked at."""
    given: list[tuple[Any, ...]] = []
    monkeypatch.setattr(gluon, "_launch", lambda programs, values, *rest: given.append(values))
    monkeypatch.setattr(gluon, "_processors", lambda device: 4)
    for name in ("_tensor_map", "_blocks_map", "_ends_map"):
        monkeypatch.setattr(gluon, name, lambda *args: None)
    q = torch.randn(1, 256, 4, 64)
    bias = torch.randn(1, 256, 4).transpose(1, 2)
    gluon.run(q, q, q, None, 0.5, bias)
    passed = [x for x in given[0] if isinstance(x, torch.Tensor)][-1]
    assert passed.stride(-1) == 1
    assert torch.equal(passed, bias / 0.5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_defaults_that_somebody_set_change_nothing(
    make_case: Callable[..., Any], record: CallRecord, backend: str
) -> None:
    """Of dtype, of device and of what autocast computes in."""
    case = make_case(window=2, bias=(1, 1))
    plain = attention(case.q, case.k, case.v, **case.kwargs(backend))
    before = torch.get_default_dtype()
    for dtype, device, autocast in ((torch.bfloat16, "cpu", False), (before, "meta", False), (before, "cpu", True)):
        other = make_case(window=2, bias=(1, 1))
        assert record.trace is not None
        record.trace.checked.clear()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found = attention(other.q, other.k, other.v, **other.kwargs(backend))
        finally:
            torch.set_default_dtype(before)
        for one, true in zip(found, plain, strict=True):
            assert one.dtype == torch.float32
            assert torch.equal(one, true)
        assert len(record.trace.checked) == 1


def test_what_graphs_were_recorded_with_stays() -> None:
    first = Rows.dense(70, 70, 16, torch.device("cpu"))
    for n in range(40):
        Rows.dense(71 + n, 70, 16, torch.device("cpu"))
    assert Rows.dense(70, 70, 16, torch.device("cpu")) is first


def test_inference_may_carry_parameters(make_case: Callable[..., Any]) -> None:
    case = make_case()
    with torch.no_grad():
        attention(case.q.requires_grad_(), case.k, case.v, case.mask)


@pytest.fixture
def record() -> Iterator[CallRecord]:
    """A transformer call under way, as a front door makes one."""
    trace = Trace()
    call = CallRecord(0, 4, 999.0, "cond", None, VideoGrid(3, 4, 5), 0, trace=trace)
    call.scheduled = [("blocks.0.attn1", 0.5), ("blocks.1.attn1", 0.5)]
    trace.calls.append(call)
    call.open(torch.device("cpu"))
    yield call
    call.close()


def test_the_trace_hears_of_every_call_and_checks_the_first(make_case: Callable[..., Any], record: CallRecord) -> None:
    case = make_case()
    for seed in range(3):
        other = make_case(seed=seed)
        attention(other.q, other.k, other.v, other.mask)
    assert record.kernels == ["cpu"] * 3
    assert record.trace is not None
    assert len(record.trace.checked) == 1
    attention(case.q, case.k, case.v, case.mask, backend="reference")
    attention(case.q.double(), case.k.double(), case.v.double(), case.mask)
    assert len(record.trace.checked) == 3


def test_nan_in_the_input_is_not_the_kernels_fault(make_case: Callable[..., Any], record: CallRecord) -> None:
    case = make_case(density=1.0)
    case.v[:, 0] = torch.nan
    attention(*(torch.randn(1, 8, 2, 16) for _ in range(3)))
    with pytest.raises(BackendError, match=r"the input of the cpu kernel in blocks\.1\.attn1 .* has NaN"):
        attention(case.q, case.k, case.v, case.mask)


@pytest.mark.parametrize("sizes", [(1, 0, 4, 2), (0, 4, 4, 2), (1, 4, 4, 0), (1, 4, 0, 2)])
def test_nothing_is_not_checked(record: CallRecord, sizes: tuple[int, int, int, int]) -> None:
    b, lq, lk, heads = sizes
    out, _ = attention(torch.randn(b, lq, heads, 16), *(torch.randn(b, lk, heads, 16) for _ in range(2)))
    assert torch.equal(out, torch.zeros(b, lq, heads, 16))
    assert record.kernels == ["cpu"]


def test_products_beyond_fp16_are_no_nan(record: CallRecord) -> None:
    """Kernels add up in fp32, and logits are scaled."""
    q, k = torch.full((1, 8, 2, 128), 30.0).half(), torch.full((1, 8, 2, 128), 20.0).half()
    v = torch.randn(1, 8, 2, 128).half()
    assert (q @ k.transpose(-1, -2)).isinf().any()
    attention(q, k, v)
    assert record.trace is not None
    assert len(record.trace.checked) == 1


@pytest.mark.parametrize("kind", ["out", "lse", "nan"])
def test_a_wrong_result_is_named(make_case: Callable[..., Any], kind: str) -> None:
    case = make_case(dtype=torch.bfloat16, density=1.0)
    out, lse = attention(case.q, case.k, case.v, **case.kwargs("cpu"))
    problem = (case.q, case.k, case.v, case.rows, case.scale, None)
    canary.check(canary.compare(out, lse, *problem), "this kernel")
    if kind == "out":
        out = out + 0.1
    elif kind == "lse":
        lse = lse / 0.6931
    else:
        out = out.fill_(torch.nan)
    with pytest.raises(BackendError, match=f"this kernel is wrong: {'lse' if kind == 'lse' else 'out'} is off by"):
        canary.check(canary.compare(out, lse, *problem), "this kernel")


def test_one_graph_serves_every_mask() -> None:
    layout = TokenLayout.of((3, 5, 7), text=9, block=16, tile=(2, 2, 3))
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda q, k, v, m: attention(q * 2, k, v, m)[0] + 1, fullgraph=True, backend=backend)
    with torch.no_grad():
        for seed, density in enumerate((0.2, 0.4, 0.6, 0.8)):
            torch.manual_seed(seed)
            mask = BlockMask.of(torch.rand(2, layout.blocks, layout.blocks) < density, layout)
            q, k, v = (torch.randn(1, layout.slots, 2, 16) for _ in range(3))
            torch.testing.assert_close(compiled(q, k, v, mask), attention(q * 2, k, v, mask)[0] + 1)
    # The second mask has another number of blocks; torch then makes that number dynamic, once.
    assert len(graphs) <= 2


def test_one_graph_serves_every_window() -> None:
    layout = TokenLayout.of((3, 5, 7), text=9, block=16, tile=(2, 2, 3))
    every, position = torch.ones(layout.blocks, layout.blocks, dtype=torch.bool), layout.positions
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda q, k, v, m: attention(q * 2, k, v, m)[0] + 1, fullgraph=True, backend=backend)
    q, k, v = torch.randn(3, 1, layout.slots, 2, 16)
    with torch.no_grad():
        for cut in ([0, 1, 2], [1, 2], [0, 1], [2]):
            sides = (side[:, cut] for side in (position - 1, position + 2, position))
            window = Window.of(*sides, [layout.grid[axis] for axis in cut])
            mask = BlockMask.of(every, layout, partial=every, window=window)
            torch.testing.assert_close(compiled(q, k, v, mask), attention(q * 2, k, v, mask)[0] + 1)
    # The second window has other guards; torch then makes that number dynamic, once.
    assert len(graphs) <= 2


def test_the_op_keeps_torchs_rules(make_case: Callable[..., Any]) -> None:
    case = make_case(grid=(2, 4, 4), window=2, bias=(1, 1))
    q, k, v = (torch.randn_like(x) for x in (case.q, case.k, case.v))
    args = (q, k, v, *case.rows, torch.zeros(1, 1, q.shape[1]), 0.25, "auto")
    torch.library.opcheck(torch.ops.vidaccel.attention.default, args)


@pytest.mark.gpu
def test_gpu_compiled(make_case: Callable[..., Any]) -> None:
    compiled = torch.compile(lambda q, k, v, m: attention(q * 2, k, v, m, scale=0.3)[0], fullgraph=True)
    with torch.no_grad():
        for density in (0.2, 0.5, 0.8):
            case = make_case(grid=(4, 8, 9), block=64, d=64, density=density, dtype=torch.bfloat16, device="cuda")
            eager = attention(case.q * 2, case.k, case.v, case.mask, scale=0.3)[0]
            torch.testing.assert_close(compiled(case.q, case.k, case.v, case.mask), eager)


@pytest.mark.gpu
def test_gpu_auto_takes_the_fastest_kernel() -> None:
    problem = Problem(1, 2, 64, 64, 128, torch.bfloat16, torch.device("cuda", 0), block=64)
    assert choose(problem) == ("gluon" if torch.cuda.get_device_capability() == (9, 0) else "portable")
