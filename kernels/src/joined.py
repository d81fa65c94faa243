"""Neighbouring rows of a mask as one list, for a kernel whose warp groups share one stream of keys.

Idea: few queries cannot use a key often enough to pay for fetching it; more can, if they look at the same keys. The
    union of neighbouring rows names each block once and says which row needs it, and how.
Math: entry = block << 8 | kind of the third row << 4 | kind of the second << 2 | kind of the first; kind 0: dropped,
    1: partial, 2: full. Rows stand next to each other in `idx`, and their union is no longer than all of them, so it
    takes their place; where a row belongs to two tiles, every other tile takes its place in a second copy.
Cost: one program for each tile; microseconds, against milliseconds of attention. So it is made again at every call.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .problem import Rows

SHIFT = 8


def join_rows(rows: Rows, units: int, share: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Join the rows of each tile. Tile `c` has the units `c * units` to `c * units + units - 1`.

    Args:
        rows: the mask.
        units: warp groups that work on a tile.
        share: units in a row of the mask; a row of 128 queries has two.

    Returns:
        entries: (tiles' lists,) int32; that of tile `c` begins at `ptr[c * units // share] + (c & 1) * spread`.
        count: (heads * tiles,) int32, how long each list is.
        spread: see above.
    """
    tiles = -(-rows.q_blocks * share // units)
    spread = rows.idx.shape[0] if units % share else 0
    entries = rows.idx.new_empty(rows.idx.shape[0] + spread)
    count = rows.idx.new_empty(rows.heads * tiles)
    size = triton.next_power_of_2(rows.k_blocks)
    kinds = torch.empty(count.shape[0], size, dtype=torch.int8, device=rows.ptr.device)
    _join[(tiles, rows.heads)](
        rows.ptr, rows.idx, rows.n_full, kinds, entries, count, rows.q_blocks, spread, UNITS=units, SHARE=share,
        SIZE=size, CHUNK=128, num_warps=4,
    )  # fmt: skip
    return entries, count, spread


@triton.jit(do_not_specialize=["q_blocks", "spread"])
def _join(
    PTR,
    IDX,
    N_FULL,
    KINDS,
    ENTRIES,
    COUNT,
    q_blocks,
    spread,
    UNITS: tl.constexpr,
    SHARE: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program (tile, head): write each row's kinds on a line of its own, read the line back, keep what is not empty."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    out = head * tl.num_programs(0) + tile
    line = KINDS + out.to(tl.int64) * SIZE
    block = tl.arange(0, SIZE)
    tl.store(line + block, tl.zeros([SIZE], tl.int8))
    first_row = tile * UNITS // SHARE
    last_row = tl.minimum((tile * UNITS + UNITS - 1) // SHARE, q_blocks - 1)
    for row in range(first_row, last_row + 1):
        tl.debug_barrier()
        first = tl.load(PTR + head * q_blocks + row)
        last = tl.load(PTR + head * q_blocks + row + 1)
        full = first + tl.load(N_FULL + head * q_blocks + row)
        for start in range(first, last, CHUNK):
            place = start + tl.arange(0, CHUNK)
            inside = place < last
            at = line + tl.load(IDX + place, mask=inside, other=0)
            kind = tl.where(place < full, 2, 1) << (2 * (row - first_row))
            tl.store(at, (tl.load(at, mask=inside, other=0) | kind).to(tl.int8), mask=inside)
    tl.debug_barrier()
    kinds = tl.load(line + block).to(tl.int32)
    kept = kinds != 0
    place = tl.cumsum(kept.to(tl.int32), 0)
    first = tl.load(PTR + head * q_blocks + first_row) + (tile & 1) * spread
    tl.store(ENTRIES + first + place - 1, block << 8 | kinds, mask=kept)
    tl.store(COUNT + out, tl.max(place, 0))
