"""One density over methods that go together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from vidaccel.errors import UsageError
from vidaccel.reuse import AnnCross, CausalAnn, CausalLightForcing, FlashBlock, Methods, TempCache
from vidaccel.reuse.plan import ChunkPlanner
from vidaccel.streaming import Rollout

ROLLOUT = Rollout(chunk=3, window=12)
EACH = {
    "light-forcing": (CausalLightForcing(block=16),),
    "light-forcing among merged keys": (TempCache(frames=3), CausalLightForcing(block=16)),
    "neighbours": (CausalAnn(block=16),),
    "neighbours among merged keys": (TempCache(frames=2, recent=3), CausalAnn(block=16), FlashBlock()),
    "neighbours among fewer merged keys than asked for": (TempCache(frames=8, recent=6), CausalAnn(block=16)),
    "merged keys": (TempCache(), AnnCross()),
}


def density_of(methods: Methods, rollout: Rollout) -> float:
    """Of a chunk far behind the first ones, all of whose history is there."""
    planner = ChunkPlanner(replace(methods, break_even=1e9), rollout, (8, 8), torch.device("cpu"))
    start = 300
    kept = list(range(rollout.sink)) + list(range(start - (planner.window or 12) + 3 + rollout.sink, start))
    return planner.plan(start, 3, kept).density


@pytest.mark.parametrize("sink", [0, 1])
@pytest.mark.parametrize("density", [0.5, 0.45])
@pytest.mark.parametrize("name", EACH)
def test_a_chunk_has_the_density_that_was_asked_for(name: str, density: float, sink: int) -> None:
    rollout = replace(ROLLOUT, sink=sink)
    methods = Methods.of(EACH[name])
    light = isinstance(methods.select, CausalLightForcing)
    # Light Forcing's is a mean that later chunks fall below; level, it is theirs.
    within = methods.within(density, rollout)
    if light:
        assert isinstance(within.select, CausalLightForcing)
        within = replace(within, select=replace(within.select, base_density=density))
    # Merged keys come in whole frames, of which a twelfth is the window's share.
    grain = 1 / 12 if methods.select is None else 16 / (12 * 64)
    assert (
        density - grain - 1e-9 <= density_of(within, rollout) <= density + 1e-9 + grain * (methods.select is not None)
    )
    assert (within.flash, within.cross) == (methods.flash, methods.cross)


def test_nothing_is_merged_where_the_window_ends_before_it() -> None:
    planner = ChunkPlanner(Methods.of([TempCache(recent=9)]), ROLLOUT, (8, 8), torch.device("cpu"))
    planned = planner.plan(300, 3, list(range(291, 300)))
    assert (planner.merge, planned.plan.extra, planned.density) == (None, 0, 1)
    assert "TempCache is disabled: a window of 12 frames leaves none to merge" in planned.note


@pytest.mark.parametrize("frames", [21, 60])
def test_a_falling_density_has_the_mean_of_its_video(frames: int) -> None:
    """Of 21 frames the horizon of 63, which is for streams without an end, would make 0.42."""
    methods = Methods.of([CausalLightForcing(block=16)], 1e9).within(0.3, ROLLOUT, frames)
    planner = ChunkPlanner(methods, ROLLOUT, (32, 32), torch.device("cpu"))
    starts = range(3, frames, 3)
    planned = [planner.plan(start, 3, list(range(max(0, start - 9), start))).density for start in starts]
    seen = [min(start + 3, 12) for start in starts]
    assert sum(d * n for d, n in zip(planned, seen, strict=True)) / sum(seen) == pytest.approx(0.3, abs=0.005)


@pytest.mark.parametrize(
    ("methods", "rollout", "density", "words"),
    [
        ((), ROLLOUT, 0.5, "none of the methods has one"),
        ((FlashBlock(),), ROLLOUT, 0.5, "threshold"),
        ((CausalAnn(),), ROLLOUT, 0.25, "leave 0.26 at least"),
        ((TempCache(),), ROLLOUT, 0.3, "leave 0.33 at least"),
        ((TempCache(recent=None),), ROLLOUT, 0.9, "leave 1.00 at least; keep fewer with TempCache.recent"),
        ((CausalAnn(),), Rollout(window=None), 0.5, "without a window"),
        ((CausalLightForcing(),), ROLLOUT, 1.0, "above 0 and below 1"),
    ],
)
def test_what_cannot_be_is_said(methods: Any, rollout: Rollout, density: float, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Methods.of(methods).within(density, rollout)
