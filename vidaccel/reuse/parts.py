"""Attention to the past and to the own chunk in one launch, as two results.

Idea: queries stand twice, in rows that keep the own chunk and in rows that keep its past. The rows of the past, the
    longest, are begun first and the others fill the GPU behind them. A launch for each leaves it idle: where 4 of 12
    heads are computed anew, three frames at 480p have 148 tiles of queries for 132 processors, and two turns at them.
Boundary: the own chunk begins at any key; the block of keys that it begins in is decided key by key.
Cost: the pairs of both parts, and one more copy of the queries.
"""

from __future__ import annotations

import torch

from ..blocks import BlockMask, Window
from ..grid import TokenLayout, VideoGrid
from ..kernels.attention import attention

_BLOCK = 128
# (out, lse) as `attention` gives them
Part = tuple[torch.Tensor, torch.Tensor]


class Parts:
    """Both parts for one number of queries and keys. All tensors stay where they are, as CUDA graphs need them.

    Args:
        queries: of the chunk, or some of them.
        past: keys before the own chunk, 1 or more.
        own: keys of the own chunk.
        device: where it is used.
    """

    def __init__(self, queries: int, past: int, own: int, device: torch.device) -> None:
        self.layout = TokenLayout.of(VideoGrid(1, 1, queries), text=queries, block=_BLOCK).to(device)
        rows, keys = self.layout.video_blocks, past + own
        every = torch.arange(-(-keys // _BLOCK), dtype=torch.int32)
        cut = past // _BLOCK
        shared = every[cut : -(-past // _BLOCK)]
        # Full blocks first: rows of the own chunk, then, counted as text, rows of the past.
        full = (every[cut + len(shared) :], every[:cut])
        lists = [torch.cat([whole, shared]) for whole in full]
        length = torch.tensor([len(each) for each in lists]).repeat_interleave(rows)
        self._idx = torch.cat([each.repeat(rows) for each in lists]).to(device)
        self._ptr = (length.cumsum(0) - length).to(device)
        self._n_full = torch.tensor([len(whole) for whole in full]).repeat_interleave(rows).int().to(device)
        self._place = torch.arange(len(self._idx), device=device)
        self._own = rows * len(lists[0])
        self._k_len = (keys - every * _BLOCK).clamp(max=_BLOCK).to(device)
        self._window: Window | None = None
        if len(shared):
            is_past = torch.arange(self.layout.slots) >= rows * _BLOCK
            lo, hi = (torch.where(is_past, *ends)[:, None] for ends in ((0, past), (past, keys)))
            self._window = Window.of(lo, hi, torch.arange(keys)[:, None], [keys]).to(device)
        self._kept: dict[tuple[bool, ...], BlockMask] = {}

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        wanted: torch.Tensor | tuple[bool, ...] = (True,),
        key_bias: torch.Tensor | None = None,
    ) -> tuple[Part, Part]:
        """Attend.

        Args:
            q: (1, queries, h, d).
            k: (1, past + own, h, d).
            v: (1, past + own, h, d).
            wanted: (h,) bool, heads whose past is attended to; numbers that are known beforehand cost nothing later.
            key_bias: (1, h, past + own) fp32.

        Returns:
            The past's part, 0 and -inf in other heads, and the own chunk's.
        """
        count, slots = q.shape[1], self.layout.video_blocks * _BLOCK
        both = q.new_empty(1, slots + count, *q.shape[2:])
        for start in (0, slots):
            both[:, start : start + count] = q
        out, lse = attention(both, k, v, self._mask(wanted), key_bias=key_bias)
        own, past = ((out[:, at : at + count], lse[:, :, at : at + count]) for at in (0, slots))
        return past, own

    def _mask(self, wanted: torch.Tensor | tuple[bool, ...]) -> BlockMask:
        if isinstance(wanted, torch.Tensor):
            return self._of(wanted)
        if wanted not in self._kept:
            self._kept[wanted] = self._of(torch.tensor(wanted, device=self._idx.device))
        return self._kept[wanted]

    def _of(self, wanted: torch.Tensor) -> BlockMask:
        """Rows of all heads; those of the past are empty in heads that are not wanted."""
        heads, most = wanted.shape[0], self._idx.shape[0]
        length = torch.where(wanted, most, self._own)[:, None]
        start = length.cumsum(0) - length
        ptr = torch.cat([(start + self._ptr.clamp(max=length)).flatten(), (start + length)[-1]]).int()
        # What is not wanted is written past the end, where nothing is read.
        place = torch.where(self._place < length, start + self._place, heads * most)
        idx = self._idx.new_zeros(heads * most + 1).scatter(0, place.flatten(), self._idx.repeat(heads))
        n_full = torch.minimum(self._n_full.repeat(heads), ptr.diff())
        return BlockMask(ptr, idx, n_full, self.layout, self._window, self._k_len)
