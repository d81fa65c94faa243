"""FlexAttention's block lists and rule, which a CPU can run without LSE; the whole backend is tested on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from vidaccel.kernels import attention, flex


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled", [False, True])
def test_lists_and_rule(make_case: Callable[..., Any], compiled: bool) -> None:
    case = make_case(grid=(3, 5, 7), text=9, block=32, tile=(2, 3, 4), heads=3, d=32, batch=2, valid=[2, 9], window=2)
    q, k, v = (torch.nan_to_num(x, 0, 0, 0) for x in (case.q, case.k, case.v))
    true, _ = attention(q, k, v, **case.kwargs("reference"))
    run = torch.compile(flex_attention) if compiled else flex_attention
    lists = flex.block_mask(case.rows, q.shape[1], k.shape[1])
    out = run(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=lists, scale=case.scale).transpose(1, 2)
    filled = case.mask.layout.filled
    torch.testing.assert_close(out[:, filled], true[:, filled], atol=2e-6, rtol=1e-5)
