"""Which blocks of the past, and of the own chunk, the blocks of a chunk attend to.

Light Forcing (hierarchical selection), for query block i with mean q_i, key blocks with means k_j, frames with means
    K_f: where history has more than `keep_frames` frames, row i looks at the first ones, the latest ones, and the best
    of the rest by <q_i, K_f>, `keep_frames` in all; then the best blocks by <q_i, k_j> in those frames and in the own
    chunk. The own chunk may be chosen, it need not be.
Nearest neighbours: queries and keys of history are sorted by the signs of a few projections, in Gray order; a query
    block keeps the key blocks with which it shares most codes, codes r bits apart counting 16^-r. So no row is empty.
Both keep equally many blocks in every row. Shapes are fixed and nothing is read back; how many Light Forcing keeps
    stands in a tensor, so that a recorded forward serves chunks of every density.
Source: Light Forcing, arXiv 2602.04789, section 3.3; AnnSA of FAST-AR, arXiv 2602.01801, section 4.2.
Limits: blocks never cross frames: whatever its size, a frame is cut into nearly equal ones, so that none is a runt.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from ..blocks import BlockMask
from ..grid import TokenLayout, VideoGrid
from ..kernels import compact


def frame_layout(frames: int, y: int, x: int, block: int) -> TokenLayout:
    """Frames one after another, each cut into ceil(tokens / block) nearly equal runs of its raster order."""
    tokens = y * x
    count = -(-tokens // block)
    length = torch.full((count,), tokens // count)
    length[: tokens % count] += 1
    begin = length.cumsum(0) - length
    within = torch.arange(block)
    one = torch.where(within < length[:, None], begin[:, None] + within, 0).flatten()
    filled = (within < length[:, None]).flatten()
    frame = torch.arange(frames)[:, None] * tokens
    order = torch.where(filled, one + frame, 0).flatten()
    lengths = length.int().repeat(frames)
    slot_of = torch.empty(frames * tokens, dtype=torch.int64)
    slots = torch.arange(len(order))
    everywhere = filled.repeat(frames)
    slot_of[order[everywhere]] = slots[everywhere]
    identity = tokens % block == 0
    return TokenLayout(VideoGrid(frames, y, x), 0, block, None, order, lengths, lengths, slot_of, False, identity)


@lru_cache(maxsize=64)
def row_layout(tokens: int, block: int, device: torch.device | str = "cpu") -> TokenLayout:
    """Some tokens in raster order, in blocks. Kept, since a copy to the device would wait for it."""
    return TokenLayout.of(VideoGrid(1, 1, tokens), block=block).to(device)


def rectangle(chosen: torch.Tensor, layout: TokenLayout, k_len: torch.Tensor) -> BlockMask:
    """The mask of equally long rows of whole key blocks.

    Args:
        chosen: (h, query blocks, kept) int64, ascending key blocks.
        layout: of the queries.
        k_len: (key blocks,) int32, filled slots of each.
    """
    heads, rows, kept = chosen.shape
    ptr = torch.arange(heads * rows + 1, device=chosen.device, dtype=torch.int32) * kept
    n_full = torch.full((heads * rows,), kept, device=chosen.device, dtype=torch.int32)
    return BlockMask(ptr, chosen.flatten().int(), n_full, layout, k_len=k_len)


def best_of(
    scores: torch.Tensor, kept: int | torch.Tensor, most: int, layout: TokenLayout, k_len: torch.Tensor
) -> BlockMask:
    """The mask of each row's best key blocks; of equal scores the first ones.

    Args:
        scores: (h, query blocks, key blocks) fp32.
        kept: blocks in a row, () int32 where that is known to the device alone.
        most: what it never passes.
        layout: of the queries.
        k_len: (key blocks,) int32, filled slots of each.
    """
    heads, rows, blocks = scores.shape
    ptr = (torch.arange(heads * rows + 1, device=scores.device) * kept).int()
    places = heads * rows * most
    if compact.can_run(scores, blocks):
        idx = compact.keep_best(scores.contiguous(), None, ptr, None, None, places)
        return BlockMask(ptr, idx, ptr.diff(), layout, k_len=k_len)
    ranked = scores.sort(dim=-1, descending=True, stable=True).indices[..., :most]
    within = torch.arange(most, device=scores.device)
    # What is not kept sorts behind all blocks, and is written past the end, where nothing is read.
    ranked = torch.where(within < kept, ranked, blocks).sort(-1).values.flatten(0, 1)
    place = torch.where(within < kept, ptr[:-1, None] + within, places)
    idx = ptr.new_zeros(places + 1).scatter(0, place.flatten(), ranked.flatten().int())
    return BlockMask(ptr, idx, ptr.diff(), layout, k_len=k_len)


def only_heads(mask: BlockMask, wanted: torch.Tensor) -> BlockMask:
    """A mask of whole blocks whose rows are empty where a head (h,) bool is not wanted."""
    heads, rows = wanted.shape[0], mask.layout.blocks
    row_wanted = wanted.repeat_interleave(rows)
    first = mask.ptr[:-1].view(-1, rows).expand(heads, -1).flatten()
    count = torch.where(row_wanted, mask.n_full.view(-1, rows).expand(heads, -1).flatten(), 0)
    ptr = torch.nn.functional.pad(count.cumsum(0), (1, 0)).int()
    place = torch.arange(mask.idx.shape[0] * (heads // mask.heads), device=wanted.device)
    # What lies past the last row is read by nothing, and may be anything.
    row = torch.searchsorted(ptr[1:].long(), place, right=True).clamp(max=heads * rows - 1)
    found = (first[row] + place - ptr[row]).clamp(0, mask.idx.shape[0] - 1)
    return BlockMask(ptr, mask.idx[found], count.int(), mask.layout, k_len=mask.k_len)


def block_means(x: torch.Tensor, length: torch.Tensor, block: int, weight: torch.Tensor | None = None) -> torch.Tensor:
    """(h, blocks, d) fp32 means over the filled slots of each block.

    Args:
        x: (1, slots, h, d), batches folded into heads.
        length: (blocks,) filled slots of each block.
        block: slots of a block.
        weight: (h, slots) fp32, how much each slot counts; where all are 0 the mean is 0.
    """
    if weight is None and compact.can_run(x, length.shape[0]):
        means: torch.Tensor = compact.block_means(x, length, block)
        return means
    missing = length.shape[0] * block - x.shape[1]
    padded = torch.nn.functional.pad(x[0], (0, 0, 0, 0, 0, missing))
    filled = torch.arange(block, device=x.device) < length[:, None]
    # What stands in a hole may be no number, and 0 x NaN is NaN.
    cells = torch.where(filled[..., None, None], padded.unflatten(0, (-1, block)).float(), 0)
    if weight is None:
        return (cells.sum(1) / length[:, None, None]).transpose(0, 1)
    share = torch.nn.functional.pad(weight, (0, missing)).unflatten(1, (-1, block)) * filled
    weighted: torch.Tensor = torch.einsum("nbhd,hnb->hnd", cells, share) / share.sum(-1).clamp(min=1e-6)[..., None]
    return weighted


class FrameRule(NamedTuple):
    """Light Forcing's choice for one chunk.

    Attributes:
        kept: () int32, blocks in a row; it stays where it is from chunk to chunk.
        most: blocks that a row may look at.
        keep_frames: frames of history in a row; None lets it look at all.
        always: (history frames,) bool, those that every row may look at.
        before: key blocks in front of the history frames, which every row may look at too.
        per_frame: blocks of a frame.
    """

    kept: torch.Tensor
    most: int
    keep_frames: int | None
    always: torch.Tensor
    before: int
    per_frame: int

    def frame_means(self, key: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """(h, history frames, d), from means (h, key blocks, d) of blocks with so many tokens (key blocks,)."""
        frames = self.always.shape[0]
        share = length[self._history].float().view(frames, self.per_frame, 1)
        means: torch.Tensor = (key[:, self._history].unflatten(1, (frames, self.per_frame)) * share).sum(2) / share.sum(
            1
        )
        return means

    def scores(
        self, query: torch.Tensor, key: torch.Tensor, frame: torch.Tensor, empty: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What each block of keys is worth to each block of queries.

        Args:
            query: (h, query blocks, d), means.
            key: (h, key blocks, d), means.
            frame: (h, history frames, d), means.
            empty: (h, before) bool, blocks in front of the history that hold nothing yet.

        Returns:
            (h, query blocks, key blocks); -inf in frames that a row does not look at.
        """
        scores = query @ key.transpose(1, 2)
        if empty is not None:
            scores[..., : self.before].masked_fill_(empty[:, None], -torch.inf)
        if self.keep_frames is not None:
            affinity = (query @ frame.transpose(1, 2)).masked_fill(self.always, torch.inf)
            looked = affinity.topk(self.keep_frames, dim=-1, sorted=False).indices
            open_frames = torch.zeros_like(affinity, dtype=torch.bool).scatter(-1, looked, True)
            closed = ~open_frames.repeat_interleave(self.per_frame, dim=-1)
            scores[..., self._history].masked_fill_(closed, -torch.inf)
        return scores

    @property
    def _history(self) -> slice:
        """Its blocks among those of keys."""
        return slice(self.before, self.before + self.always.shape[0] * self.per_frame)
