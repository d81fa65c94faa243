"""A pattern whose rest is an earlier step's: the definition in dense attention, and late is not lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vidaccel.blocks import BlockMask
from vidaccel.errors import PatternError
from vidaccel.grid import Site, TokenLayout
from vidaccel.kernels.attention import attention
from vidaccel.kernels.merge import merge
from vidaccel.patterns import (
    Ann,
    FlashBlock,
    FreeSwim,
    Neighborhood,
    PerHead,
    Plan,
    Radial,
    SlidingWindow,
    SparseVideoGen,
    TempCache,
    TopK,
)
from vidaccel.reuse.residual import rest
from vidaccel.wrapping import attend

SITE = Site("", 0, "self", "wan")
LAYOUT = TokenLayout.of((4, 5, 7), 9, block=16)
HEADS = PerHead((Radial(block=16), SlidingWindow(block=16)), (0, 1))


def tensors(batch: int = 1, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, LAYOUT.tokens, 2, 16, generator=generator) for _ in range(3)]


def plan(threshold: float, part: Any = None, density: float = 0.5) -> Plan:
    return FlashBlock(part or TopK(block=16), every=5, threshold=threshold, probe=16).plan(LAYOUT, density, SITE)


def run(made: Plan, qkv: list[torch.Tensor], held: Any = None) -> tuple[torch.Tensor, Any]:
    out, choice = attend(made, *(made.layout.to_kernel(x) for x in qkv), held)
    return made.layout.to_model(out), choice


def over(qkv: list[torch.Tensor], keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention (b, h, l, d) of q, k, v (b, l, h, d) over kept pairs (b, h, l, l), and its log-sum-exp (b, h, l)."""
    q, k, v = (x.transpose(1, 2).double() for x in qkv)
    logits = (q @ k.transpose(2, 3) / 4).masked_fill(~keep, -torch.inf)
    return logits.softmax(-1).nan_to_num(0.0) @ v, logits.logsumexp(-1)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 4), st.integers(2, 6), st.integers(3, 8)),
    st.sampled_from([0, 5, 20]),
    st.booleans(),
    st.sampled_from([16, 32, 64]),
    st.sampled_from(["topk", "svg", "heads differ", "heads choose", "window"]),
    st.floats(0.3, 0.9),
    st.integers(2, 5),
    st.integers(1, 2),
    st.data(),
)
def test_later_steps_merge_what_is_kept_with_what_was_left_out(
    grid: tuple[int, int, int],
    text: int,
    text_first: bool,
    block: int,
    kind: str,
    own: float,
    every: int,
    batch: int,
    data: st.DataObject,
) -> None:
    layout = TokenLayout.of(grid, text, block, text_first=text_first)
    tokens, share = layout.grid.tokens, 1 / every
    density = share + (1 - share) * own
    parts = {
        "topk": TopK(block=block, sink_frames=0),
        "svg": SparseVideoGen(block=block, sink_frames=0),
        "heads choose": PerHead((TopK(block=block, sink_frames=0), Radial(rule="ranked", block=block)), (0, 1)),
        "heads differ": PerHead((Radial(block=block), Radial(rule="ranked", sink=False, block=block)), (1, 0)),
        "window": Neighborhood(block=block),
    }
    part, probe = parts[kind], data.draw(st.integers(1, 20))
    try:
        alone = part.plan(layout, (density - share) / (1 - share), SITE)
    except PatternError:
        with pytest.raises(PatternError, match="flashblock"):
            FlashBlock(part, every=every).plan(layout, density, SITE)
        return
    valid = torch.tensor([data.draw(st.integers(1, text)) for _ in range(batch)]) if text else torch.zeros(batch)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    calls = [[torch.randn(batch, layout.tokens, 2, 16, generator=generator) for _ in range(3)]]
    for _ in range(2):
        calls.append([x + 0.3 * torch.randn(x.shape, generator=generator) for x in calls[-1]])
    start = text if text_first else 0
    word = torch.arange(text) + (0 if text_first else tokens)
    seen = torch.ones(batch, 1, 1, layout.tokens, dtype=torch.bool)
    seen[:, 0, 0, word] = torch.arange(text) < valid[:, None]
    seen = seen.expand(-1, 2, layout.tokens, -1)

    def told(made: Plan) -> Plan:
        return made.with_valid_text(valid) if text else made

    # What the part alone keeps at the first call.
    if alone.mask is not None:
        keep = alone.mask.to_dense().expand(batch, 2, -1, -1)
    else:
        q, k, v = (alone.layout.to_kernel(x).transpose(0, 1).flatten(1, 2)[None] for x in calls[0])
        keep = told(alone).select.choose(q, k, v).mask
        keep = BlockMask(keep.ptr, keep.idx, keep.n_full, alone.layout).to_dense().unflatten(0, (batch, 2))
    rest = over(calls[0], seen & ~keep)
    rows = [start + n * tokens // min(probe, tokens) for n in range(min(probe, tokens))]

    def late(qkv: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Attention to everything, the same with an old rest, and how much the rows of each head differ."""
        (whole, _), (out, lse) = over(qkv, seen), over(qkv, seen & keep)
        both = torch.logaddexp(lse, rest[1])
        joined = out * (lse - both).exp()[..., None] + rest[0] * (rest[1] - both).exp()[..., None]
        return whole, joined, (joined - whole)[:, :, rows].norm(dim=(2, 3)) / whole[:, :, rows].norm(dim=(2, 3))

    # Some heads exceed it, others do not.
    threshold = float(sum(late(calls[1])[2].aminmax())) / 2
    made = FlashBlock(part, every=every, threshold=threshold, probe=probe).plan(layout, density, SITE)
    assert made.delivered == pytest.approx(share + (1 - share) * alone.delivered)
    assert made.visited == pytest.approx(share + (1 - share) * alone.visited)
    held = None
    for step, qkv in enumerate(calls):
        whole, joined, error = late(qkv)
        assume(step == 0 or ((error - threshold).abs() > 1e-4).all())  # rounding decides nothing
        anew = (error >= threshold) | (step == 0)
        expected = torch.where(anew[..., None, None], whole, joined)
        left = over(qkv, seen & ~keep)
        rest = (torch.where(anew[..., None, None], left[0], rest[0]), torch.where(anew[..., None], left[1], rest[1]))
        out, held = run(told(made), qkv, held)
        torch.testing.assert_close(out.transpose(1, 2).double(), expected, atol=2e-5, rtol=0)
        spent = alone.delivered + (1 - alone.delivered) * float(anew.double().mean())
        assert float(held.spent) == pytest.approx(spent)


@pytest.mark.parametrize("part", [TopK(block=16), Radial(block=16), HEADS], ids=lambda part: part.name)
def test_the_first_call_is_dense_and_so_is_a_second_with_the_same_queries(part: Any) -> None:
    qkv, made = tensors(batch=2), plan(1e9, part)
    expected = attention(*qkv)[0]
    first, choice = run(made, qkv)
    torch.testing.assert_close(first, expected, atol=2e-5, rtol=0)
    assert float(choice.spent) == 1
    again, held = run(made, qkv, choice)
    torch.testing.assert_close(again, expected, atol=2e-5, rtol=0)
    assert float(held.spent) == pytest.approx(float(made.residual.kept))


def test_late_is_better_than_lost_and_the_probe_buys_exactness() -> None:
    (q, k, v), errors, spent = tensors(), [], []
    moved = [q + 0.2 * tensors(seed=1)[0], k, v]
    expected = attention(*moved)[0]
    # Heads differ: the second one's queries stay where they are.
    moved[0][:, :, 1] = q[:, :, 1]
    expected = attention(*moved)[0]
    for threshold in (0, 0.05, 1e9):
        made = plan(threshold)
        out, held = run(made, moved, run(made, [q, k, v])[1])
        errors.append(float((out - expected).norm() / expected.norm()))
        spent.append(float(held.spent))
    dropped = TopK(block=16).plan(LAYOUT, 0.375, SITE)
    lost = float((run(dropped, moved)[0] - expected).norm() / expected.norm())
    assert errors[0] < 1e-5
    assert errors[1] < 1e-5, "the head that moved was not computed anew"
    assert 1e-3 < errors[2] < 0.5 * lost
    kept = float(plan(0).residual.kept)
    assert spent == pytest.approx([1, (1 + kept) / 2, kept])


def test_what_was_computed_anew_is_kept() -> None:
    q, k, v = tensors()
    made, moved = plan(0.05), [q + tensors(seed=1)[0], k, v]
    choice = run(made, [q, k, v])[1]
    run(made, moved, choice)
    assert float(run(made, moved, choice)[1].spent) == pytest.approx(float(made.residual.kept))


def test_samples_of_a_batch_keep_what_each_alone_does() -> None:
    """A part whose heads differ has one mask for the heads of every sample."""
    (q, k, v), made = tensors(batch=2), plan(1e9, HEADS)
    moved = q + tensors(batch=2, seed=1)[0]
    out = run(made, [moved, k, v], run(made, [q, k, v])[1])[0]
    for n in range(2):
        alone = [x[n : n + 1] for x in (q, k, v)]
        expected = run(made, [moved[n : n + 1], *alone[1:]], run(made, alone)[1])[0]
        torch.testing.assert_close(out[n : n + 1], expected, atol=2e-5, rtol=0)


def test_the_rest_is_what_is_left_of_everything() -> None:
    q, k, v = tensors()
    everything, kept, left = attention(q, k, v), attention(q, k[:, :50], v[:, :50]), attention(q, k[:, 50:], v[:, 50:])
    found = rest(everything, kept)
    for one, other in zip(found, left, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(merge(*kept, *found)[0], everything[0], atol=2e-5, rtol=0)
    # Next to nothing is left: rounding must not become a result. Nothing was computed: nothing is left.
    for of in (everything, (torch.zeros_like(everything[0]), torch.full_like(everything[1], -torch.inf))):
        out, lse = rest(of, everything)
        assert torch.equal(out, torch.zeros_like(out))
        assert bool((lse == -torch.inf).all())


def test_one_budget_pays_for_dense_calls_and_sparse_ones() -> None:
    made = plan(0.1)
    # 140 tokens are nine blocks, the last one short.
    assert made.residual is not None
    assert float(made.residual.kept) == pytest.approx((0.5 - 0.2) / 0.8, abs=0.5 / 9)
    assert made.delivered == pytest.approx(0.2 + 0.8 * float(made.residual.kept))
    assert made.reselect == 5


@pytest.mark.parametrize(
    ("arguments", "density", "says"),
    [
        ({}, 0.2, "every=10"),
        ({"part": Ann(block=16)}, 0.5, "moves or merges"),
        ({"part": TempCache(block=16)}, 0.5, "moves or merges"),
        ({"part": FreeSwim(block=16, logit_scale=2)}, 0.9, "act on whole layers"),
        ({"every": 1}, 0.5, "every=1"),
        (
            {"every": 2, "part": TopK(block=16, sink_frames=3)},
            0.6,
            "part topk is given 0.2 of density 0.6.*density 0.2 was",
        ),
    ],
)
def test_what_cannot_be_is_said(arguments: Any, density: float, says: str) -> None:
    with pytest.raises(PatternError, match=says):
        FlashBlock(**{"part": TopK(block=16)} | arguments).plan(LAYOUT, density, SITE)
