"""Two neighbouring rows of a mask as one list, for a kernel that lets them share one stream of keys.

Idea: 64 queries at a time cannot use a key often enough to pay for fetching it; 128 can, if they look at the same keys.
    The union of two rows names each block once and says which row needs it, and how.
Math: word = block << 4 | kind of the second row << 2 | kind of the first; kind 0: dropped, 1: partial, 2: full.
    The two rows stand next to each other in `idx`, and their union is no longer than both, so it takes their place.
Cost: one program for each pair; microseconds, against milliseconds of attention. So it is made again at every call.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .problem import Rows


def join_rows(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Join rows 0 and 1, 2 and 3, and so on, of each head; an odd last row stays alone.

    Returns:
        words: like `rows.idx`; the list of a pair begins where its first row's does, ascending.
        count: (heads * pairs,) int32, how long each list is.
    """
    pairs = -(-rows.q_blocks // 2)
    words = torch.empty_like(rows.idx)
    count = torch.empty(rows.heads * pairs, dtype=torch.int32, device=rows.ptr.device)
    size = triton.next_power_of_2(rows.k_blocks)
    kinds = torch.empty(count.shape[0], size, dtype=torch.int8, device=rows.ptr.device)
    _join[(pairs, rows.heads)](
        rows.ptr, rows.idx, rows.n_full, kinds, words, count, rows.q_blocks, SIZE=size, CHUNK=128, num_warps=4
    )
    return words, count


@triton.jit(do_not_specialize=["q_blocks"])
def _join(PTR, IDX, N_FULL, KINDS, WORDS, COUNT, q_blocks, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """Program (pair, head): write each row's kinds on a line of its own, read the line back, keep what is not empty."""
    pair = tl.program_id(0)
    head = tl.program_id(1)
    out = head * tl.num_programs(0) + pair
    line = KINDS + out.to(tl.int64) * SIZE
    block = tl.arange(0, SIZE)
    tl.store(line + block, tl.zeros([SIZE], tl.int8))
    for second in tl.static_range(2):
        tl.debug_barrier()
        row = head * q_blocks + 2 * pair + second
        there = 2 * pair + second < q_blocks
        first = tl.load(PTR + row, mask=there, other=0)
        last = tl.load(PTR + row + 1, mask=there, other=0)
        full = first + tl.load(N_FULL + row, mask=there, other=0)
        for start in range(first, last, CHUNK):
            place = start + tl.arange(0, CHUNK)
            inside = place < last
            at = line + tl.load(IDX + place, mask=inside, other=0)
            kind = tl.where(place < full, 2, 1) << (2 * second)
            tl.store(at, (tl.load(at, mask=inside, other=0) | kind).to(tl.int8), mask=inside)
    tl.debug_barrier()
    kinds = tl.load(line + block).to(tl.int32)
    kept = kinds != 0
    place = tl.cumsum(kept.to(tl.int32), 0)
    first = tl.load(PTR + head * q_blocks + 2 * pair)
    tl.store(WORDS + first + place - 1, block << 4 | kinds, mask=kept)
    tl.store(COUNT + out, tl.max(place, 0))
