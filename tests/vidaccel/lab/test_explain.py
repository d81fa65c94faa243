"""The atlas against attention itself; the first broken layer is found and named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vidaccel
from vidaccel import wrapping
from vidaccel.errors import BackendError
from vidaccel.grid import Site, TokenLayout
from vidaccel.lab.explain import Atlas, AtSteps, Everything, _kept, finite
from vidaccel.lab.sides import Side
from vidaccel.pipelines.zoo import RealModel, build
from vidaccel.recipe import pattern_from
from vidaccel.report import atlas as pages

SITE = Site("blocks.0.attn1.processor", 0, "self", "wan")


@pytest.mark.parametrize("name", ["radial", "neighborhood", "sliding-window", "topk", "ann", "light-forcing"])
@pytest.mark.parametrize(("grid", "text"), [((4, 6, 7), 0), ((3, 5, 11), 9)])
def test_kept_pairs_are_those_that_attention_uses(name: str, grid: tuple[int, int, int], text: int) -> None:
    layout = TokenLayout.of(grid, text, 16)
    pattern = pattern_from({"name": name, "block": 16})
    assert pattern is not None
    plan = pattern.plan(layout, 0.5, SITE)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, layout.tokens, 2, 16, generator=generator) for _ in range(3))
    out, _ = wrapping.attend(plan, *(plan.layout.to_kernel(x) for x in (q, k, v)))
    sampled = torch.randperm(layout.grid.tokens, generator=generator)[:20]
    keep = _kept(plan, (q, k, v), sampled)
    logits = torch.einsum("shd,thd->hst", q[0, sampled], k[0]) / 4
    expected = torch.einsum("hst,thd->shd", logits.masked_fill(~keep, -torch.inf).softmax(-1), v[0])
    torch.testing.assert_close(plan.layout.to_model(out)[0, sampled], expected, atol=1e-5, rtol=1e-4)


@pytest.fixture
def seen(wan: Any, render: Any) -> Any:
    """Two of four steps, looked at while everything is kept."""
    atlas = Atlas([p for n in ("radial", "topk", "pyramid") if (p := pattern_from({"name": n, "block": 16}))], 0.4, 16)
    expected = render(wan)
    with (
        pytest.warns(vidaccel.errors.VidaccelWarning, match="keeps every pair"),
        vidaccel.accelerate(wan, Everything(16), schedule=AtSteps(steps=(1, 3))),
        atlas.watching(wan.transformer),
    ):
        torch.testing.assert_close(render(wan), expected, atol=2e-5, rtol=1e-4)
    return atlas


def test_an_atlas_has_every_layer_of_the_steps_that_were_asked_for(seen: Any) -> None:
    assert [(row["step"], row["layer"]) for row in seen.rows] == [(s, layer) for s in (1, 3) for layer in range(3)]
    for row in seen.rows:
        assert len(row["kept"]["radial"]) == row["heads"] == 2
        # A tiny model of random weights looks nearly everywhere alike.
        assert row["kept"]["radial"] == pytest.approx([0.4] * 2, abs=0.15)
        assert all(0.5 < spread <= 1.001 for spread in row["spread"])
        assert row["same_frame"] == pytest.approx([1 / 7] * 2, abs=0.05)
        assert row["text"] == [0, 0]
    judged = seen.data()["patterns"]
    assert "merges keys" in judged["pyramid"]["reason"]
    assert judged["topk"]["worst"]["kept"] <= judged["topk"]["kept"]


def test_every_family_can_be_looked_at(any_model: RealModel, size_of: Any) -> None:
    grid = any_model.grid(*size_of(any_model))
    transformer = build(any_model, "cpu", torch.float32)
    inputs = any_model.inputs(grid, "cpu", torch.float32)
    side = Side(transformer, any_model, inputs, torch.no_grad, attention=Everything(16))
    atlas = Atlas([p for n in ("radial", "topk") if (p := pattern_from({"name": n, "block": 16}))], 0.4, 16)
    with atlas.watching(transformer):
        side()
    assert len(atlas.rows) == sum(any_model.layers.values())
    share = any_model.joint_text / (grid.tokens + any_model.joint_text)
    for row in atlas.rows:
        # Random weights look about everywhere alike, on valid text too; with its padding that would be most of it.
        assert row["text"] == pytest.approx([share] * 2, abs=0.7 * share + 1e-6)
        for kept in row["kept"].values():
            assert kept == pytest.approx([0.4 * (1 - share) + share] * 2, abs=0.12)


def test_pages(seen: Any) -> None:
    data = {**seen.data(), "about": {"prompt": "<script>"}}
    page = pages.html(data)
    assert "<script>" not in page
    assert "mass that radial keeps" in page
    assert "mass that pyramid keeps" not in page
    assert "mass on text" not in page
    assert pages.png(data).startswith(b"\x89PNG")


def test_the_first_broken_layer_is_named(wan: Any, render: Any) -> None:
    with torch.no_grad():
        wan.transformer.blocks[1].attn1.to_out[0].weight[0, 0] = torch.nan
    with (
        vidaccel.accelerate(wan, "radial", density=0.4, schedule=vidaccel.Schedule(dense_steps=1)),
        finite(wan.transformer),
        pytest.raises(BackendError, match=r"step 0 \(cond\), attention blocks\.1\.attn1 .* its input was finite"),
    ):
        render(wan)
    assert not any(module._forward_hooks for module in wan.transformer.modules())


def test_broken_feed_forwards_and_inputs_are_told_apart(wan: Any, render: Any) -> None:
    with finite(wan.transformer):
        render(wan)
    with torch.no_grad():
        wan.transformer.blocks[2].ffn.net[2].weight[0, 0] = torch.inf
    with finite(wan.transformer), pytest.raises(BackendError, match=r"block blocks\.2 .* its input was finite"):
        render(wan)
    with torch.no_grad():
        wan.transformer.patch_embedding.bias[0] = torch.nan
    with finite(wan.transformer), pytest.raises(BackendError, match=r"blocks\.0.* broken already"):
        render(wan)
