"""Unions, and patterns per head and per layer, against what their parts keep alone."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
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


def whole_blocks(pairs: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """(h, tokens, tokens) bool: the blocks that hold any of these pairs, whole."""
    block = layout.slot_of // layout.block
    kept = torch.zeros(len(pairs), layout.blocks, layout.blocks, dtype=torch.bool)
    head, query, key = pairs.nonzero(as_tuple=True)
    kept[head, block[query], block[key]] = True
    return kept[:, block][:, :, block]


def fixed_parts(grid: tuple[int, int, int], block: int) -> dict[str, Any]:
    """Parts that need no density, and where grids are small too."""
    return {
        "window": Neighborhood(tuple(min(3, side) for side in grid), block=block),
        "line": SlidingWindow(1, block=block),
        "inward": FreeSwim((2, 4), block=block),
        "radial": Radial(decay=0.3, block=block, sink=False),
    }


KINDS = st.sampled_from(["window", "line", "inward", "radial"])
LAYOUTS = (
    st.tuples(st.integers(1, 5), st.integers(2, 7), st.integers(2, 9)),
    st.sampled_from([0, 5, 20]),
    st.booleans(),
    st.sampled_from([16, 32, 64]),
)


@settings(max_examples=50, deadline=None)
@given(*LAYOUTS, st.lists(KINDS, min_size=1, max_size=3), st.integers(0, 1))
@example((4, 5, 5), 0, False, 32, ["line", "window"], 0)
def test_union_is_its_first_part_and_whole_blocks_of_the_others(grid, text, text_first, block, kinds, sink):
    layout = TokenLayout.of(grid, text, block, text_first=text_first)
    first, *others = (fixed_parts(grid, block)[kind] for kind in kinds)
    plan = Union((first, *others), sink_frames=sink).plan(layout, None, site())
    frames = torch.zeros(layout.tokens, layout.tokens, dtype=torch.bool)
    start = text if text_first else 0
    frames[:, start : start + sink * grid[1] * grid[2]] = True
    expected = whole_blocks(frames[None], plan.layout)[0]
    if kinds[0] != "radial":
        # It has a sink of its own.
        first = replace(first, sink_frames=sink)
    expected = expected | dense(first.plan(layout, None, site()).mask)
    for part in others:
        expected = expected | whole_blocks(dense(part.plan(layout, None, site()).mask)[None], plan.layout)[0]
    assert torch.equal(dense(plan.mask), expected)
    video = slice(start, start + layout.grid.tokens)
    assert plan.delivered == pytest.approx(float(expected[video, video].double().mean()))


@settings(max_examples=25, deadline=None)
@given(
    *LAYOUTS,
    st.lists(KINDS, min_size=1, max_size=2),
    st.integers(0, 1),
    st.floats(0.4, 1.0),
    st.integers(1, 2),
    st.integers(0, 1000),
)
def test_what_chooses_takes_the_best_beside_the_others(
    grid, text, text_first, block, kinds, sink, density, batch, seed
):
    layout = TokenLayout.of(grid, text, block, text_first=text_first)
    others = [fixed_parts(grid, block)[kind] for kind in kinds]
    union = Union((*others, TopK(block=block, sink_frames=0)), sink_frames=sink)
    try:
        plan = union.plan(layout, density, site())
    except PatternError:
        with pytest.raises(PatternError, match="what every choice keeps"):
            union.plan(layout, density, site())
        return
    tiled = plan.layout
    video, kept = tiled.video_blocks, round(density * tiled.video_blocks)
    pairs = torch.eye(layout.tokens, dtype=torch.bool)
    start = text if text_first else 0
    pairs[:, start : start + sink * grid[1] * grid[2]] = True
    for part in others:
        pairs = pairs | dense(part.plan(layout, None, site()).mask)
    fixed = whole_blocks(pairs[None], tiled)[0]
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, layout.tokens, 2 * batch, 16, generator=generator) for _ in range(2))
    found = plan.select.choose(*(tiled.to_kernel(x) for x in (q, k, k))).mask.to_dense()
    block_of = tiled.slot_of // block
    tokens = [(block_of == n).nonzero()[:, 0] for n in range(video)]
    words = torch.cat([torch.arange(start), torch.arange(start + layout.grid.tokens, layout.tokens)])
    assert found[:, words].all()
    assert found[:, :, words].all()
    for head, row in itertools.product(range(2 * batch), range(video)):
        mine = {n for n in range(video) if fixed[tokens[row][0], tokens[n][0]]}
        assert len(mine) <= kept
        query = q[0, tokens[row], head].mean(0)
        score = [float(query @ k[0, tokens[n], head].mean(0)) for n in range(video)]
        rest = sorted(set(range(video)) - mine, key=score.__getitem__, reverse=True)
        wanted = kept - len(mine)
        if 0 < wanted < len(rest):
            assume(score[rest[wanted - 1]] - score[rest[wanted]] > 1e-6)  # rounding decides nothing
        mine |= set(rest[:wanted])
        for n in range(video):
            assert (found[head, tokens[row]][:, tokens[n]] == (n in mine)).all()


@settings(max_examples=25, deadline=None)
@given(
    *LAYOUTS,
    st.lists(st.sampled_from(["window", "tiles", "radial", "topk", "svg"]), min_size=1, max_size=3),
    st.floats(0.3, 0.9),
    st.integers(1, 2),
    st.data(),
)
def test_each_head_keeps_what_its_part_does(grid, text, text_first, block, kinds, density, batch, data):
    layout = TokenLayout.of(grid, text, block, text_first=text_first)
    pool = {
        "window": Neighborhood(block=block),
        "tiles": SlidingWindow(block=block),
        "radial": Radial(rule="ranked", block=block),
        "topk": TopK(block=block, sink_frames=0),
        "svg": SparseVideoGen(block=block, sink_frames=0),
    }
    parts = [pool[kind] for kind in kinds]
    heads = data.draw(st.permutations([*range(len(parts)), *data.draw(st.lists(st.integers(0, len(parts) - 1)))][:5]))
    pattern = PerHead(tuple(parts), tuple(heads))
    try:
        alone = [part.plan(layout, density, site()) for part in parts]
    except PatternError:
        with pytest.raises(PatternError):
            pattern.plan(layout, density, site())
        return
    choosing = [plan for plan in alone if plan.select is not None]
    first = choosing[0] if choosing else alone[0]
    if any(not torch.equal(plan.layout.order, first.layout.order) for plan in choosing):
        with pytest.raises(PatternError, match="a tile order of its own"):
            pattern.plan(layout, density, site())
        return
    plan = pattern.plan(layout, density, site())
    assert torch.equal(plan.layout.order, first.layout.order)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    q, k, v = (torch.randn(1, layout.tokens, len(heads) * batch, 16, generator=generator) for _ in range(3))
    qkv = [first.layout.to_kernel(x) for x in (q, k, v)]
    found = plan.select.choose(*qkv).mask.to_dense() if choosing else plan.mask.to_dense().repeat(batch, 1, 1)
    assert len(found) == len(heads) * batch
    for head in range(len(heads) * batch):
        mine = alone[heads[head % len(heads)]]
        if mine.select is not None:
            expected = mine.select.choose(*(x[:, :, head : head + 1] for x in qkv)).mask.to_dense()
        else:
            expected = mine.mask.to_dense()
            if choosing or mine is not first:
                expected = whole_blocks(expected, first.layout)
        assert torch.equal(found[head], expected[0])
    if not choosing:
        video = slice(text, None) if text_first else slice(layout.grid.tokens)
        assert plan.delivered == pytest.approx(float(found[:, video, video].double().mean()))


@settings(max_examples=25, deadline=None)
@given(*LAYOUTS, st.dictionaries(st.integers(1, 9), KINDS, max_size=3), KINDS)
def test_each_layer_keeps_what_the_last_range_before_it_does(grid, text, text_first, block, later, first):
    layout = TokenLayout.of(grid, text, block, text_first=text_first)
    kinds = {**later, 0: first}
    parts = fixed_parts(grid, block)
    kept = {kind: dense(parts[kind].plan(layout, None, site()).mask) for kind in kinds.values()}
    pattern = PerLayer({start: parts[kind] for start, kind in kinds.items()})
    own = first
    for layer in range(max(kinds) + 2):
        own = kinds.get(layer, own)
        assert torch.equal(dense(pattern.plan(layout, None, site(layer)).mask), kept[own])
    assert torch.equal(dense(PerLayer({0: pattern}).plan(layout, None, site(layer)).mask), kept[own])


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
