"""Two attentions over disjoint keys are one attention over their union."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidaccel.blocks import BlockMask
from vidaccel.errors import BackendError
from vidaccel.kernels import attention, merge
from vidaccel.kernels.merge import fused_merge


def test_two_halves_of_a_mask_make_the_whole(make_case: Callable[..., Any]) -> None:
    case = make_case(grid=(3, 5, 5), text=9, tile=(2, 2, 3), heads=3)
    keep = case.mask.block_map() > 0
    half = torch.rand(keep.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    masks = [BlockMask.of(keep & part, case.mask.layout) for part in (half, ~half)]
    parts = [attention(case.q, case.k, case.v, mask, scale=case.scale) for mask in masks]
    out, lse = merge(*parts[0], *parts[1])
    case.assert_right((out.contiguous(), lse.contiguous()))


def test_sides_that_do_not_fit_are_refused() -> None:
    out, lse = torch.randn(1, 8, 2, 16), torch.randn(1, 2, 8)
    for other_out, other_lse, words in (
        (out[:, :4], lse, r"\(1, 4, 2, 16\)"),
        (out, lse[..., :4], r"\(1, 2, 4\)"),
        (out, lse.to("meta"), "on cpu and meta"),
    ):
        with pytest.raises(BackendError, match=words):
            merge(out, lse, other_out, other_lse)


def test_splits_in_low_precision_stay_in_the_budget(make_case: Callable[..., Any]) -> None:
    case = make_case(grid=(3, 5, 5), dtype=torch.bfloat16, density=1.0)
    keep = case.mask.block_map() > 0
    left = keep.clone()
    left[..., 2:] = False
    parts = [
        attention(case.q, case.k, case.v, BlockMask.of(m, case.mask.layout), scale=case.scale)
        for m in (left, keep & ~left)
    ]
    case.assert_right(merge(*parts[0], *parts[1]))


def test_text_beside_video_is_two_calls(make_case: Callable[..., Any]) -> None:
    case = make_case(grid=(2, 4, 5), text=12, density=1.0, seed=3)
    case = dataclasses.replace(case, **{name: torch.nan_to_num(getattr(case, name), 0, 0, 0) for name in "qkv"})
    video = case.mask.layout.video_blocks * case.mask.layout.block
    keep = case.mask.block_map() > 0
    keep[..., case.mask.layout.video_blocks :] = False
    sparse = attention(case.q, case.k, case.v, BlockMask.of(keep, case.mask.layout), scale=case.scale)
    text = attention(case.q, case.k[:, video:], case.v[:, video:], scale=case.scale)
    out, _ = merge(*sparse, *text)
    keep = case.mask.block_map() > 0
    keep[..., case.mask.layout.video_blocks :] = True
    whole, _ = attention(case.q, case.k, case.v, BlockMask.of(keep, case.mask.layout), scale=case.scale)
    filled = case.mask.layout.filled
    torch.testing.assert_close(out[:, filled], whole[:, filled])


sides = st.lists(st.sampled_from([-torch.inf, -90.0, -1.0, 0.0, 2.5, 90.0]), min_size=3, max_size=3)


@settings(max_examples=60, deadline=None)
@given(sides, st.integers(0, 9))
def test_order_and_grouping_do_not_matter(logs: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for log in logs:
        out = torch.randn(1, 2, 1, 4, generator=generator, dtype=torch.float64)
        lse = torch.full((1, 1, 2), log, dtype=torch.float64)
        # A side that kept nothing may hold anything.
        parts.append((out.fill_(torch.nan) if log == -torch.inf else out, lse))
    a, b, c = parts
    left, right = merge(*merge(*a, *b), *c), merge(*a, *merge(*b, *c))
    turned = merge(*c, *merge(*b, *a))
    for x, y, z in zip(left, right, turned, strict=True):
        torch.testing.assert_close(x, y)
        torch.testing.assert_close(x, z)
        assert not x.isnan().any()
    weights = torch.tensor(logs, dtype=torch.float64)
    torch.testing.assert_close(left[1], weights.logsumexp(0).expand(1, 1, 2))
    true = sum(
        w * torch.nan_to_num(out) for w, (out, _) in zip(torch.nan_to_num(weights.softmax(0)), parts, strict=True)
    )
    torch.testing.assert_close(left[0], true)


def test_dtypes() -> None:
    out, lse = torch.randn(1, 4, 2, 8).bfloat16(), torch.randn(1, 2, 4)
    merged, total = merge(out, lse, out, lse)
    assert merged.dtype == torch.bfloat16
    assert total.dtype == torch.float32
    torch.testing.assert_close(merged, out)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_kernel_is_the_definition(device: str, dtype: torch.dtype) -> None:
    """Strided, with sides that kept nothing and hold no number there, alone and both."""
    pytest.importorskip("triton")
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels are compiled here, not interpreted")
    generator = torch.Generator().manual_seed(0)
    outs = [torch.randn(2, 3, 37, 24, generator=generator).to(dtype).transpose(1, 2) for _ in range(2)]
    lses = [torch.randn(2, 37, 3, generator=generator).mul(5).transpose(1, 2) for _ in range(2)]
    for number, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        gone = torch.arange(37) % 4 <= number
        lse[..., gone] = -torch.inf
        out[:, gone] = torch.nan
    expected = merge(outs[0], lses[0], outs[1], lses[1])
    found = fused_merge(*(x.to(device) for pair in zip(outs, lses, strict=True) for x in pair))
    torch.testing.assert_close(found[0].cpu(), expected[0], atol=1e-6, rtol=torch.finfo(dtype).eps)
    torch.testing.assert_close(found[1].cpu(), expected[1], atol=1e-6, rtol=1e-6)
    assert found[0].is_contiguous()
