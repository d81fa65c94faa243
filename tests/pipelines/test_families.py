"""Every pattern on every family: it equals the stock pipeline, whose own SDPA is given the same pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_pipelines

import vidaccel
from vidaccel.patterns import PATTERNS, Pattern
from vidaccel.schedule import Schedule

# One example of each pattern: its parameters, and the density that it is asked for.
EXAMPLES: dict[str, tuple[dict[str, Any], float | None]] = {
    "ann": ({"bits": 4}, 0.4),
    "freeswim": ({"native": (4, 4), "sink_frames": 1}, None),
    "light-forcing": ({"keep_frames": 5}, 0.4),
    "neighborhood": ({}, 0.4),
    "per-layer": ({"layers": {0: {"name": "radial", "block": 16}, 1: {"name": "sliding-window", "block": 16}}}, 0.4),
    "pyramid": ({}, 0.4),
    "radial": ({}, 0.4),
    "sliding-window": ({}, 0.4),
    "svg": ({}, 0.4),
    "topk": ({}, 0.4),
    "union": (
        {"parts": ({"name": "radial", "block": 16}, {"name": "neighborhood", "window": [1, 3, 3], "block": 16})},
        0.5,
    ),
}
FAMILIES = ("wan", "hunyuan", "cogvideox", "hunyuan15")


def example(name: str) -> tuple[Pattern, float | None]:
    arguments, density = EXAMPLES[name]
    own = {} if "parts" in arguments or "layers" in arguments else {"block": 16}
    return PATTERNS[name](**arguments, **own), density


@pytest.fixture(scope="module")
def pipeline() -> Callable[[str], Any]:
    """One pipeline a family; acceleration leaves no trace, so all tests share them."""
    built: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in built:
            built[family] = tiny_pipelines.wan(layers=2) if family == "wan" else getattr(tiny_pipelines, family)()
        return built[family]

    return get


@pytest.mark.parametrize("pattern", sorted(set(PATTERNS) - {"dense"}))
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_stock(pipeline: Any, assert_equals_masked_stock: Any, render: Any, family: str, pattern: str) -> None:
    """At 28 tiles of 16 tokens, and at two sizes that no tile divides."""
    pipe, (how, density) = pipeline(family), example(pattern)
    for size in ("even", "ragged", "wide"):
        run = vidaccel.accelerate(pipe, how, density=density, schedule=Schedule())
        latents = assert_equals_masked_stock(pipe, run, size, steps=2)
        sites = {site.name for site in run._installations[0].sites}
        assert [call.step for call in run.trace.calls] in ([0, 1], [0, 0, 1, 1])
        assert all({name for name, _ in call.scheduled} == sites for call in run.trace.calls)
        if size == "even":
            stock = render(pipe, size, steps=2)
            assert (latents - stock).abs().max() > 1e-3, "the pattern changed nothing, so this test could not fail"
