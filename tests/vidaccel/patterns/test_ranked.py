"""Radial attention by rank, in plain loops; `tests/vidaccel/test_radial.py` has the released rule and the rest."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vidaccel.errors import PatternError
from vidaccel.grid import Site, TokenLayout
from vidaccel.patterns import Radial

SITE = Site("blocks.0.attn1.processor", 0, "self", "wan")


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 8), st.integers(2, 9)),
    st.sampled_from([0, 5, 20]),
    st.booleans(),
    st.sampled_from([16, 32, 64]),
    st.floats(0.1, 1.0),
    st.booleans(),
)
def test_rows_are_the_nearest_tiles(grid, text, text_first, block, density, sink):
    layout = TokenLayout.of(grid, text, block, text_first=text_first)
    try:
        plan = Radial(rule="ranked", block=block, sink=sink).plan(layout, density, SITE)
    except PatternError:
        assume(False)
    tiled = plan.layout
    video, tokens = tiled.video_blocks, layout.grid.tokens
    places = [tiled.positions[n * block : n * block + int(tiled.q_len[n])].tolist() for n in range(video)]
    centres = [[sum(axis) / len(tile) for axis in zip(*tile, strict=True)] for tile in places]
    dense = plan.mask.to_dense()[0]
    start = text if text_first else 0
    token = [[start + (t * grid[1] + y) * grid[2] + x for t, y, x in tile] for tile in places]
    for row, (t, y, x) in enumerate(centres):
        costs = [
            (
                n != row,
                not (sink and grid[0] > 1 and places[n][0][0] == 0),
                # Equally far tiles go by their number.
                round(abs(u - t) + 3 * math.hypot(v - y, w - x) / math.hypot(*grid[1:]), 4),
                n,
            )
            for n, (u, v, w) in enumerate(centres)
        ]
        order = [n for *_, n in sorted(costs)]
        kept = [n for n in order if dense[token[row][0], token[n][0]]]
        assert kept == order[: len(kept)]
        assert abs(sum(len(token[n]) for n in kept) - density * tokens) <= block or len(kept) == video
        for n in range(video):
            assert (dense[token[row]][:, token[n]] == (n in kept)).all()
    words = [n for n in range(layout.tokens) if not start <= n < start + tokens]
    assert dense[words].all()
    assert dense[:, words].all()
    assert plan.delivered == pytest.approx(float(dense[start : start + tokens, start : start + tokens].double().mean()))
