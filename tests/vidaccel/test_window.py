"""Windows packed into words, against the rule that they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vidaccel.errors import PatternError
from vidaccel.window import BITS, Window, inside

# Where fields begin and end: one position, powers of two and their neighbours.
EXTENTS = st.lists(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 31, 45, 80, 127, 128]), min_size=1, max_size=3)


def tables(extents: list[int], seed: int, queries: int = 40, keys: int = 50) -> tuple[torch.Tensor, ...]:
    """lo, hi (queries, axes), of which some are empty, reversed or reach beyond the axis, and pos (keys, axes)."""
    draw = torch.Generator().manual_seed(seed)

    def positions(n: int, least: int, beyond: int) -> torch.Tensor:
        return torch.stack([torch.randint(least, e + beyond, (n,), generator=draw) for e in extents], 1)

    return positions(queries, -3, 3), positions(queries, -3, 4), positions(keys, -1, 2)


def kept(lo: torch.Tensor, hi: torch.Tensor, pos: torch.Tensor, extents: list[int]) -> torch.Tensor:
    """(queries, keys) bool: the rule."""
    there = ((pos >= 0) & (pos < torch.tensor(extents))).all(1)
    return ((lo[:, None] <= pos) & (pos < hi[:, None])).all(-1) & there


@settings(max_examples=150, deadline=None)
@given(EXTENTS, st.integers(0, 10**6))
@example([1], 0)
@example([511, 511, 255], 0)
@example([2 ** (BITS - 1) - 1], 0)
def test_packed_windows_keep_the_same(extents, seed):
    sides = tables(extents, seed)
    # The whole axis, its first and its last position.
    ends = [(torch.zeros(3), torch.tensor([e, 1, e]), torch.tensor([0, e - 1, e // 2])) for e in extents]
    edges = [torch.stack(side, 1).int() for side in zip(*ends, strict=True)]
    edges[0][2] = torch.tensor(extents) - 1
    lo, hi, pos = (torch.cat([a, b]) for a, b in zip(sides, edges, strict=True))
    window, expected = Window.of(lo, hi, pos, extents), kept(lo, hi, pos, extents)
    assert [word.dtype for word in window[:3]] == [torch.int32] * 3
    assert [word.shape for word in window[:3]] == [(len(lo),), (len(lo),), (len(pos),)]
    assert torch.equal(window.kept(), expected)
    some = torch.arange(0, len(lo), 3), torch.arange(1, len(pos), 2)
    assert torch.equal(window.kept(*some), expected[some[0]][:, some[1]])
    low, end, place = window.axes()
    assert low.shape == lo.shape
    assert torch.equal(((low[:, None] <= place) & (place < end[:, None])).all(-1), expected)


@settings(max_examples=50, deadline=None)
@given(EXTENTS, st.integers(0, 1000))
def test_no_window_holds_what_is_no_key(extents, seed):
    window = Window.of(*tables(extents, seed), extents)
    assert not inside(window.lo, window.hi, torch.tensor([-1], dtype=torch.int32), window.guards).any()


def test_every_pair_of_an_axis():
    """All intervals and positions of one axis beside others, so that a borrow would be seen."""
    for extent in (1, 2, 3, 4, 8):
        lo, end = torch.cartesian_prod(torch.arange(extent), torch.arange(extent + 1)).T
        lo, hi = (torch.stack([side, side, side], 1) for side in (lo, end))
        pos = torch.cartesian_prod(*[torch.arange(extent)] * 3)
        assert torch.equal(Window.of(lo, hi, pos, [extent] * 3).kept(), kept(lo, hi, pos, [extent] * 3))


def test_too_many_positions():
    here = torch.zeros(4, 3, dtype=torch.int32)
    Window.of(here, here + 1, here, (511, 511, 255))
    with pytest.raises(PatternError, match=r"axes of 512, 512, 512 positions takes 33 bits .* there are 30; give"):
        Window.of(here, here + 1, here, (512, 512, 512))


def test_equal_words_with_other_guards_are_another_rule():
    one, two = (Window.of(*[torch.zeros(2, 1, dtype=torch.int32)] * 3, [extent]) for extent in (3, 4))
    assert one.equals(Window(*(word.clone() for word in one[:3]), one.guards))
    assert not one.equals(two)
    assert not one.equals(one._replace(guards=two.guards))
