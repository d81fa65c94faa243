"""Adapters to other projects' kernels: their lists on a CPU, their results on a GPU where the package is installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
import torch

from vidaccel.kernels import external, fa3, fa4, flashinfer
from vidaccel.kernels.problem import Problem

ADAPTERS = {"fa3-fwd": fa3, "flash-attn-4": fa4, "flashinfer-python": flashinfer}


def needs(package: str) -> None:
    try:
        version(package)
    except PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")


@pytest.mark.parametrize("package", ADAPTERS)
def test_say_why_not(package: str) -> None:
    problem = Problem(1, 2, 256, 256, 64, torch.bfloat16, torch.device("cpu"), block=64)
    verdict = ADAPTERS[package].can_run(problem)
    assert not verdict.ok
    assert package in verdict.reason or "GPU" in verdict.reason


@pytest.mark.parametrize("case", [{}, {"text": 20}, {"lengths": True}, {"shared": True, "batch": 2, "valid": [3, 20]}])
def test_lists_of_whole_and_short_blocks(make_case: Callable[..., Any], case: dict[str, Any]) -> None:
    if "valid" in case:
        case = case | {"text": 20}
    rows = make_case(grid=(3, 5, 7), **case).rows
    lk = rows.block * (rows.k_blocks - 1) + 9
    whole, ruled, token = fa4.lists(rows, lk)
    kept = external.kept_blocks(rows)
    # Every kept block stands in one of the lists, in rising order.
    for head in range(kept.shape[0]):
        for row in range(kept.shape[1]):
            found = [x[1][0, head, row, : int(x[0][0, head, row])].tolist() for x in (whole, ruled)]
            assert sorted(found[0] + found[1]) == kept[head, row].nonzero()[:, 0].tolist()
            assert found == [sorted(x) for x in found]
            if token is not None:
                ends = [(j + 1) * rows.block for j in found[0]]
                assert all(end <= lk and bool(token[:, end - rows.block : end].all()) for end in ends)
    if token is None:
        assert bool(external.filled(rows.k_len.reshape(-1, rows.k_blocks), rows.block, lk).all())
    else:
        lengths = rows.k_len.reshape(-1, rows.k_blocks)
        starts = torch.arange(rows.k_blocks) * rows.block
        assert torch.equal(token.sum(1), torch.minimum(lengths, lk - starts).clamp(min=0).sum(1))


def test_a_cut_last_block_needs_no_rule(make_case: Callable[..., Any]) -> None:
    rows = make_case(grid=(3, 5, 7)).rows
    _, ruled, token = fa4.lists(rows, 105)
    assert token is None
    assert int(ruled[0].sum()) == 0


def test_sizes_of_blocks() -> None:
    tokens = external.filled(torch.tensor([16, 3, 16]), 16, 40)
    assert flashinfer._sizes(tokens, 16).tolist() == [16, 3, 8]


KINDS = ["short last block", "text", "valid text", "any lengths", "shared rows", "b h l d", "packed", "nothing"]


def larger(kind: dict[str, Any], block: int) -> dict[str, Any]:
    """A kind of trouble in larger blocks, with about as many of them."""
    t, y, x = kind.get("grid", (3, 4, 5))
    return kind | {"grid": (t, y, x * block // 16), "block": block, "tile": None}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, indirect=True)
@pytest.mark.parametrize(("d", "block"), [(128, 128), (64, 128), (128, 64)])
@pytest.mark.parametrize("package", ["flash-attn-4", "flashinfer-python"])
def test_gpu_sparse(make_case: Callable[..., Any], kind: dict[str, Any], package: str, d: int, block: int) -> None:
    needs(package)
    adapter = ADAPTERS[package]
    case = make_case(**larger(kind, block), d=d, dtype=torch.bfloat16, device="cuda")
    verdict = adapter.can_run(Problem.of(case.q, case.k, case.rows, None))
    assert verdict.ok, verdict.reason
    case.assert_right(adapter.run(case.q, case.k, case.v, case.rows, case.scale, None))


@pytest.mark.gpu
@pytest.mark.parametrize("package", ["fa3-fwd", "flash-attn-4"])
@pytest.mark.parametrize("d", [64, 128])
def test_gpu_dense(package: str, d: int) -> None:
    needs(package)
    from vidaccel.kernels import reference

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, d, device="cuda").bfloat16() for n in (300, 517, 517))
    assert ADAPTERS[package].can_run(Problem.of(q, k, None, None)).ok
    out, lse = ADAPTERS[package].run(q, k, v, None, 0.1, None)
    exact = reference.run(q.double(), k.double(), v.double(), None, 0.1, None)
    low = reference.run(q, k, v, None, 0.1, None)
    assert (out - exact[0]).abs().max() <= 2 * (low[0] - exact[0]).abs().max()
    torch.testing.assert_close(lse.double(), exact[1].double(), atol=1e-3, rtol=1e-4)
