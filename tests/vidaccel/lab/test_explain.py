"""The atlas against attention itself; the first broken layer is found and named."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vidaccel
from vidaccel import wrapping
from vidaccel.grid import Site, TokenLayout
from vidaccel.lab.explain import Atlas, AtSteps, Everything, _kept
from vidaccel.lab.heads import counted, kind
from vidaccel.lab.sides import Side
from vidaccel.lab.why import reasons
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
        # Alike everywhere means that nothing is looked for, and chance is what is there.
        assert row["kind"] == ["global"] * 2
        for name in ("same_frame", "same_place", "first_frame", "text"):
            assert row[name] == pytest.approx([row["chance"][name]] * 2, abs=0.05)
    judged = seen.data()["patterns"]
    assert "merges keys" in judged["pyramid"]["reason"]
    assert judged["topk"]["worst"]["kept"] <= judged["topk"]["kept"]
    losses = judged["topk"]["losses"]
    assert losses[0] == judged["topk"]["worst"]
    assert [each["kept"] for each in losses] == sorted(each["kept"] for each in losses)
    assert len(losses) == 8
    assert judged["topk"]["kept_by_kind"] == {"global": pytest.approx(judged["topk"]["kept"])}
    assert seen.data()["heads"] == {1: {"global": 6}, 3: {"global": 6}}


def test_heads_are_named_by_what_they_look_for() -> None:
    chance = {"same_frame": 0.1, "same_place": 0.05, "first_frame": 0.1, "text": 0.0}
    assert kind(chance, chance) == "global"
    assert kind({**chance, "same_frame": 0.15}, chance) == "global"
    # Beyond chance counts, not mass.
    assert kind({**chance, "same_frame": 0.3, "same_place": 0.27}, chance) == "temporal"
    assert kind({**chance, "same_frame": 0.8}, chance) == "local"
    assert kind({**chance, "first_frame": 0.5}, chance) == "first frame"
    assert kind({**chance, "text": 0.4}, chance) == "text"
    rows = [{"step": 2, "kind": ["text", "local"]}, {"step": 2, "kind": ["local"]}]
    assert counted(rows) == {2: {"text": 1, "local": 2}}


def test_reasons_are_those_of_the_run(seen: Any) -> None:
    why = reasons(seen, vidaccel.Schedule(dense_steps=2, dense_layers=(0, -1)), 4, 3, 0.4)
    plan = " ".join(why["plan"])
    assert "radial was asked for 0.4 and keeps 0.4" in plan
    assert "topk was asked for 0.4" in plan
    assert "pyramid" not in plan
    assert why["backend"][0].startswith("cpu runs q (1, 448, 2, 32) over 448 keys, float32 on cpu, blocks of 16")
    assert any(text.startswith("gluon: ") for text in why["backend"])
    assert why["schedule"][0].startswith("dense: steps 0-1 (of 4), layers 0, 2 (of 3); 17% of all calls")
    # Step 1 is dense, and so are two of three layers of step 3.
    expected = [row["kept"]["radial"] for row in seen.rows if (row["step"], row["layer"]) != (3, 1)]
    mean = sum(map(sum, expected)) / 10
    assert f"where the schedule stays dense radial would keep {mean:.3f}" in why["schedule"][1]
    assert "keeps nothing dense in 4 steps" in reasons(seen, vidaccel.Schedule(), 4, 3, 0.4)["schedule"][0]


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
    data = {**seen.data(), "about": {"prompt": "<script>"}, "why": {"plan": ["<b>because</b>"]}}
    page = pages.html(data)
    assert "<script>" not in page
    assert "<b>" not in page
    assert "Mass that radial keeps" in page
    assert "Where radial loses most" in page
    assert "Why this plan" in page
    assert "Mass that pyramid keeps" not in page
    assert "Mass on text" not in page
    picture = Image.open(io.BytesIO(pages.png(data))).convert("RGB")
    # Every head of every layer and step has its cell.
    away = np.abs(np.asarray(picture).astype(int) - tuple(bytes.fromhex(pages.COLOURS["global"][1:]))).max(-1)
    cells = (away < 3).sum() / 23**2
    assert cells == pytest.approx(2 * 3 * 2, abs=0.5)
