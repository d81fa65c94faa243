"""Whether a pattern can make attention faster at a shape: said before it runs, with what would do better.

Idea: a kernel works on whole tiles, so the tiles that a pattern touches bound its gain, whatever its density.
Math: with `visited` pairs over all pairs, attention becomes at most 1 / visited times as fast. A block-sparse kernel
    has some 0.85 of a dense one's rate on whole tiles, 0.6 on those of 64 tokens, and 0.65 on those that are decided
    token by token, so the gain to expect is rate / visited.
    What kernels of ours take for tiles that are cut or have holes, and for merged keys, is `sparse_rate`.
Cost: nothing where there is a gain; elsewhere a few plans of the same grid, once.
Source: Sliding Tile Attention, arXiv 2502.04507, table 1, and Generalized Neighborhood Attention, arXiv 2504.16922,
    section 5: measured 0.65 of the tile bound for token-wise masks, 0.94 and more for whole tiles. Tiles of 64: the
    least that ours ever had of FlashAttention 3 on an H100; 0.70 to 0.78 there now (kernels/bench/NOTES.md).
Limits: an estimate of attention alone; what is measured on a machine goes before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, cast

from ..errors import PatternError
from ..grid import BLOCK_SIZES, Site, TokenLayout
from ..order import choose_tile
from .axes import PARTIAL_RATE, WHOLE_RATE
from .freeswim import FreeSwim
from .neighborhood import Neighborhood
from .plan import Pattern, Plan
from .sliding_window import SlidingWindow

_LEAST_GPU_BLOCK = 64
_SMALL_RATE = 0.6
# Ours on an H200, over the time of a whole tile: what `estimate` counts with. The dense fallback uses `rate`, constants
# and not timings, so that results do not depend on the machine.
CUT_TIMES = 1.4
# Merged keys carry a bias, which comes with each tile. Holes cost what they are of a tile, no more.
BIASED_TIMES = 1.2


def break_even(block: int) -> float:
    """The share of pairs from which on dense attention is as fast as whole tiles of `block` tokens."""
    return _SMALL_RATE if block == _LEAST_GPU_BLOCK else WHOLE_RATE


def rate(plan: Plan) -> float:
    """What a sparse kernel reaches of a dense one's rate, by the share of tiles that are decided token by token."""
    best = break_even(plan.layout.block)
    if plan.mask is None or plan.mask.window is None:
        return best
    kinds = plan.mask.video_map()
    whole = float((kinds == 2).sum() / (kinds > 0).sum())
    return whole * best + (1 - whole) * min(best, PARTIAL_RATE)


def sparse_rate(plan: Plan, best: float | None = None) -> float:
    """What a sparse kernel reaches of a dense one's rate on the tiles of a plan: times of tiles add up.

    Args:
        plan: what is kept.
        best: the rate on whole tiles; None for the usual one.
    """
    best = break_even(plan.layout.block) if best is None else best
    if plan.mask is None:
        return best / (BIASED_TIMES if plan.select is not None and plan.select.biased else 1)
    kinds = plan.mask.video_map()
    cut = float((kinds == 1).sum() / (kinds > 0).sum())
    return best / (1 + (CUT_TIMES - 1) * cut)


def expected_gain(plan: Plan) -> float:
    """How many times as fast attention becomes, by estimate."""
    return rate(plan) / plan.visited


def would_lose(pattern: Pattern, plan: Plan) -> bool:
    """Dense attention is as fast, by estimate, and as good.

    A plan that may keep less than it says is given the benefit of doubt. FreeSwim's windows are there for quality, at
    sizes that a model was not trained for.
    """
    return not plan.varies and not isinstance(pattern, FreeSwim) and expected_gain(plan) <= 1


def advice(
    pattern: Pattern, plan: Plan, layout: TokenLayout, density: float | None, site: Site, *, forced: bool = False
) -> str | None:
    """What to tell a user before a pattern runs that cannot help at this shape; None where it can.

    Args:
        pattern: what was asked for.
        plan: its plan.
        layout: the tokens.
        density: the density that was asked for.
        site: the layer.
        forced: it runs sparse all the same.
    """
    instead = ""
    if would_lose(pattern, plan) and not forced:
        instead = ". Dense attention runs instead; schedule.even_if_slower runs the pattern all the same"
    if plan.delivered >= 1:
        return (
            f"{pattern.name} on a {layout.grid} grid, {plan.rule}: the pattern keeps every pair at this size, so "
            f"nothing is gained; ask for a lower density, or smaller blocks{instead}"
        )
    if expected_gain(plan) > 1:
        return None
    found = _better(_smaller(pattern, layout), plan, layout, density, site)
    found = sorted(_better(_whole(pattern, plan, layout), plan, layout, density, site) + found)
    better = (
        "; ".join(text for _, text in found)
        or "no other stride or block does better, so ask for a lower density, or run it dense"
    )
    return (
        f"{pattern.name} cannot help on a {layout.grid} grid with blocks of {pattern.block}: for a density of "
        f"{plan.delivered:.2f} it visits {plan.visited:.2f} of all pairs, so attention becomes at most "
        f"{1 / plan.visited:.2f} times as fast, and a sparse kernel has about {rate(plan):.0%} of a dense one's rate; "
        f"{better}{instead}"
    )


def _better(
    others: Iterator[tuple[str, Pattern]], plan: Plan, layout: TokenLayout, density: float | None, site: Site
) -> list[tuple[float, str]]:
    """Those of other patterns that gain, with what they visit, in words too."""
    found = []
    for words, other in others:
        try:
            tried = other.plan(layout.tiled(None, other.block), density, site)
        except PatternError:
            continue
        if tried.visited < plan.visited and expected_gain(tried) > 1:
            found.append((tried.visited, f"{words} visits {tried.visited:.2f}"))
    return found


def _whole(pattern: Pattern, plan: Plan, layout: TokenLayout) -> Iterator[tuple[str, Pattern]]:
    """Patterns like this one that leave no tile, or few, to be decided token by token, in words and as such."""
    if not isinstance(pattern, Neighborhood):
        return
    tile = plan.layout.tile
    box = tile if tile is not None and plan.layout.is_boxes else choose_tile(layout.grid, pattern.block)
    stride = tuple(min(side, length) for side, length in zip(box, layout.grid, strict=True))
    if stride != pattern.stride:
        yield f"stride={stride}", replace(pattern, stride=cast(Any, stride))
    if pattern.window is None and max(pattern.dilation) == 1 and not any(pattern.causal):
        yield "sliding-window", SlidingWindow(block=pattern.block, sink_frames=pattern.sink_frames)


def _smaller(pattern: Pattern, layout: TokenLayout) -> Iterator[tuple[str, Pattern]]:
    """The same pattern with smaller blocks, in words and as such."""
    settings: Any = pattern
    if "block" in {field.name for field in fields(settings)}:
        least = BLOCK_SIZES[0] if layout.device.type == "cpu" else _LEAST_GPU_BLOCK
        for block in reversed(BLOCK_SIZES):
            if least <= block < pattern.block:
                yield f"block={block}", cast(Pattern, replace(settings, block=block))
