"""Other people's caches on the same pipelines, over their thresholds: the adapters of `vidaccel.lab.peers`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from vidaccel.lab.peers import PEERS, Peer

Install = Callable[[Any], contextlib.AbstractContextManager[None]]
# By peer: the knob, its values in the order in which a budget that runs out matters least, and settings of all.
SWEEPS: dict[str, tuple[str, tuple[float, ...], dict[str, Any]]] = {
    "diffusers first-block": ("threshold", (0.1, 0.2, 0.05, 0.4, 0.13, 0.02), {}),
    "diffusers taylorseer": ("interval", (4, 8, 2, 5, 6), {}),
    "diffusers broadcast": ("interval", (2, 4), {}),
    # Its default computes the first eight layers always, which is all that a sample model has.
    "cache-dit": ("threshold", (0.12, 0.24, 0.06, 0.35, 0.27), {"first": 1}),
}


def cells(place: int, steps: int) -> list[tuple[str, dict[str, Any], Install]]:
    """Return name, description and installation of what there is to compare with.

    Args:
        place: Which threshold of each method, counted from 0.
        steps: Denoising steps of a clip.
    """
    found: list[tuple[str, dict[str, Any], Install]] = []
    for name, (knob, values, settings) in SWEEPS.items():
        if place < len(values) and PEERS[name].is_here:
            value = values[place]
            peer = PEERS[name].setting({knob: value, **settings})
            found.append((f"{name} {knob} {value}", {"cache": name, knob: value}, _installed(peer)))
    return found


def _installed(peer: Peer) -> Install:
    return lambda pipe: peer.around(pipe, None)
