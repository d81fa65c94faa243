"""Which blocks a layer's queries attend to, where a method chooses: what it knows of the past is kept for a chunk."""

from __future__ import annotations

import torch

from ..blocks import BlockMask
from ..patterns.hashing import HashPlanes
from .in_place import in_place
from .methods import CausalAnn, CausalLightForcing
from .plan import ChunkPlan
from .selection import best_of, block_means, row_layout


class HashedPast:
    """Blocks of keys whose hash codes are those of the queries: nearest neighbours of one layer and branch.

    Args:
        settings: bits and block size.

    Attributes:
        known: order of the past by its codes, and counts of them in each block.
    """

    def __init__(self, settings: CausalAnn) -> None:
        self._settings = settings
        self._planes = HashPlanes.of(settings.bits)
        self.known: tuple[torch.Tensor, ...] | None = None
        self._is_stale = True

    def open(self) -> None:
        """A new chunk, with another past."""
        self._is_stale = True

    def choose(
        self, q: torch.Tensor, k: torch.Tensor, kept: int, sizes: torch.Tensor | None
    ) -> tuple[BlockMask, torch.Tensor, torch.Tensor]:
        """Choose.

        Args:
            q: (1, own slots, h, d).
            k: (1, past slots, h, d).
            kept: blocks in a row.
            sizes: (h, extra) fp32, tokens behind each of the merged keys in front; None where there are none.

        Returns:
            The mask, for q and k in the orders that follow: (h, own slots) and (h, past slots) int64.
        """
        block = self._settings.block
        planes = self._planes = self._planes.to(q.device)
        if self._is_stale or self.known is None:
            empty = None
            if sizes is not None:
                # Places without a merged key stand behind all others, and attract no query.
                empty = torch.nn.functional.pad(sizes <= 0, (0, k.shape[1] - sizes.shape[1]))
            self.known = in_place(self.known, *planes.sort(planes.codes(k), block, last=empty))
            self._is_stale = False
        k_order, k_count = self.known
        q_order, q_count = planes.sort(planes.codes(q), block)
        scores = planes.shared(q_count, k_count)
        layout = row_layout(q.shape[1], block, q.device)
        return best_of(scores, kept, kept, layout, _lengths(k.shape[1], block, q.device)), q_order, k_order


class PooledPast:
    """Blocks of keys by their means: Light Forcing's choice in one layer and branch.

    Args:
        settings: block size.

    Attributes:
        known: means of the past's blocks, and of its frames.
    """

    def __init__(self, settings: CausalLightForcing) -> None:
        self._settings = settings
        self.known: tuple[torch.Tensor, ...] | None = None
        self._is_stale = True

    def open(self) -> None:
        """A new chunk, with another past."""
        self._is_stale = True

    def choose(
        self, q: torch.Tensor, k: torch.Tensor, own: int, plan: ChunkPlan, sizes: torch.Tensor | None
    ) -> BlockMask:
        """A mask over the past and `own` slots behind it.

        Args:
            q: (1, own slots, h, d).
            k: (1, slots, h, d), no more than these.
            own: 0, or all own slots.
            plan: of the chunk, with a rule.
            sizes: (h, extra) fp32, tokens behind each of the merged keys in front; None where there are none.
        """
        assert plan.rule is not None
        assert plan.k_len is not None
        rule, block = plan.rule, self._settings.block
        past = plan.k_len.shape[0] - plan.layout.blocks
        if self._is_stale or self.known is None:
            start = past * block
            weight = None
            if sizes is not None:
                ones = torch.ones(k.shape[2], start - sizes.shape[1], device=k.device)
                weight = torch.cat([sizes, ones], 1)
            means = block_means(k[:, :start], plan.k_len[:past], block, weight)
            self.known = in_place(self.known, means, rule.frame_means(means, plan.k_len))
            self._is_stale = False
        key, frame = self.known
        length, kept, most = plan.k_len[:past], rule.kept, rule.most
        if own:
            key = torch.cat([key, block_means(k[:, past * block :], plan.layout.q_len, block)], 1)
            length = plan.k_len
        else:
            most -= plan.layout.blocks
            kept = kept.clamp(max=most)
        empty = None if sizes is None else sizes.unflatten(1, (-1, block)).amax(-1) == 0
        scores = rule.scores(block_means(q, plan.layout.q_len, block), key, frame, empty)
        return best_of(scores, kept, most, plan.layout, length)


def _lengths(tokens: int, block: int, device: torch.device) -> torch.Tensor:
    start = torch.arange(-(-tokens // block), device=device) * block
    return (tokens - start).clamp(max=block).int()
