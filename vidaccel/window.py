"""Windows that decide partial blocks token by token, and how many pairs they keep, without looking at any pair.

Idea: the intervals of a query on all axes are one word, so that a pair is decided by two subtractions, or by one where
    all windows of an axis are equally long. To count: what stands in a block is a few boxes, and in a box the number
    of keys that a query keeps is a product over axes.
Math: each axis has a field of a word and, above it, one guard bit. With all guard bits G set, (K | G) - L leaves an
    axis' guard bit iff K >= L there, and (H | G) - K iff K <= H; no borrow passes a guard bit.
    Let all windows be W <= 2^k long, and g(x) = 2^k floor(x / W) + x mod W: it grows with x, by 2^k from x to x + W,
    and by less to x + W - 1. So (g(K) | G) - g(L) keeps its guard bit, and its field is 0 from bit k up, iff
    0 <= K - L < W. Windows that begin or end with their axis count as long as others, with what is beyond it.
    A block's slots, one after another, are joined to runs that step along one axis, runs of equal extent to
    rectangles, these to boxes; what stands in the same place several times counts as often.
Cost: for each query block, queries x boxes of its key blocks; in tile order a block is one box.
Source: fields with guard bits are Lamport's ("Multiple byte processing with full-word instructions", 1975).
Limits: fields and guard bits take 30 bits together: 511 x 511 x 255 positions fit, 512 x 512 x 512 do not. Where
    equally long windows do not fit 32, two subtractions decide. An order whose neighbours are not neighbours in space
    has as many boxes as tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .errors import PatternError

# The sign and one bit more stay free: hi words have one that no field needs.
BITS = 30
WORD = 32


class Window(NamedTuple):
    """Decides partial blocks token by token, `inside(lo[query], hi[query], pos[key], guards)`. Made by `Window.of`.

    Attributes:
        lo: (slots,) int32, first kept position of each query, L. Where it keeps nothing, one that no key has.
        hi: (slots,) int32, last kept position of each query, as (H | G) + G: what pos has too much is taken off again.
            0 on an axis where it keeps nothing. None where all windows are equally long.
        pos: (slots,) int32, position of each key, as K | G; without guard bits for one that no window holds.
        guards: the guard bits of all axes, G. The field of an axis is what lies between two of them. Where `hi` is None
            also the bits of each field that must be 0.
        lengths: how long the windows are, W of each axis; empty where `hi` is given.
    """

    lo: torch.Tensor
    hi: torch.Tensor | None
    pos: torch.Tensor
    guards: int
    lengths: tuple[int, ...] = ()

    @classmethod
    def of(cls, lo: torch.Tensor, hi: torch.Tensor, pos: torch.Tensor, extents: Sequence[int]) -> Window:
        """Pack the rule `lo[query] <= pos[key] < hi[query]` on every axis. Waits for the device.

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
        lo, hi = lo.clamp(min=0), torch.stack([ends.clamp(max=e) for ends, e in zip(hi.T, extents, strict=True)], 1)
        nowhere = torch.stack([(at < 0) | (at >= e) for at, e in zip(pos.T, extents, strict=True)]).any(0)
        equal = _equally_long(lo, hi, pos, nowhere, extents)
        if equal is not None:
            return equal
        first, last, place = (side.new_zeros(len(side), dtype=torch.int32) for side in (lo, hi, pos))
        guards = start = 0
        for axis, extent in enumerate(extents):
            bits = extent.bit_length()
            nothing = hi[:, axis] <= lo[:, axis]
            first |= lo[:, axis].int().masked_fill(nothing, (1 << bits) - 1) << start
            last |= (hi[:, axis].int() - 1).masked_fill(nothing, 0) << start
            place |= pos[:, axis].int() << start
            guards |= 1 << start + bits
            start += bits + 1
        return cls(first, last + 2 * guards, (place + guards).masked_fill(nowhere, no_key(guards)), guards)

    def axes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(slots, axes) int32 lo, hi and pos that keep the same pairs: the words taken apart, positions from 0 on."""
        columns: list[tuple[torch.Tensor, ...]] = []
        start = 0
        for top in range(WORD):
            if not tops(self.guards) >> top & 1:
                continue
            ones = (1 << top - start) - 1
            lo, pos = self.lo >> start & ones, self.pos >> start & ones
            if self.hi is None:
                length = self.lengths[len(columns)]
                lo, pos = (_from_digits(side, length) for side in (lo, pos))
                hi = lo + length
            else:
                hi = (self.hi - self.guards >> start & ones) + 1
            columns.append((lo, hi, torch.where(self.pos >> top & 1 > 0, pos, -1)))
            start = top + 1
        lo, hi, pos = (torch.stack(side, 1) for side in zip(*columns, strict=True))
        return lo, hi, pos

    def kept(
        self, queries: torch.Tensor | slice = slice(None), keys: torch.Tensor | slice = slice(None)
    ) -> torch.Tensor:
        """(queries, keys) bool: the pairs of some slots, or of all, spelled out."""
        hi = None if self.hi is None else self.hi[queries, None]
        return inside(self.lo[queries, None], hi, self.pos[keys], self.guards)

    @property
    def words(self) -> dict[str, torch.Tensor]:
        """Its tensors by name."""
        return {"lo": self.lo, "pos": self.pos} | ({} if self.hi is None else {"hi": self.hi})

    def to(self, device: torch.device | str) -> Window:
        """The same window with its tensors on `device`."""
        hi = None if self.hi is None else self.hi.to(device)
        return self._replace(lo=self.lo.to(device), hi=hi, pos=self.pos.to(device))

    def equals(self, other: Window) -> bool:
        """Whether both are the same rule, word for word. Waits for the device."""
        if (self.guards, self.lengths) != (other.guards, other.lengths):
            return False
        words = zip(self.words.values(), other.words.values(), strict=True)
        return all(torch.equal(mine, theirs) for mine, theirs in words)


def _equally_long(
    lo: torch.Tensor, hi: torch.Tensor, pos: torch.Tensor, nowhere: torch.Tensor, extents: Sequence[int]
) -> Window | None:
    """The window in one word for each query; None where windows differ in length, or do not fit."""
    first, place = (side.new_zeros(len(side), dtype=torch.int64) for side in (lo, pos))
    guards, start, lengths = 0, 0, []
    for axis, extent in enumerate(extents):
        begin, end = lo[:, axis].long(), hi[:, axis].long()
        nothing = end <= begin
        length = max(1, int((end - begin).max()))
        shorter = ~nothing & (end - begin < length)
        if bool((shorter & (begin > 0) & (end < extent)).any()):
            return None
        begin = torch.where(shorter & (begin == 0), end - length, begin).masked_fill(nothing, extent)
        least = min(0, int(begin.min()))
        begin, at = _digits(begin - least, length), _digits(pos[:, axis].long() - least, length)
        top = max(int(begin.max()), int(_digits(torch.tensor(extent - 1 - least), length)), 1).bit_length()
        first |= begin << start
        place |= at + (1 << top) << start
        guards |= (2 << top) - (1 << min(_low(length), top)) << start
        start += top + 1
        lengths.append(length)
    if start > WORD:
        return None
    if guards >> WORD - 1:
        guards -= 1 << WORD
    place = place.masked_fill(nowhere, no_key(guards))
    return Window(first.int(), None, place.int(), guards, tuple(lengths))


def _low(length: int) -> int:
    """Bits of the lower digit, k; one at least, so that no field's bits touch the guard bit below it."""
    return max(1, (length - 1).bit_length())


def _digits(x: torch.Tensor, length: int) -> torch.Tensor:
    """Which length x is in, and where in it, as one number: g."""
    return (x // length << _low(length)) + x % length


def _from_digits(x: torch.Tensor, length: int) -> torch.Tensor:
    return (x >> _low(length)) * length + (x & (1 << _low(length)) - 1)


def tops(guards: int) -> int:
    """The guard bits alone: those with no other bit above them."""
    return guards & ~(guards >> 1 & 0x7FFFFFFF)


def no_key(guards: int) -> int:
    """The word of what is no key: ones below the lowest guard bit, so that nothing leaves that."""
    guard = tops(guards)
    return (guard & -guard) - 1


def inside(lo: torch.Tensor, hi: torch.Tensor | None, pos: torch.Tensor, guards: int) -> torch.Tensor:
    """Bool of the shape that the words of queries (lo, hi) and of keys (pos) have together: the pair is kept.

    Kernels write this out for themselves, in this form: what follows the subtractions is one instruction of a GPU.
    """
    word = pos - lo
    if hi is not None:
        word = word & (hi - pos)
    return ((word ^ tops(guards)) & guards) == 0


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
