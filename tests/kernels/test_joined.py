"""Neighbouring rows as one list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


def check(make_case: Callable[..., Any], device: str, units: int, share: int, **kwargs: Any) -> None:
    from vidaccel.kernels.joined import SHIFT, join_rows

    rows = make_case(device=device, **kwargs).rows
    entries, count, spread = join_rows(rows, units, share)
    entries, count = entries.cpu(), count.cpu()
    kinds = rows.kinds(torch.arange(rows.n_full.shape[0], device=device)).cpu().view(rows.heads, rows.q_blocks, -1)
    tiles = -(-rows.q_blocks * share // units)
    assert count.shape[0] == rows.heads * tiles
    for head in range(rows.heads):
        for tile in range(tiles):
            first, last = tile * units // share, min((tile * units + units - 1) // share, rows.q_blocks - 1)
            joined = sum(kinds[head, row].int() << (2 * (row - first)) for row in range(first, last + 1))
            kept = joined.nonzero()[:, 0]
            start = int(rows.ptr[head * rows.q_blocks + first]) + tile % 2 * spread
            length = int(count[head * tiles + tile])
            assert torch.equal(entries[start : start + length], (kept << SHIFT | joined[kept]).int())


SIZES = [{"grid": (3, 5, 5)}, {"grid": (5, 9, 10), "heads": 3, "window": True, "tile": (2, 2, 4)}, {"density": 0.0}]
WAYS = [(2, 1), (3, 1), (3, 2), (4, 2)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernel is compiled")
@pytest.mark.parametrize("kwargs", SIZES, ids=str)
@pytest.mark.parametrize(("units", "share"), WAYS)
def test_interpreted(make_case: Callable[..., Any], units: int, share: int, kwargs: dict[str, Any]) -> None:
    pytest.importorskip("triton")
    check(make_case, "cpu", units, share, **kwargs)


@pytest.mark.gpu
@pytest.mark.parametrize("kwargs", [*SIZES, {"grid": (9, 30, 52), "block": 64, "heads": 2}], ids=str)
@pytest.mark.parametrize(("units", "share"), WAYS)
def test_gpu(make_case: Callable[..., Any], units: int, share: int, kwargs: dict[str, Any]) -> None:
    check(make_case, "cuda", units, share, **kwargs)
