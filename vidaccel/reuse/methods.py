"""The methods of autoregressive video as plain settings, and how they go together.

Order of composition: what keys there are (TempCache, hybrid memory), which of them are attended to (Light Forcing,
nearest neighbours), and what of the result is used again (FlashBlock). Each works on what the one before it left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import UsageError
from ..grid import BLOCK_SIZES
from ..streaming import Rollout
from .flashblock import FlashBlock

_SIZES = ", ".join(map(str, BLOCK_SIZES))


@dataclass(frozen=True)
class TempCache:
    """Evicted frames live on as merged keys; see `tempcache.py`.

    Attributes:
        frames: room for merged keys, in frames' worth of tokens: a hard cap, since noise never merges.
        recent: frames before a chunk that stay as they are; None keeps the rollout's whole window.
        threshold: cosine above which a key continues one of the frame before.
        match: "position" compares tokens at the same place; "nearest" finds the most similar one anywhere.
        key: "last" or "mean" represents a group.
    """

    frames: int = 3
    recent: int | None = 0
    threshold: float = 0.98
    match: str = "position"
    key: str = "last"

    def __post_init__(self) -> None:
        _check(self.frames >= 1 and (self.recent or 0) >= 0, f"TempCache frames={self.frames}, recent={self.recent}")
        _check(self.threshold >= -1, f"TempCache threshold={self.threshold}: a cosine, or above 1 for no merging")
        _check(self.match in ("position", "nearest"), f"TempCache match={self.match!r}: 'position' or 'nearest'")
        _check(self.key in ("last", "mean"), f"TempCache key={self.key!r}: 'last' or 'mean'")


@dataclass(frozen=True)
class HybridMemory:
    """A window, and a memory of constant size for what has left it.

    With a trained projection in the checkpoint (Hybrid Forcing's `linear_proj`) the memory is a linear state. Without
    one that state is worthless, and the training-free substitute stands in: merged keys, as in `TempCache`, of evicted
    frames beside the whole window. Hybrid Forcing also drops blocks inside the window; name `CausalLightForcing` beside
    it for that.

    Attributes:
        frames: room of the substitute, in frames' worth of tokens.
        linear: trained projections, "<layer>.weight" (d, d) and "<layer>.bias" (d,), as `convert.load_checkpoint` gives
            them; None takes the substitute.
    """

    frames: int = 1
    linear: Mapping[str, torch.Tensor] | None = field(default=None, repr=False, compare=False)

    @property
    def substitute(self) -> TempCache | None:
        """What stands in without trained weights; None with them."""
        return TempCache(frames=self.frames, recent=None) if self.linear is None else None


@dataclass(frozen=True)
class CausalLightForcing:
    """Frames first, then blocks, with a density that falls from chunk to chunk; see `selection.py`.

    Attributes:
        density: mean over chunks 1, 2, ..., of the keys that a dense chunk sees.
        base_density: what it falls towards.
        keep_frames: history frames that a query block may look at.
        near: of these, the latest ones.
        sink: of these, the first ones.
        frames: latent frames of the video, which decide how steeply density falls; a horizon for endless streams.
        block: slots of a block: 16, 32, 64 or 128.
    """

    density: float = 0.15
    base_density: float = 0.05
    keep_frames: int = 3
    near: int = 1
    sink: int = 1
    frames: int = 63
    block: int = 64

    def __post_init__(self) -> None:
        ok = 0 < self.base_density <= self.density <= 1 and self.keep_frames >= max(1, self.near + self.sink)
        ok = ok and min(self.near, self.sink) >= 0 and self.block in BLOCK_SIZES
        _check(ok, f"{self}: density >= base_density, keep_frames >= near + sink, block one of {_SIZES}")


@dataclass(frozen=True)
class CausalAnn:
    """Blocks of history that hash like the queries (AnnSA); the own chunk is always seen whole.

    Attributes:
        density: of the history.
        bits: of the hash.
        block: slots of a block: 16, 32, 64 or 128.
    """

    density: float = 0.3
    bits: int = 8
    block: int = 64

    def __post_init__(self) -> None:
        ok = 0 < self.density <= 1 and 1 <= self.bits <= 8 and self.block in BLOCK_SIZES
        _check(ok, f"{self}: density in (0, 1], bits 1 to 8, block one of {_SIZES}")


@dataclass(frozen=True)
class AnnCross:
    """Padding as one token, and of longer prompts the tokens that hash like the queries (AnnCA); see `cross.py`.

    Attributes:
        density: fraction of the padded prompt kept in each head.
        bits: of the hash.
        block: keys that a kernel reads together; no prompt is cut below one block.
    """

    density: float = 0.5
    bits: int = 8
    block: int = 64

    def __post_init__(self) -> None:
        ok = 0 < self.density <= 1 and 1 <= self.bits <= 8 and self.block >= 1
        _check(ok, f"{self}: density in (0, 1], bits 1 to 8, block 1 or more")


@dataclass(frozen=True)
class Methods:
    """What a stream uses.

    Attributes:
        merge: TempCache.
        hybrid: hybrid memory.
        select: Light Forcing or nearest neighbours.
        flash: FlashBlock.
        cross: AnnCross.
        break_even: density from which on a chunk runs dense, as that is as fast; None estimates where choosing would
            lose, as patterns do, and infinity runs the methods everywhere.
    """

    merge: TempCache | None = None
    hybrid: HybridMemory | None = None
    select: CausalLightForcing | CausalAnn | None = None
    flash: FlashBlock | None = None
    cross: AnnCross | None = None
    break_even: float | None = None

    @classmethod
    def of(cls, methods: Iterable[Any], break_even: float | None = None) -> Methods:
        """Sort methods by what they do.

        Raises:
            UsageError: two that do the same thing, or something that is no method.
        """
        places = {
            TempCache: "merge",
            HybridMemory: "hybrid",
            CausalLightForcing: "select",
            CausalAnn: "select",
            FlashBlock: "flash",
            AnnCross: "cross",
        }
        found: dict[str, Any] = {}
        for method in methods:
            if type(method) not in places:
                known = ", ".join(kind.__name__ for kind in places)
                raise UsageError(f"{method!r} is no method of a causal stream; there are {known}")
            place = places[type(method)]
            if place in found or {place, *found} >= {"merge", "hybrid"}:
                raise UsageError(f"{method!r} and another method do the same thing; give one of them")
            found[place] = method
        return cls(**found, break_even=break_even)

    def within(self, density: float, rollout: Rollout, frames: int | None = None) -> Methods:
        """The same methods under one budget: pairs of a chunk, of those of a dense one, over all methods together.

        Light Forcing counts merged keys in its own budget. Nearest neighbours get what the own chunk leaves, and so do
        merged keys where nothing is chosen among them; theirs holds from when the window is full. What FlashBlock
        reuses comes off on top.

        Args:
            density: in (0, 1).
            rollout: chunks and window.
            frames: latent frames of the video, over which Light Forcing's mean is taken; None takes its own.

        Raises:
            UsageError: no method that has a density, or less than the least that these can have.
        """
        if not 0 < density < 1:
            raise UsageError(f"density {density:g} was asked for; it lies above 0 and below 1, where all is dense")
        select, merge = self.select, self.merge or (self.hybrid.substitute if self.hybrid else None)
        if isinstance(select, CausalLightForcing):
            base = min(select.base_density, density)
            level = replace(select, density=density, base_density=base, frames=frames or select.frames)
            return replace(self, select=level)
        if select is None and self.merge is None:
            raise UsageError(
                f"density {density:g} was asked for, but none of the methods has one: FlashBlock goes by its threshold "
                "of drift, AnnCross and hybrid memory by settings of their own; add Light Forcing, AnnSA or TempCache"
            )
        if rollout.window is None:
            raise UsageError(
                f"density {density:g} was asked for, but without a window a dense chunk sees more and more; give the "
                "rollout a window, take Light Forcing, or set the methods' own densities"
            )
        near, merged = rollout.window, 0 if merge is None else merge.frames
        if merge is not None and merge.recent is not None:
            near = min(near, rollout.sink + merge.recent + rollout.chunk)
            merged = min(merged, rollout.window - near)
        wanted = density * rollout.window
        if isinstance(select, CausalAnn):
            past = near - rollout.chunk + merged
            least = (rollout.chunk + 0.01 * past) / rollout.window
            if wanted >= least * rollout.window:
                return replace(self, select=replace(select, density=min(1.0, (wanted - rollout.chunk) / past)))
        else:
            assert self.merge is not None
            least = (near + 1) / rollout.window
            if wanted >= near + 1:
                return replace(self, merge=replace(self.merge, frames=int(wanted + 1e-6) - near))
        raise UsageError(
            f"density {density:g} was asked for, but the frames that these methods keep whole, in a window of "
            f"{rollout.window}, leave {min(least, 1):.2f} at least; "
            f"{'ask for that' if least < 1 else 'keep fewer with TempCache.recent'}, or take Light Forcing"
        )

    @property
    def block(self) -> int | None:
        """Slots of a block where blocks of history are chosen in frames; None where tokens keep their order."""
        return self.select.block if isinstance(self.select, CausalLightForcing) else None


def _check(ok: bool, what: str) -> None:
    if not ok:
        raise UsageError(f"{what} cannot be; see its documentation for the ranges")
