"""The definition, against a softmax written out once more over the whole mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vidaccel.kernels import attention, reference


def brute_force(case: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token in float64, from the map of blocks, the window and the lengths."""
    layout, window = case.mask.layout, case.mask.window
    b, slots, h, _ = case.q.shape
    block, slot = layout.block, torch.arange(slots)
    kinds = case.mask.block_map()[:, slot // block][:, :, slot // block]
    keep = kinds == 2 if window is None else (kinds == 2) | (kinds == 1) & window.kept()
    k_len = layout.k_len.reshape(-1, layout.blocks)
    keep = keep & (slot % block < k_len[:, slot // block])[:, None, None]
    keep = keep & (slot % block < layout.q_len[slot // block])[:, None]
    keep = keep.expand(b, h, -1, -1)
    out = torch.zeros(case.q.shape, dtype=torch.float64)
    lse = torch.full((b, h, slots), -torch.inf, dtype=torch.float64)
    for sample, head, i in keep.any(-1).nonzero().tolist():
        kept = keep[sample, head, i].nonzero()[:, 0]
        s = case.scale * (case.k[sample, kept, head].double() @ case.q[sample, i, head].double())
        if case.key_bias is not None:
            bias = case.key_bias.expand(b, h, -1)
            s = s + bias[sample, head, kept].double()
        weights = s.exp()
        if weights.sum() > 0:
            out[sample, i, head] = weights @ case.v[sample, kept, head].double() / weights.sum()
            lse[sample, head, i] = weights.sum().log()
    return out, lse


def test_it_is_the_masked_softmax(make_case: Callable[..., Any], kind: dict[str, object]) -> None:
    case = make_case(**kind)
    out, lse = attention(case.q, case.k, case.v, **case.kwargs("reference"))
    true_out, true_lse = brute_force(case)
    torch.testing.assert_close(out.double(), true_out, atol=3e-6, rtol=0)
    torch.testing.assert_close(lse.double(), true_lse, atol=3e-6, rtol=1e-6)


def test_double_inputs_are_computed_in_double(make_case: Callable[..., Any]) -> None:
    case = make_case(dtype=torch.float64)
    out, _ = attention(case.q, case.k, case.v, **case.kwargs("reference"))
    torch.testing.assert_close(out, brute_force(case)[0], atol=1e-14, rtol=0)


def test_sampled_rows_are_rows_of_the_whole(make_case: Callable[..., Any]) -> None:
    case = make_case(grid=(3, 5, 5), heads=3, window=1, tile=(2, 2, 3), bias=(1, 3))
    out, lse = attention(case.q, case.k, case.v, **case.kwargs("reference"))
    slots, heads = torch.tensor([40, 3, 3, 17]), torch.tensor([2, 0])
    some = reference.sampled(case.q, case.k, case.v, case.rows, case.scale, case.key_bias, slots, heads)
    torch.testing.assert_close(some[0], out[:, slots][:, :, heads])
    torch.testing.assert_close(some[1], lse[:, heads][:, :, slots])


def test_without_a_mask_it_is_torch(make_case: Callable[..., Any]) -> None:
    q, k, v = torch.randn(2, 37, 3, 16), torch.randn(2, 53, 3, 16), torch.randn(2, 53, 3, 16)
    out, _ = attention(q, k, v, backend="reference")
    true = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(out, true.transpose(1, 2))
