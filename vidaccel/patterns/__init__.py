"""Sparse attention patterns: which pairs of tokens attend. One pattern a file; none of them knows a model or a GPU."""

from __future__ import annotations

from .ann import Ann
from .combine import PerLayer, Union, of_layer
from .dense import Dense
from .flashblock import FlashBlock
from .freeswim import FreeSwim
from .gain import advice, break_even, sparse_rate, would_lose
from .light_forcing import LightForcing
from .neighborhood import Neighborhood
from .parameters import check_density, check_given, check_model, nested
from .per_head import PerHead
from .plan import Choice, Pattern, Plan, Select, Selection
from .pyramid import Pyramid
from .radial import Radial
from .sliding_window import SlidingWindow
from .svg import SparseVideoGen
from .tempcache import TempCache
from .topk import TopK

PATTERNS: dict[str, type[Pattern]] = {
    "ann": Ann,
    "dense": Dense,
    "flashblock": FlashBlock,
    "freeswim": FreeSwim,
    "light-forcing": LightForcing,
    "neighborhood": Neighborhood,
    "per-head": PerHead,
    "per-layer": PerLayer,
    "pyramid": Pyramid,
    "radial": Radial,
    "sliding-window": SlidingWindow,
    "svg": SparseVideoGen,
    "tempcache": TempCache,
    "topk": TopK,
    "union": Union,
}

__all__ = [
    "PATTERNS",
    "Ann",
    "Choice",
    "Dense",
    "FlashBlock",
    "FreeSwim",
    "LightForcing",
    "Neighborhood",
    "Pattern",
    "PerHead",
    "PerLayer",
    "Plan",
    "Pyramid",
    "Radial",
    "Select",
    "Selection",
    "SlidingWindow",
    "SparseVideoGen",
    "TempCache",
    "TopK",
    "Union",
    "advice",
    "break_even",
    "check_density",
    "check_given",
    "check_model",
    "nested",
    "of_layer",
    "sparse_rate",
    "would_lose",
]
