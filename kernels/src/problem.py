"""What a kernel is asked: the shapes of one call, and its block mask as plain tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..blocks import BlockMask


@dataclass(frozen=True)
class Verdict:
    """Whether a backend can run a problem, and if not, why not.

    Attributes:
        ok: it can.
        reason: what is in the way; empty where nothing is.
    """

    ok: bool
    reason: str = ""


@dataclass(frozen=True)
class Problem:
    """Everything a backend may base its verdict on. The contents of a mask are not part of it.

    Attributes:
        batch, heads, lq, lk, d: sizes of q (batch, lq, heads, d) and k, v (batch, lk, heads, d).
        dtype: of q, k and v.
        device: where they are.
        block: slots in a block; 0 where no mask is given.
        mask_heads: 1 where all heads share their rows.
        partial: some blocks are decided token by token.
        bias: a logit bias per key is added.
        per_sample: key lengths differ between the samples of the batch.
    """

    batch: int
    heads: int
    lq: int
    lk: int
    d: int
    dtype: torch.dtype
    device: torch.device
    block: int = 0
    mask_heads: int = 1
    partial: bool = False
    bias: bool = False
    per_sample: bool = False

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, rows: Rows | None, key_bias: torch.Tensor | None) -> Problem:
        """Describe a call. Reads sizes only, so it never waits for a device."""
        batch, lq, heads, d = q.shape
        if rows is None:
            return cls(batch, heads, lq, k.shape[1], d, q.dtype, q.device, bias=key_bias is not None)
        return cls(
            batch,
            heads,
            lq,
            k.shape[1],
            d,
            q.dtype,
            q.device,
            block=rows.block,
            mask_heads=rows.heads,
            partial=rows.lo is not None,
            bias=key_bias is not None,
            per_sample=rows.k_len.ndim == 2,
        )

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        blocks = f"blocks of {self.block}" if self.block else "no mask"
        shape = (self.batch, self.lq, self.heads, self.d)
        return f"q {shape} over {self.lk} keys, {dtype} on {self.device}, {blocks}"


class Rows(NamedTuple):
    """A `BlockMask` as the op sees it: tensors and ints. Query and key blocks may differ in number.

    Attributes:
        ptr: (heads * q_blocks + 1,) int32, where each row starts in `idx`.
        idx: (kept or more,) int32, key block numbers, full ones first; what lies past the last row means nothing.
        n_full: (heads * q_blocks,) int32, how many of the row are full.
        q_len: (q_blocks,) int32, tokens in each query block.
        k_len: (k_blocks,) or (b, k_blocks) int32, tokens in each key block.
        lo, hi: (lq,) int32, words for what each query keeps in partial blocks; None where there are none, and `hi` too
            where `lo` decides alone.
        pos: (lk,) int32, a word for the position of each key.
        guards: what decides these words, see `window.inside`; 0 where there are none.
        block: slots in a block.
        text: how many query blocks, the last ones, are text: they keep far more than others, so they are begun first.
    """

    ptr: torch.Tensor
    idx: torch.Tensor
    n_full: torch.Tensor
    q_len: torch.Tensor
    k_len: torch.Tensor
    lo: torch.Tensor | None
    hi: torch.Tensor | None
    pos: torch.Tensor | None
    guards: int
    block: int
    text: int = 0

    @classmethod
    def of(cls, mask: BlockMask) -> Rows:
        """Take a mask apart. Kernels read all of it as contiguous."""
        layout, window = mask.layout, mask.window
        lists = (mask.ptr, mask.idx, mask.n_full, layout.q_len, mask.lengths)
        ptr, idx, n_full, q_len, k_len = (x.contiguous() for x in lists)
        lo = hi = pos = None
        guards = 0
        if window is not None:
            lo, hi, pos = (None if x is None else x.contiguous() for x in (window.lo, window.hi, window.pos))
            guards = window.guards
        return cls(ptr, idx, n_full, q_len, k_len, lo, hi, pos, guards, layout.block, layout.text_blocks)

    @classmethod
    def dense(cls, lq: int, lk: int, block: int, device: torch.device) -> Rows:
        """Every key block in every row, shared by all heads.

        Kept for good: CUDA graphs hold its addresses.
        """
        key = (lq, lk, block, device)
        rows = _dense.get(key)
        if rows is None:
            rows = _dense_rows(*key)
            # What is made while a graph is recorded has no values before it is played, and belongs to it.
            if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
                _dense[key] = rows
        return rows

    @property
    def heads(self) -> int:
        """1 where all heads share the rows."""
        return self.n_full.shape[0] // self.q_blocks

    @property
    def words(self) -> int:
        """How many words say what a query keeps in partial blocks: 0 where there are none, 1 or 2."""
        return (self.lo is not None) + (self.hi is not None)

    @property
    def q_blocks(self) -> int:
        """Query blocks of one head."""
        return self.q_len.shape[0]

    @property
    def k_blocks(self) -> int:
        """Key blocks."""
        return self.k_len.shape[-1]

    def kinds(self, row: torch.Tensor) -> torch.Tensor:
        """(..., k_blocks) int8 of the rows numbered in `row` (...): 0 dropped, 1 partial, 2 full. Waits for nothing."""
        kinds = torch.zeros(*row.shape, self.k_blocks + 1, dtype=torch.int8, device=row.device)
        if self.idx.shape[0]:
            place = torch.arange(self.k_blocks, device=row.device)
            start, end = self.ptr[row, None], self.ptr[row + 1, None]
            column = self.idx[(start + place).clamp(max=self.idx.shape[0] - 1).long()].long()
            # Places past the end of a row are written to one column more, which is cut off.
            column = torch.where(place < end - start, column, self.k_blocks)
            kinds.scatter_(-1, column, torch.where(place < self.n_full[row, None], 2, 1).to(torch.int8))
        return kinds[..., :-1]


_dense: dict[tuple[int, int, int, torch.device], Rows] = {}


def _dense_rows(lq: int, lk: int, block: int, device: torch.device) -> Rows:
    n, m = -(-lq // block), -(-lk // block)

    def lengths(slots: int, blocks: int) -> torch.Tensor:
        return (slots - torch.arange(blocks, device=device) * block).clamp(max=block).int()

    ptr = (torch.arange(n + 1, device=device) * m).int()
    idx = torch.arange(m, device=device).int().repeat(n)
    n_full = torch.full((n,), m, dtype=torch.int32, device=device)
    return Rows(ptr, idx, n_full, lengths(lq, n), lengths(lk, m), None, None, None, 0, block)
