"""The CPU's gather plan: remembered while it is right, made again when it is not, gone when the mask is."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vidaccel.blocks import BlockMask
from vidaccel.grid import TokenLayout
from vidaccel.kernels import attention, gather
from vidaccel.kernels.problem import Rows


def plan(case: Any) -> gather.Plan:
    return gather.plan(case.rows, case.q.shape[2], case.q.shape[1], case.k.shape[1])


def test_it_is_made_once(make_case: Callable[..., Any]) -> None:
    case = make_case(window=1)
    assert plan(case) is plan(case)


def test_a_mask_written_in_place_is_seen(make_case: Callable[..., Any]) -> None:
    case, other = make_case(one_block=True, seed=0), make_case(one_block=True, seed=5, heads=2)
    attention(case.q, case.k, case.v, case.mask)
    case.mask.idx.copy_(other.mask.idx)
    tensors = (torch.nan_to_num(x, 0, 0, 0) for x in (case.q, case.k, case.v))
    case = dataclasses.replace(case, **dict(zip("qkv", tensors, strict=True)))
    case.assert_right(attention(case.q, case.k, case.v, case.mask, scale=case.scale))


def test_masks_that_share_indices_but_not_lengths(make_case: Callable[..., Any]) -> None:
    case = make_case(grid=(2, 4, 4), text=20, batch=2, valid=[3, 20], shared=True)
    rows = [case.rows._replace(k_len=length) for length in case.mask.layout.k_len]
    plans = [gather.plan(r, 2, case.q.shape[1], case.k.shape[1]) for r in rows]
    assert plans[0] is not plans[1]
    assert plans[0] is gather.plan(rows[0], 2, case.q.shape[1], case.k.shape[1])


def test_it_dies_with_its_mask(make_case: Callable[..., Any]) -> None:
    gc.collect()
    before = len(gather._made)
    case = make_case(seed=77)
    attention(case.q, case.k, case.v, case.mask)
    assert len(gather._made) == before + 1
    del case
    gc.collect()
    assert len(gather._made) == before


@pytest.mark.parametrize("heads", [1, 3])
def test_alike_rows_become_one(heads: int) -> None:
    layout = TokenLayout.of((4, 4, 8), text=16, block=16)
    keep = torch.eye(layout.blocks, dtype=torch.bool)
    keep[2:5] = True
    mask = BlockMask.of(keep.expand(heads, -1, -1), layout)
    made = gather.plan(Rows.of(mask), 3, layout.slots, layout.slots)
    sizes = {(tuple(g.queries.shape), tuple(g.keys.shape)) for g in made.groups}
    others = layout.blocks - 3
    assert sizes == {((heads, 48), (heads, 144)), ((heads * others, 16), (heads * others, 16))}
