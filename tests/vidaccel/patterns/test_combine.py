"""Unions and patterns per layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidaccel.blocks import BlockMask
from vidaccel.errors import PatternError
from vidaccel.grid import Site, TokenLayout
from vidaccel.patterns import (
    Ann,
    FlashBlock,
    FreeSwim,
    LightForcing,
    Neighborhood,
    PerHead,
    PerLayer,
    Pyramid,
    Radial,
    SlidingWindow,
    SparseVideoGen,
    TopK,
    Union,
)
from vidaccel.patterns.combine import first_frames, reblocked
from vidaccel.recipe import Recipe

GRID = (5, 6, 8)


def site(layer: int = 0) -> Site:
    return Site(f"blocks.{layer}.attn1.processor", layer, "self", "wan")


def dense(mask: BlockMask) -> torch.Tensor:
    return mask.to_dense()[0]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([None, (1, 4, 4), (2, 3, 2)]), st.sampled_from([0, 5]), st.booleans())
def test_reblocked_is_the_smallest_map_that_holds_the_mask(seed, tile, text, text_first):
    raster = TokenLayout.of(GRID, text, 16, text_first=text_first)
    keep = torch.rand(2, raster.blocks, raster.blocks, generator=torch.Generator().manual_seed(seed)) < 0.1
    mask = BlockMask.of(keep, raster)
    layout = raster.tiled(tile)
    found = reblocked(mask, layout)
    slots = torch.zeros(2, layout.blocks * 16, layout.blocks * 16, dtype=torch.bool)
    slots[:, layout.slot_of[:, None], layout.slot_of] = mask.to_dense()
    expected = slots.view(2, layout.blocks, 16, layout.blocks, 16).any(4).any(2)
    assert torch.equal(found.block_map() > 0, expected)
    assert found.window is None


def test_first_frames():
    layout = TokenLayout.of(GRID, 4, 16)
    mask = dense(first_frames(layout, 2, 16))
    assert mask[:, : 2 * 48].all()
    assert mask[240:].all()
    assert mask[:, 240:].all()
    assert not mask[:240, 2 * 48 : 240].any()


def test_union_keeps_what_each_part_keeps():
    layout = TokenLayout.of(GRID, 4, 16)
    parts = (
        Neighborhood((3, 3, 3), block=16, sink_frames=1),
        Radial(rule="released", decay=0.3, block=16),
        SlidingWindow(3, block=16),
    )
    plan = Union(parts, sink_frames=1).plan(layout, None, site())
    alone = [part.plan(layout, None, site()).mask for part in parts]
    together = dense(plan.mask)
    assert all(together[dense(mask)].all() for mask in alone)
    assert together[:, :48].all()
    assert torch.equal(plan.layout.order, alone[0].layout.order)
    column = Neighborhood((0, 1, 2), tile=plan.layout.tile, block=16).plan(layout, None, site())
    same_order = Union((parts[0], Neighborhood((0, 1, 2), block=16))).plan(layout, None, site())
    assert torch.equal(dense(same_order.mask), dense(alone[0]) | dense(reblocked(column.mask, plan.layout)))
    exact = dense(alone[0]) | dense(reblocked(alone[1], plan.layout)) | dense(reblocked(alone[2], plan.layout))
    assert torch.equal(together, exact | dense(reblocked(first_frames(layout, 1, 16), plan.layout)))
    assert plan.mask.window is not None


def test_union_of_one_part_is_that_part():
    layout = TokenLayout.of(GRID, block=16)
    one, two = (p.plan(layout, 0.4, site()) for p in (Union((Radial(block=16),)), Radial(block=16)))
    assert torch.equal(dense(one.mask), dense(two.mask))


@pytest.mark.parametrize("density", [0.45, 0.5, 0.6])
@pytest.mark.parametrize("first", [Neighborhood(), SlidingWindow(), Radial(rule="ranked", sink=False)])
def test_density_is_that_of_the_whole(first, density):
    union = Union((first, Neighborhood((0, 1, 1))), sink_frames=1)
    plan = union.plan(TokenLayout.of((13, 30, 40)), density, site())
    near = plan.delivered == pytest.approx(density, rel=0.05)
    assert near != any(f"comes no nearer to {density}" in note for note in plan.notes)
    assert near or isinstance(first, SlidingWindow)
    assert "neighborhood + first frames" in plan.rule


@pytest.mark.parametrize(
    "first", [TopK(block=16), LightForcing(block=16), SparseVideoGen(block=16), TopK(top_p=0.5, block=16)],
    ids=lambda pattern: pattern.name,
)  # fmt: skip
@pytest.mark.parametrize("text", [0, 5])
def test_what_chooses_does_so_around_what_others_keep(first, text):
    layout = TokenLayout.of((6, 7, 9), text, 16)
    window = Neighborhood((3, 3, 3), block=16)
    plan = Union((first, window), sink_frames=1).plan(layout, 0.7, site())
    assert plan.mask is None
    tiled = plan.layout
    generator = torch.Generator().manual_seed(0)
    q, k, v = (tiled.to_kernel(torch.randn(1, layout.tokens, 2, 16, generator=generator)) for _ in range(3))
    chosen = plan.select(q, k, v).mask
    around = window.plan(layout, None, site()).mask
    kept = dense(chosen)
    assert kept[dense(around)].all()
    assert kept[:, : layout.grid.frame].all()
    rows = chosen.video_map().bool().sum(-1)
    if plan.varies:
        assert (rows <= plan.select.kept).all()
    else:
        assert (rows == plan.select.kept).all()
        assert plan.delivered == pytest.approx(0.7, rel=0.05)
    assert "neighborhood + first frames" in plan.rule


@pytest.mark.parametrize("first", [Ann(block=16), Pyramid(block=16)], ids=lambda pattern: pattern.name)
def test_what_moves_tokens_joins_nothing(first):
    layout = TokenLayout.of((6, 8, 8), 0, 16)
    with pytest.raises(PatternError, match=f"{first.name} moves or merges tokens"):
        Union((first, SlidingWindow(3, block=16))).plan(layout, 0.6, site())
    with pytest.raises(PatternError, match=f"{first.name} moves or merges tokens"):
        PerHead((first, TopK(block=16)), (0, 1)).plan(layout, 0.6, site())


def test_one_part_chooses():
    layout = TokenLayout.of((6, 8, 8), 0, 16)
    plans = [
        Union(parts).plan(layout, 0.6, site())
        for parts in ((SlidingWindow(3, block=16), TopK(block=16)), (TopK(block=16), SlidingWindow(3, block=16)))
    ]
    assert torch.equal(plans[0].select.forced, plans[1].select.forced)
    with pytest.raises(PatternError, match="union of topk and svg was asked for; one part may choose"):
        Union((TopK(), SparseVideoGen()))
    plan = TopK(block=16).plan(layout, 0.6, site())
    with pytest.raises(PatternError, match="give that pattern layers of its own"):
        _ = plan.static


def test_per_head_masks():
    layout = TokenLayout.of(GRID, 4, 16)
    parts = (Neighborhood((3, 3, 3), block=16), SlidingWindow(5, block=16))
    plan = PerHead(parts, (0, 1, 1)).plan(layout, None, site())
    window, line = (part.plan(layout, None, site()).mask for part in parts)
    heads = plan.mask.to_dense()
    assert torch.equal(heads[0], dense(window))
    assert torch.equal(heads[1], heads[2])
    assert torch.equal(heads[1], dense(reblocked(line, plan.layout)))
    assert heads[1][dense(line)].all()
    assert plan.delivered == pytest.approx(float(heads[:, :240, :240].float().mean()))


def test_parts_may_differ_between_heads_themselves():
    """Windows of single heads, or another per-head pattern, as parts: no head gets another one's rows."""
    layout = TokenLayout.of((8, 16, 16), 4, 64)
    windows, box = SlidingWindow(heads=((1, 1, 1), (2, 3, 1)), block=64), Neighborhood((1, 1, 9), block=64)
    best, line = TopK(block=64), SlidingWindow(block=64)
    own = windows.plan(layout, None, site()).mask
    assert not torch.equal(*own.block_map())
    first = PerHead((windows, box), (1, 0)).plan(layout, None, site()).mask
    assert torch.equal(first.block_map()[1], own.block_map()[1])
    second = PerHead((box, windows), (0, 1)).plan(layout, None, site()).mask
    assert torch.equal(second.block_map()[1], reblocked(own, second.layout).block_map()[1])

    q, k, v = (torch.randn(1, layout.slots, 2, 8, generator=torch.Generator().manual_seed(0)) for _ in range(3))
    nested = PerHead((Radial(rule="ranked", block=64), line), (0, 1))
    plan = PerHead((best, nested), (0, 1)).plan(layout, 0.5, site())
    line_alone = reblocked(line.plan(layout, 0.5, site()).mask, plan.layout)
    assert torch.equal(plan.select(q, k, v).mask.block_map()[1], line_alone.block_map()[0])
    assert plan.delivered == pytest.approx(plan.select(q, k, v).mask.density, rel=0.02)
    around = Union((best, windows)).plan(layout, 0.6, site())
    kept = around.select(q, k, v).mask.block_map() > 0
    assert kept[reblocked(own, around.layout).block_map() > 0].all()


@pytest.mark.parametrize("batch", [1, 2])
def test_per_head_choices(batch):
    layout = TokenLayout.of((6, 7, 9), 5, 16)
    best = TopK(block=16)
    parts = ({"name": "neighborhood", "block": 16}, best, SparseVideoGen(block=16))
    plan = PerHead(parts, (0, 1, 2, 1)).plan(layout, 0.5, site())
    tiled = plan.layout
    generator = torch.Generator().manual_seed(0)
    q, k, v = (tiled.to_kernel(torch.randn(1, layout.tokens, 4 * batch, 16, generator=generator)) for _ in range(3))
    mask = plan.select(q, k, v).mask
    assert mask.density == pytest.approx(plan.delivered, rel=0.02)
    rows = mask.block_map()
    alone = best.plan(layout, 0.5, site()).select(q, k, v).mask.block_map()
    shapes = SparseVideoGen(block=16).plan(layout, 0.5, site()).select(q, k, v).mask.block_map()
    near = reblocked(Neighborhood(block=16).plan(layout, 0.5, site()).mask, tiled).block_map()[0]
    for head in range(4 * batch):
        expected = {0: near, 1: alone[head], 2: shapes[head], 3: alone[head]}[head % 4]
        assert torch.equal(rows[head], expected)


def test_per_layer():
    layout = TokenLayout.of(GRID, block=16)
    pattern = PerLayer({0: Radial(block=16), 2: SlidingWindow(block=16)})
    assert pattern.per_site
    rules = [pattern.plan(layout, 0.5, site(layer)).rule for layer in range(4)]
    assert [rule.split()[0] for rule in rules] == [rules[0].split()[0]] * 2 + ["window"] * 2
    assert not Union((Radial(), FreeSwim())).per_site
    assert Union((pattern, SlidingWindow(3, block=16))).per_site


def test_recipes_hold_their_parts():
    text = """
        attention:
          name: per-layer
          layers:
            0: {name: union, parts: [{name: neighborhood, stride: [1, 2, 2]}, sliding-window], sink_frames: 1}
            4: radial
        density: 0.3
    """
    recipe = Recipe.from_text(text)
    assert Recipe.from_text(recipe.to_yaml()) == recipe
    union = recipe.attention.patterns[0]
    assert union.patterns == (Neighborhood(stride=(1, 2, 2)), SlidingWindow())
    assert recipe.attention.patterns[4] == Radial()
    assert recipe.hash == Recipe.from_text(recipe.to_yaml()).hash
    built = PerLayer({0: Union((Neighborhood(stride=(1, 2, 2)), SlidingWindow()), 1), 4: Radial()})
    assert built.patterns[0].patterns == union.patterns


@pytest.mark.parametrize(
    "pattern",
    [
        TopK(top_p=0.9, reselect=(0, 5)),
        Pyramid((0.1, 0.1, 0.1, 0.1)),
        SparseVideoGen(reselect=3),
        FreeSwim((4, 4), guide=2, guide_gib=1.0, logit_scale=2.0),
        PerHead((TopK(), Neighborhood(stride=(1, 2, 2))), (0, 1)),
        Union((TopK(reselect=2), Neighborhood((3, 3, 3)))),
        PerLayer({0: Union((Radial(), SlidingWindow(heads=((1, 1, 1), (3, 3, 3)))))}),
    ],
    ids=lambda pattern: pattern.name,
)
def test_patterns_survive_a_file(pattern):
    recipe = Recipe(attention=pattern)
    again = Recipe.from_text(recipe.to_yaml())
    assert again == recipe
    assert again.hash == recipe.hash


def test_wrong_parts_name_right_ones():
    layout = TokenLayout.of(GRID, block=16)
    with pytest.raises(PatternError, match="union of no patterns"):
        Union(())
    with pytest.raises(PatternError, match="give all the same block"):
        Union((Radial(block=64), Radial()))
    with pytest.raises(PatternError, match="'spiral' is unknown; patterns: ann"):
        Union(({"name": "spiral"},))
    with pytest.raises(PatternError, match="radial cannot be built"):
        Union(({"name": "radial", "width": 3},))
    with pytest.raises(PatternError, match="give each head the number of its part, 0 to 1, and each part a head"):
        PerHead((Radial(), SlidingWindow()), (0, 2))
    with pytest.raises(PatternError, match="give all the same block"):
        PerHead((Radial(block=64), Radial()), (0, 1))
    with pytest.raises(PatternError, match="the first range begins at layer 0"):
        PerLayer({2: Radial()})
    for own in (FreeSwim(logit_scale=2.0), FreeSwim(guide=2), PerLayer({0: FreeSwim(guide=1)})):
        for make in (lambda p: Union((Radial(), p)), lambda p: PerHead((Radial(), p), (0, 1)), FlashBlock):
            with pytest.raises(PatternError, match="give freeswim layers of its own with per-layer"):
                make(own)
    with pytest.raises(PatternError, match=r"sliding-window stands behind radial.*its own window or heads"):
        Union((Radial(block=16), SlidingWindow(block=16))).plan(layout, 0.5, site())
    with pytest.raises(PatternError, match="other than the first keep"):
        Union((Radial(block=16), SlidingWindow(5, block=16))).plan(layout, 0.1, site())
