"""What kind of head is it? Named by where its attention mass lies beyond what chance would put there.

Idea: a head that looks everywhere alike has some mass in every place; what it has beyond that is what it looks for.
Math: excess of a place = mass there - share of keys there. The place with the largest excess names the head, if that is
    at least `LEAST`; otherwise it looks everywhere, and is global.
Source: Sparse VideoGen (Xi et al. 2025) tells spatial from temporal heads by what a mask of each keeps; none is tried
    here. Heads change their kind from step to step, so it is told for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

LEAST = 0.1
# In the order in which they win a tie. Own frame and first frame are one place for queries of the first frame.
KINDS = {"same_frame": "local", "same_place": "temporal", "first_frame": "first frame", "text": "text"}
GLOBAL = "global"


def kind(mass: Mapping[str, float], chance: Mapping[str, float]) -> str:
    """The kind of one head, from its mass in each place and the share of keys there."""
    excess = {name: mass[name] - chance[name] for name in KINDS}
    best = max(excess, key=lambda name: excess[name])
    return KINDS[best] if excess[best] >= LEAST else GLOBAL


def counted(rows: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, int]]:
    """How many heads of each kind there are, by step."""
    found: dict[int, dict[str, int]] = {}
    for row in rows:
        counts = found.setdefault(row["step"], {})
        for each in row["kind"]:
            counts[each] = counts.get(each, 0) + 1
    return found
