"""Windows packed into words, against the rule that they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vidaccel.errors import PatternError
from vidaccel.window import BITS, Window, inside, no_key

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
    words = [word for word in window[:3] if word is not None]
    assert {word.dtype for word in words} == {torch.int32}
    assert [len(word) for word in words] == [len(lo)] * (len(words) - 1) + [len(pos)]
    assert torch.equal(window.kept(), expected)
    some = torch.arange(0, len(lo), 3), torch.arange(1, len(pos), 2)
    assert torch.equal(window.kept(*some), expected[some[0]][:, some[1]])
    assert_taken_apart(window, expected)


def assert_taken_apart(window: Window, expected: torch.Tensor) -> None:
    low, end, place = window.axes()
    assert low.shape[1] == end.shape[1] == place.shape[1]
    assert torch.equal(((low[:, None] <= place) & (place < end[:, None])).all(-1), expected)


@settings(max_examples=200, deadline=None)
@given(EXTENTS, st.integers(0, 10**6), st.booleans())
@example([13, 30, 45], 1, True)
@example([1, 1, 1], 0, True)
def test_equally_long_windows_are_one_word(extents, seed, some_keep_nothing):
    """Windows that begin or end with their axis may be shorter."""
    draw = torch.Generator().manual_seed(seed)
    length = torch.tensor([int(torch.randint(1, e + 1, (), generator=draw)) for e in extents])
    extent = torch.tensor(extents)
    # From one that keeps the first position alone to one that keeps the last.
    begin = torch.stack(
        [torch.randint(1 - int(w), e, (60,), generator=draw) for w, e in zip(length, extents, strict=True)], 1
    )
    begin[0] = 0
    lo, hi = begin.clamp(min=0), torch.minimum(begin + length, extent)
    if some_keep_nothing:
        hi[1::7] = lo[1::7]
    pos = torch.stack([torch.randint(-1, e + 1, (50,), generator=draw) for e in extents], 1)
    window, expected = Window.of(lo, hi, pos, extents), kept(lo, hi, pos, extents)
    if sum(e.bit_length() + 3 for e in extents) <= 32:
        assert window.hi is None
    assert torch.equal(window.kept(), expected)
    assert_taken_apart(window, expected)
    nobody = torch.tensor([no_key(window.guards)], dtype=torch.int32)
    assert not inside(window.lo, window.hi, nobody, window.guards).any()
    assert window.equals(window.to("cpu"))


@settings(max_examples=50, deadline=None)
@given(EXTENTS, st.integers(0, 1000))
def test_no_window_holds_what_is_no_key(extents, seed):
    window = Window.of(*tables(extents, seed), extents)
    assert not inside(
        window.lo, window.hi, torch.tensor([no_key(window.guards)], dtype=torch.int32), window.guards
    ).any()


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
    assert one.equals(one._replace(lo=one.lo.clone(), pos=one.pos.clone()))
    assert not one.equals(two)
    assert not one.equals(one._replace(guards=two.guards))
