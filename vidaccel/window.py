"""Windows that decide partial blocks token by token, and how many pairs they keep, without looking at any pair.

Idea: what stands in a block is a few boxes, and in a box the number of keys that a query keeps is a product over axes.
Math: a block's slots, one after another, are joined to runs that step along one axis, runs of equal extent to
    rectangles, these to boxes; what stands in the same place several times counts as often.
Cost: for each query block, queries x boxes of its key blocks; in tile order a block is one box.
Limits: an order whose neighbours are not neighbours in space has as many boxes as tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Window(NamedTuple):
    """Decides partial blocks token by token: key k is kept for query q iff lo[q] <= pos[k] < hi[q] on every axis.

    Attributes:
        lo: (slots, axes) int32, first kept position of each query.
        hi: (slots, axes) int32, one past the last kept position of each query.
        pos: (slots, axes) int32, position of each key.
    """

    lo: torch.Tensor
    hi: torch.Tensor
    pos: torch.Tensor

    def kept(self) -> torch.Tensor:
        """(slots, slots) bool: the window of every query, spelled out."""
        inside = (self.lo[:, None] <= self.pos[None]) & (self.pos[None] < self.hi[:, None])
        return inside.all(-1)


class Boxes(NamedTuple):
    """What stands in blocks, as boxes.

    Attributes:
        lo: (n, axes) int64, the first position of each box.
        hi: (n, axes) int64, one past the last.
        often: (n,) int64, tokens in each place of the box.
        block: (n,) int64, ascending, whose it is.
    """

    lo: torch.Tensor
    hi: torch.Tensor
    often: torch.Tensor
    block: torch.Tensor

    @classmethod
    def of(cls, position: torch.Tensor, block: torch.Tensor) -> Boxes:
        """The boxes of tokens at (tokens, axes) positions in (tokens,) ascending blocks."""
        position = position.long()
        boxes = cls(position, position + 1, torch.ones_like(block), block)
        while True:
            joined = boxes._joined()
            if len(joined.block) == len(boxes.block):
                return boxes
            boxes = joined

    def _joined(self) -> Boxes:
        """Stretches of boxes, each of the same extent as the one before and one step further, as one box."""
        if len(self.block) < 2:
            return self
        (lo, before), (hi, ended) = ((side[1:], side[:-1]) for side in (self.lo, self.hi))
        up, down = lo == ended, hi == before
        same = (lo == before) & (hi == ended)
        moved = (~same).sum(1)
        axis = (~same).int().argmax(1)
        step = torch.where((up | down).gather(1, axis[:, None])[:, 0], 2 * axis + up.gather(1, axis[:, None])[:, 0], -1)
        step = torch.where(moved == 0, -2, torch.where(moved == 1, step, -1))
        extent = (hi - lo == ended - before).all(1) & (self.often[1:] == self.often[:-1])
        step[~extent | (self.block.diff() != 0)] = -1
        first = self._starts(step)
        group = first.long().cumsum(0) - 1
        start, end = first.nonzero()[:, 0], torch.cat([first[1:].nonzero()[:, 0], torch.tensor([len(first) - 1])])
        lo, hi = torch.minimum(self.lo[start], self.lo[end]), torch.maximum(self.hi[start], self.hi[end])
        still = (lo == self.lo[start]).all(1) & (hi == self.hi[start]).all(1)
        often = self.often[start] * torch.where(still, group.bincount(), 1)
        return Boxes(lo, hi, often, self.block[start])

    @staticmethod
    def _starts(step: torch.Tensor) -> torch.Tensor:
        """(n + 1,) bool, where stretches of one kind of step begin; -1 parts boxes.

        Two stretches share no box: what a change of steps begins goes on with the next step, whatever that is.
        """
        parted = torch.cat([torch.ones(1, dtype=torch.bool), step == -1])
        changed = torch.cat([torch.ones(2, dtype=torch.bool), step[1:] != step[:-1]]) | parted
        place = torch.arange(len(changed))
        calm = torch.where(~changed, place, torch.where(parted, place - 1, -1)).cummax(0).values
        return changed & ((place - calm) % 2 == 1)


def pairs_in(window: Window, q_len: torch.Tensor, block: int, times: torch.Tensor) -> int:
    """How many pairs a window keeps in some blocks.

    Args:
        window: the token-wise rule.
        q_len: (blocks,) filled slots of each block.
        block: slots of a block.
        times: (blocks, blocks) int64, how often each pair of blocks counts.
    """
    slot = torch.arange(len(q_len) * block, device=q_len.device)
    slot = slot[slot % block < q_len.repeat_interleave(block)]
    boxes = Boxes.of(window.pos[slot].cpu(), (slot // block).cpu())
    tables, names = [], []
    for axis in range(window.pos.shape[1]):
        # Queries with the same interval keep the same share of each box.
        interval, name = torch.unique(
            torch.stack([window.lo[:, axis], window.hi[:, axis]], 1).cpu().long(), dim=0, return_inverse=True
        )
        begin = torch.maximum(interval[:, :1], boxes.lo[:, axis])
        end = torch.minimum(interval[:, 1:], boxes.hi[:, axis])
        tables.append((end - begin).clamp(min=0).float())
        names.append(name)
    total, times = 0, times.cpu()
    for row in times.any(1).nonzero()[:, 0].tolist():
        queries = slice(row * block, row * block + int(q_len[row]))
        weight = times[row, boxes.block] * boxes.often
        keys = weight.nonzero()[:, 0]
        # Few queries of a block differ on any one axis.
        kept = torch.ones(1, len(keys))
        for table, name in zip(tables, names, strict=True):
            kept = kept * table.index_select(1, keys)[name[queries]]
        total += int((kept.sum(0).long() * weight[keys]).sum())
    return total
