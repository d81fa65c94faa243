"""The problems on which `vidaccel bench kernels` times attention: real lengths, and masks of real patterns."""

from __future__ import annotations

from collections.abc import Iterator

from ..blocks import BlockMask
from ..grid import Site, TokenLayout, VideoGrid, choose_tile
from ..kernels.bench import Case
from ..patterns import Neighborhood, Pattern, Radial, SlidingWindow

# name, grid, text, heads, d. Long ones have fewer heads than their models: one head fills a GPU many times over.
SHAPES = (
    ("Wan 480p", (21, 30, 52), 0, 12, 128),
    ("Wan 720p", (21, 45, 80), 0, 8, 128),
    ("HunyuanVideo 720p", (33, 45, 80), 256, 4, 128),
    ("CogVideoX", (13, 30, 45), 226, 48, 64),
)
NAMES = ("radial", "neighborhood", "sliding-window")


def cases(device: str) -> list[Case]:
    """What is measured on a device."""
    if device == "cpu":
        video = [Case("4,608 tokens", (8, 24, 24), 0, 8, 64, 128, density, "float32") for density in (0.25, 0.5, 1.0)]
        sample = [Case("sample model", (9, 16, 16), 0, 3, 64, block, 0.35, "float32") for block in (128, 64, 32, 16)]
        return video + sample
    found = []
    for shape in SHAPES:
        for block, random in ((128, (1.0, 0.5, 0.25, 0.1, 0.05)), (64, (0.25, 0.1))):
            found += [Case(*shape, block, density, "bfloat16") for density in random]
            found += [Case(*shape, block, x, "bfloat16", name) for name in NAMES for x in (0.25, 0.1)]
    return found


def problems(chosen: list[Case]) -> Iterator[tuple[Case, BlockMask | None]]:
    """The cases with their masks, each made when it is asked for; random ones make their own."""
    for case in chosen:
        yield case, None if case.pattern == "random" else mask_of(case)


def mask_of(case: Case) -> BlockMask:
    """The mask that a layer in the middle of a Wan model would have."""
    grid = VideoGrid(*case.grid)
    patterns: dict[str, Pattern] = {
        "radial": Radial(block=case.block),
        # A stride of one tile keeps whole tiles.
        "neighborhood": Neighborhood(block=case.block, stride=choose_tile(grid, case.block)),
        "sliding-window": SlidingWindow(block=case.block),
    }
    layout = TokenLayout.of(grid, case.text, case.block)
    plan = patterns[case.pattern].plan(layout, case.density, Site("blocks.10.attn1.processor", 10, "self", "wan"))
    assert plan.mask is not None
    return plan.mask
