"""Other projects that make the same pipelines faster, one adapter a file. None of them is needed; those installed run.

A new one is a file with a `Peer` in it, and a line below.
"""

from __future__ import annotations

from typing import Any

import yaml

from ...errors import UsageError
from .cache_dit import CACHE_DIT
from .diffusers_caches import BROADCAST, FIRST_BLOCK, TAYLORSEER
from .fastvideo import STA, VSA
from .natten import NATTEN
from .peer import Peer
from .sparsevideo import SPARSEVIDEO

PEERS: dict[str, Peer] = {
    peer.name: peer for peer in (FIRST_BLOCK, TAYLORSEER, BROADCAST, CACHE_DIT, NATTEN, SPARSEVIDEO, STA, VSA)
}

__all__ = ["PEERS", "Peer", "named"]


def named(text: str) -> list[Peer]:
    """Peers by name, with settings: "cache-dit:threshold=0.12,natten:density=0.2"; "installed" is all that are here.

    A comma ends a peer; its settings are separated by "+": "cache-dit:threshold=0.12+first=4".

    Raises:
        UsageError: an unknown peer or setting.
    """
    if text == "installed":
        return [peer for peer in PEERS.values() if peer.is_here]
    return [_named(part) for part in text.split(",")]


def _named(text: str) -> Peer:
    name, _, rest = text.partition(":")
    if name not in PEERS:
        raise UsageError(f"peer {name!r} is unknown; there are {', '.join(PEERS)}, and installed")
    changes: dict[str, Any] = {}
    for setting in rest.split("+") if rest else ():
        key, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"peer {text!r}: {setting!r} is not key=value, such as threshold=0.12")
        try:
            changes[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UsageError(f"peer {text!r}: {value!r} is no plain value") from None
    return PEERS[name].setting(changes)
