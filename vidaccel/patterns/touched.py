"""Which pairs of blocks a product of axes joins, where blocks are no boxes.

Idea: a block cut from a rod is a few boxes: the rest of a cross-section, whole ones, the beginning of another; and so
    again after the rod's end. Rules of single axes say which boxes they join.
Math: with P_i[b, n] = 1 where a part b has a token at n on axis i, and K_i[q, k] = 1 where the axis keeps a pair, parts
    q and k are joined iff (P_i K_i P_i^T)[q, k] > 0 on all axes, and blocks iff any of their parts are. All pairs of
    two blocks are kept iff P_i (1 - K_i) P_i^T is 0 for them on all axes.
Cost: three products of (parts, axis) matrices; about four parts a block, 0.2 s at 75,600 tokens.
Source: ours.
Limits: the rest of a cross-section more than one frame thick counts as the box around it, so that a few blocks are
    joined which have no kept pair; they are decided token by token, and cost time, not correctness.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..grid import TokenLayout
from ..window import Boxes


def joined(
    layout: TokenLayout, kept: Sequence[torch.Tensor], rows: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs of blocks with any kept pair of tokens, and those with no other.

    Args:
        layout: rods, or any other order.
        kept: (length, length) bool for time, height and width: [query, key].
        rows: (n,) int64, the query blocks to look at; None for all.

    Returns:
        (n, video blocks) bool twice.
    """
    blocks = layout.video_blocks
    rows = torch.arange(blocks) if rows is None else rows
    slots = layout.filled[: blocks * layout.block].nonzero()[:, 0]
    position, block_of = layout.positions[slots].long(), slots // layout.block
    boxes = Boxes.of(position, block_of)
    asked = torch.isin(boxes.block, rows)
    row_of = torch.searchsorted(rows, boxes.block[asked])
    touched = torch.ones(int(asked.sum()), len(boxes.block), dtype=torch.bool)
    whole = torch.ones(len(rows), blocks, dtype=torch.bool)
    for axis, keep in enumerate(kept):
        place = torch.arange(len(keep))
        there = ((boxes.lo[:, axis, None] <= place) & (place < boxes.hi[:, axis, None])).float()
        touched &= there[asked] @ keep.float() @ there.T > 0
        there = torch.zeros(blocks, len(keep))
        there[block_of, position[:, axis]] = 1
        whole &= there[rows] @ (~keep).float() @ there.T == 0
    any_key = torch.zeros(len(row_of), blocks).index_add_(1, boxes.block, touched.float())
    return torch.zeros(len(rows), blocks).index_add_(0, row_of, any_key) > 0, whole
