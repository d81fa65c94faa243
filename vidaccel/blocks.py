"""Which key blocks each query block attends to: one list a row, full blocks first, then partial ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from .errors import MaskError
from .grid import TokenLayout
from .window import Window as Window
from .window import pairs_in


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Kept key blocks of every query block, as compressed sparse rows (CSR).

    Build it with `BlockMask.of`; look at lists that were made elsewhere with `checked.checked` first.

    Row `r = head * blocks + query_block` holds `idx[ptr[r] : ptr[r + 1]]`, key block numbers: first `n_full[r]` full
    blocks in ascending order, then the partial ones, in ascending order too.

    Attributes:
        ptr: (h * blocks + 1,) int32, where each row starts; h is 1 where all heads share the rows.
        idx: (kept,) int32, key block numbers.
        n_full: (h * blocks,) int32, how many blocks of the row are full.
        layout: the token order in which those blocks are counted.
        window: per-token rule of the partial blocks; None where there are none.
        k_len: (key blocks,) or (b, key blocks) int32, where the key blocks are not those of the layout: its blocks may
            have other lengths, and be followed by more. None for the layout's own.

    `idx` may be longer than the rows fill, so that masks chosen at run time have fixed shapes; nothing reads the rest.
    """

    ptr: torch.Tensor
    idx: torch.Tensor
    n_full: torch.Tensor
    layout: TokenLayout
    window: Window | None = None
    k_len: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        keep: torch.Tensor,
        layout: TokenLayout,
        *,
        partial: torch.Tensor | None = None,
        window: Window | None = None,
    ) -> BlockMask:
        """Compress a map of blocks.

        Args:
            keep: (blocks, blocks) or (h, blocks, blocks) bool, [query block, key block], text blocks included.
            layout: the order of those blocks.
            partial: same shape, the kept blocks that `window` decides token by token.
            window: needed with `partial`.

        Raises:
            MaskError: shapes that do not belong to the layout, or partial blocks without a window.
        """
        keep = keep[None] if keep.ndim == 2 else keep
        partial = torch.zeros_like(keep) if partial is None else partial.expand_as(keep) & keep
        if keep.dtype != torch.bool or keep.shape[-2:] != (layout.blocks, layout.blocks):
            raise MaskError(
                f"a block map of shape {tuple(keep.shape)}, {keep.dtype} was given; "
                f"this layout needs (heads, {layout.blocks}, {layout.blocks}), torch.bool"
            )
        if window is None and bool(partial.any()):
            raise MaskError("partial blocks were marked without a window; give `window=` too, or mark none")
        # A key block stands in its row's first half of places where it is full, in the second where it is partial.
        full, partial = (keep & ~partial).flatten(0, 1), partial.flatten(0, 1)
        places = torch.cat([full, partial], 1).nonzero()[:, 1]
        count = full.sum(-1) + partial.sum(-1)
        ptr = torch.cat([count.new_zeros(1), count.cumsum(0)]).int()
        return cls(ptr, (places % layout.blocks).int(), full.sum(-1).int(), layout, window)

    @property
    def heads(self) -> int:
        """1 where all heads share the rows."""
        return self.n_full.shape[0] // self.layout.blocks

    @property
    def lengths(self) -> torch.Tensor:
        """(key blocks,) or (b, key blocks) int32, filled slots of each key block."""
        return self.layout.k_len if self.k_len is None else self.k_len

    @property
    def has_empty_rows(self) -> bool:
        """Some query block keeps nothing at all."""
        return bool((self.ptr.diff() == 0).any())

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask with its tensors on `device`."""
        if self.ptr.device == torch.device(device):
            return self
        window = self.window and self.window.to(device)
        moved = {name: getattr(self, name).to(device) for name in ("ptr", "idx", "n_full")}
        k_len = None if self.k_len is None else self.k_len.to(device)
        return replace(self, **moved, layout=self.layout.to(device), window=window, k_len=k_len)

    def block_map(self) -> torch.Tensor:
        """(h, blocks, key blocks) int8: 0 dropped, 1 partial, 2 full. Waits for nothing."""
        rows, columns = self.n_full.shape[0], self.lengths.shape[-1]
        place = torch.arange(self.idx.shape[0], device=self.ptr.device, dtype=self.ptr.dtype)
        # What lies past the last row is written to one row more, which is cut off.
        row = torch.searchsorted(self.ptr[1:], place, right=True)
        kept = row.clamp(max=rows - 1)
        kind = torch.where(place - self.ptr[kept] < self.n_full[kept], 2, 1).to(torch.int8)
        kinds = torch.zeros(rows + 1, columns, dtype=torch.int8, device=self.ptr.device)
        kinds[row, self.idx.long()] = kind
        return kinds[:-1].view(self.heads, self.layout.blocks, columns)

    @cached_property
    def density(self) -> float:
        """Fraction of video-video pairs that are kept, token by token; keys beyond the layout's own count as tokens."""
        n = self.layout.video_blocks
        kinds, length = self.video_map(), self.layout.q_len[:n].double()
        keys = self.video_lengths().double()
        kept = float(((kinds == 2).double() @ keys @ length).sum())
        if self.window is not None and bool((partial := kinds == 1).any()):
            kept += pairs_in(self.window, self.layout.q_len[:n], self.layout.block, partial.sum(0))
        return kept / (self.heads * self.layout.grid.tokens**2)

    @cached_property
    def visited(self) -> float:
        """Video tiles touched x their area over all video-video pairs. Holes count, so it can pass 1."""
        touched = int((self.video_map() > 0).sum())
        return touched * self.layout.block**2 / (self.heads * self.layout.grid.tokens**2)

    def video_map(self) -> torch.Tensor:
        """(h, video blocks, key blocks without text) int8: `block_map` of the video. Waits for nothing."""
        return self._without_text(self.block_map()[:, : self.layout.video_blocks])

    def video_lengths(self) -> torch.Tensor:
        """(key blocks without text,) int32, filled slots of each."""
        return self._without_text(self.lengths.reshape(-1, self.lengths.shape[-1])[0])

    def _without_text(self, columns: torch.Tensor) -> torch.Tensor:
        layout = self.layout
        return torch.cat([columns[..., : layout.video_blocks], columns[..., layout.blocks :]], -1)

    def of_heads(self, first: int, end: int) -> BlockMask:
        """The rows of some heads; all of it where heads share them. Waits for the device."""
        if self.heads == 1:
            return self
        rows = slice(first * self.layout.blocks, end * self.layout.blocks)
        ptr = self.ptr[rows.start : rows.stop + 1]
        return replace(self, ptr=ptr - ptr[0], idx=self.idx[ptr[0] : ptr[-1]], n_full=self.n_full[rows])

    @staticmethod
    def stacked(masks: Sequence[BlockMask]) -> BlockMask:
        """The heads of all masks, one mask after another. Their lists must be full to the end. Waits for nothing."""
        first, *others = masks
        if not others:
            return first
        starts = itertools.accumulate(len(mask.idx) for mask in masks)
        ptr = torch.cat([first.ptr, *(start + mask.ptr[1:] for start, mask in zip(starts, others, strict=False))])
        idx, n_full = (torch.cat([getattr(mask, name) for mask in masks]) for name in ("idx", "n_full"))
        return replace(first, ptr=ptr, idx=idx, n_full=n_full)

    def union(self, other: BlockMask) -> BlockMask:
        """Keep what either mask keeps. Partial blocks of both must follow the same window.

        Raises:
            MaskError: other layouts, or two different windows.
        """
        mine, theirs = self.layout, other.layout
        if self.k_len is not None or other.k_len is not None:
            raise MaskError("a mask with key blocks of its own was joined with another; join masks over the same keys")
        if mine.block != theirs.block or mine.grid != theirs.grid or not torch.equal(mine.order, theirs.order):
            raise MaskError("two masks of different layouts were joined; build both on the same grid, block and tile")
        windows = [m.window for m in (self, other) if m.window is not None]
        if len(windows) == 2 and not windows[0].equals(windows[1]):
            raise MaskError("two masks with different token windows were joined; make one of them whole blocks first")
        kinds = torch.maximum(*torch.broadcast_tensors(self.block_map(), other.block_map()))
        return BlockMask.of(kinds > 0, mine, partial=kinds == 1, window=windows[0] if windows else None)

    def to_slots(self) -> torch.Tensor:
        """(h, slots, slots) bool in kernel order: the mask spelled out token by token. Small layouts only.

        Raises:
            MaskError: key blocks that are not those of the layout.
        """
        if self.k_len is not None:
            raise MaskError("a mask over merged keys was spelled out token by token; its keys are no tokens")
        block, slots = self.layout.block, self.layout.slots
        kinds = self.block_map().repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :slots, :slots]
        kept = kinds == 2 if self.window is None else (kinds == 2) | ((kinds == 1) & self.window.kept())
        return kept & self.layout.filled[:, None] & self.layout.filled

    def to_dense(self) -> torch.Tensor:
        """(h, tokens, tokens) bool in model order: what a dense attention would be given as its mask."""
        slot = self.layout.slot_of
        return self.to_slots()[:, slot][:, :, slot]
