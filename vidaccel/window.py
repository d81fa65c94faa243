"""Windows that decide partial blocks token by token, and how many pairs they keep, without looking at any pair.

Idea: the intervals of a query on all axes are one word, so that a pair is decided by two subtractions. To count: what
    stands in a block is a few boxes, and in a box the number of keys that a query keeps is a product over axes.
Math: each axis has a field of a word and, above it, one guard bit. With all guard bits G set, (K | G) - L leaves an
    axis' guard bit iff K >= L there, and (H | G) - K iff K <= H; no borrow passes a guard bit.
    A block's slots, one after another, are joined to runs that step along one axis, runs of equal extent to
    rectangles, these to boxes; what stands in the same place several times counts as often.
Cost: for each query block, queries x boxes of its key blocks; in tile order a block is one box.
Source: fields with guard bits are Lamport's ("Multiple byte processing with full-word instructions", 1975).
Limits: fields and guard bits take 30 bits together: 511 x 511 x 255 positions fit, 512 x 512 x 512 do not. An order
    whose neighbours are not neighbours in space has as many boxes as tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .errors import PatternError

# The sign and one bit more stay free: hi words have one that no field needs.
BITS = 30


class Window(NamedTuple):
    """Decides partial blocks token by token, `inside(lo[query], hi[query], pos[key], guards)`. Made by `Window.of`.

    Attributes:
        lo: (slots,) int32, first kept position of each query, L. All ones on an axis where it keeps nothing.
        hi: (slots,) int32, last kept position of each query, as (H | G) + G: what pos has too much is taken off again.
            0 on an axis where it keeps nothing.
        pos: (slots,) int32, position of each key, as K | G; -1 for one that no window holds.
        guards: the guard bits of all axes, G. The field of an axis is what lies between two of them.
    """

    lo: torch.Tensor
    hi: torch.Tensor
    pos: torch.Tensor
    guards: int

    @classmethod
    def of(cls, lo: torch.Tensor, hi: torch.Tensor, pos: torch.Tensor, extents: Sequence[int]) -> Window:
        """Pack the rule `lo[query] <= pos[key] < hi[query]` on every axis. Waits for no device.

        Args:
            lo: (queries, axes) int, first kept position of each query.
            hi: (queries, axes) int, one past the last.
            pos: (keys, axes) int, position of each key. Outside the extents it is kept by no query: text, holes.
            extents: positions of each axis.

        Raises:
            PatternError: the axes do not fit a word.
        """
        if (asked := sum(extent.bit_length() + 1 for extent in extents)) > BITS:
            raise PatternError(
                f"a window over axes of {', '.join(map(str, extents))} positions takes {asked} bits for each token, "
                f"and there are {BITS}; give a window in whole tiles along one of the axes, or a shorter video"
            )
        first, last, place = (side.new_zeros(len(side), dtype=torch.int32) for side in (lo, hi, pos))
        nowhere = torch.zeros_like(place, dtype=torch.bool)
        guards = start = 0
        for axis, extent in enumerate(extents):
            bits = extent.bit_length()
            begin, end = lo[:, axis].int().clamp(min=0), hi[:, axis].int().clamp(max=extent)
            nothing = end <= begin
            first |= begin.masked_fill(nothing, (1 << bits) - 1) << start
            last |= (end - 1).masked_fill(nothing, 0) << start
            place |= pos[:, axis].int() << start
            nowhere |= (pos[:, axis] < 0) | (pos[:, axis] >= extent)
            guards |= 1 << start + bits
            start += bits + 1
        return cls(first, last + 2 * guards, (place + guards).masked_fill(nowhere, -1), guards)

    def axes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(slots, axes) int32 lo, hi and pos that keep the same pairs: the words taken apart."""
        columns, start = [], 0
        for end in range(BITS):
            if self.guards >> end & 1:
                ones = (1 << end - start) - 1
                columns.append([word >> start & ones for word in (self.lo, self.hi - self.guards, self.pos)])
                start = end + 1
        lo, last, pos = (torch.stack(side, 1) for side in zip(*columns, strict=True))
        return lo, last + 1, pos

    def kept(
        self, queries: torch.Tensor | slice = slice(None), keys: torch.Tensor | slice = slice(None)
    ) -> torch.Tensor:
        """(queries, keys) bool: the pairs of some slots, or of all, spelled out."""
        return inside(self.lo[queries, None], self.hi[queries, None], self.pos[keys], self.guards)

    def to(self, device: torch.device | str) -> Window:
        """The same window with its tensors on `device`."""
        return Window(self.lo.to(device), self.hi.to(device), self.pos.to(device), self.guards)

    def equals(self, other: Window) -> bool:
        """Whether both are the same rule, word for word. Waits for the device."""
        words = zip(self[:3], other[:3], strict=True)
        return self.guards == other.guards and all(torch.equal(mine, theirs) for mine, theirs in words)


def inside(lo: torch.Tensor, hi: torch.Tensor, pos: torch.Tensor, guards: int) -> torch.Tensor:
    """Bool of the shape that the words of queries (lo, hi) and of keys (pos) have together: the pair is kept.

    Kernels write this out for themselves, in this form: both "and" and the test against 0 are one instruction of a GPU.
    What is no key has the word -1: hi + 1 has no guard bit, because no axis' last position is all ones.
    """
    return (~((pos - lo) & (hi - pos)) & guards) == 0


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
    lo, hi, pos = window.axes()
    boxes = Boxes.of(pos[slot].cpu(), (slot // block).cpu())
    tables, names = [], []
    for axis in range(pos.shape[1]):
        # Queries with the same interval keep the same share of each box.
        interval, name = torch.unique(
            torch.stack([lo[:, axis], hi[:, axis]], 1).cpu().long(), dim=0, return_inverse=True
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
