"""Two rows as one list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


def check(make_case: Callable[..., Any], device: str, **kwargs: Any) -> None:
    from vidaccel.kernels.pairs import join_rows

    rows = make_case(device=device, **kwargs).rows
    words, count = (x.cpu() for x in join_rows(rows))
    kinds = rows.kinds(torch.arange(rows.n_full.shape[0], device=device)).cpu().view(rows.heads, rows.q_blocks, -1)
    pairs = -(-rows.q_blocks // 2)
    for head in range(rows.heads):
        for pair in range(pairs):
            first, *second = kinds[head, 2 * pair : 2 * pair + 2].int()
            joined = first | (second[0] << 2 if second else 0)
            kept = joined.nonzero()[:, 0]
            start = int(rows.ptr[head * rows.q_blocks + 2 * pair])
            length = int(count[head * pairs + pair])
            assert torch.equal(words[start : start + length], (kept << 4 | joined[kept]).int())


SIZES = [{"grid": (3, 5, 5)}, {"grid": (5, 9, 10), "heads": 3, "window": True, "tile": (2, 2, 4)}, {"density": 0.0}]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernel is compiled")
@pytest.mark.parametrize("kwargs", SIZES, ids=str)
def test_interpreted(make_case: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    pytest.importorskip("triton")
    check(make_case, "cpu", **kwargs)


@pytest.mark.gpu
@pytest.mark.parametrize("kwargs", [*SIZES, {"grid": (9, 30, 52), "block": 64, "heads": 2}], ids=str)
def test_gpu(make_case: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    check(make_case, "cuda", **kwargs)
