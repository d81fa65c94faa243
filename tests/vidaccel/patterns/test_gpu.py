"""Choosing on a GPU: no call waits for it, and the kernels compute what was chosen."""

from __future__ import annotations

import pytest
import torch

from vidaccel.choices import drift, kept_share
from vidaccel.grid import Site, TokenLayout
from vidaccel.kernels.attention import attention
from vidaccel.kernels.canary import error_budget, largest_error
from vidaccel.kernels.problem import Rows
from vidaccel.kernels.reference import sampled
from vidaccel.patterns import Ann, LightForcing, Neighborhood, PerHead, Pyramid, SparseVideoGen, TopK, Union

pytestmark = pytest.mark.gpu

SITE = Site("blocks.0.attn1.processor", 0, "self", "wan")
PATTERNS = {
    "ann": Ann(),
    "light-forcing": LightForcing(),
    "per-head": PerHead((TopK(), SparseVideoGen(), {"name": "neighborhood"}), (0, 1, 2) * 4),
    "pyramid": Pyramid(),
    "svg": SparseVideoGen(),
    "topk": TopK(),
    "topk, adaptive": TopK(adaptive=True),
    "topk, blocks of 64": TopK(block=64),
    "topk, top-p": TopK(top_p=0.3),
    "union": Union((TopK(), Neighborhood((3, 9, 9)))),
}


@pytest.fixture
def no_waiting():
    def check(mode: str) -> None:
        torch.cuda.set_sync_debug_mode(mode)

    yield check
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("text", [0, 226])
@pytest.mark.parametrize("case", PATTERNS)
def test_nothing_waits_and_the_kernel_agrees(case, text, no_waiting):
    layout = TokenLayout.of((13, 30, 45), text, PATTERNS[case].block)
    plan = PATTERNS[case].plan(layout, 0.4, SITE).to("cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (1, plan.layout.slots, 12, 128)
    q, k, v = (torch.randn(shape, device="cuda", generator=generator).bfloat16() for _ in range(3))
    for mode in ("default", "error"):  # kernels compile in the first round, and that waits
        torch.cuda.synchronize()
        no_waiting(mode)
        choice = plan.select.choose(q, k, v)
        chosen = plan.select.apply(choice, k, v)
        moved = q if chosen.order is None else q.gather(1, chosen.order[..., None].expand(q.shape))
        out, lse = attention(moved, chosen.k, chosen.v, chosen.mask, key_bias=chosen.key_bias)
        share, changed = kept_share(choice.mask), drift(choice, choice)
        no_waiting("default")
    assert float(changed) == 0
    assert float(share) == pytest.approx(choice.mask.density, rel=1e-4)
    slots = torch.linspace(0, plan.layout.slots - 1, 48, device="cuda").long()
    slots = slots[plan.layout.filled[slots]]
    heads = torch.tensor([0, 5, 11], device="cuda")
    given = (moved, chosen.k, chosen.v, Rows.of(chosen.mask), 128**-0.5, chosen.key_bias, slots, heads)
    true, true_lse = sampled(*given, torch.float64)
    near, near_lse = sampled(*given, torch.bfloat16)
    got = out[:, slots][:, :, heads].double()
    assert largest_error(got, true) <= error_budget(true, near, torch.bfloat16)
    assert largest_error(lse[:, heads][:, :, slots].double(), true_lse) <= error_budget(
        true_lse, near_lse, torch.float32, least=1
    )
