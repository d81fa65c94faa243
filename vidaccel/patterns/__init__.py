"""Sparse attention patterns: which pairs of tokens attend. One pattern a file; none of them knows a model or a GPU."""

from __future__ import annotations

from .dense import Dense
from .plan import Pattern, Plan
from .radial import Radial

PATTERNS: dict[str, type[Pattern]] = {"dense": Dense, "radial": Radial}

__all__ = ["PATTERNS", "Dense", "Pattern", "Plan", "Radial"]
