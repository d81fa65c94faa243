"""What attention can take over from earlier steps and frames: reused outputs, merged keys, chosen blocks of history."""

from __future__ import annotations

from .flashblock import FlashBlock
from .memory import LayerMemory, Turn, remembered
from .methods import AnnCross, CausalAnn, CausalLightForcing, HybridMemory, Methods, TempCache

__all__ = [
    "AnnCross",
    "CausalAnn",
    "CausalLightForcing",
    "FlashBlock",
    "HybridMemory",
    "LayerMemory",
    "Methods",
    "TempCache",
    "Turn",
    "remembered",
]
