"""The released rule of radial attention: which blocks of a raster layout it keeps, as a function of its decay.

Idea: the further apart two frames are, the narrower the diagonal band of tokens that see each other; from some distance
    on the band is as narrow as a block, and only every second, fourth, ... frame is kept instead.
Math: frames i, j at distance d = |i - j|, s tokens a frame, tokens k, l inside their frames, blocks of B tokens;
    base(d) = 2^bitlength(s) / 2^bitlength(d);   w(d) = s for d <= 1, else max(base(d) decay, B);
    a pair of tokens counts iff |k - l| <= w(d) and (base(d) >= 128 or d mod int(128 / base(d)) = 0);
    with a sink, every query also sees all of the first frame.
    A block is kept iff for some frame pair, of its columns with any counting pair, more than 0.6 have more than 1/3 of
    their rows counting. So blocks are dropped as well as filled up: they neither contain the pairs nor lie in them.
Cost: O((blocks + frames)^2 log s) integers once a grid; no token pair is ever looked at.
Source: Radial Attention, arXiv 2506.19852, section 4, as its released code does it (mit-han-lab/radial-attention
    72788d4), which is not the formula of the paper: the paper's keeps up to twice as much on the default sizes.
Limits: the literal 128 stands for itself, not for B. Since w(d) never falls below B, density has a floor, and every
    decay up to some value gives the same mask. A ragged last block counts its share of rows over its own tokens.
"""

from __future__ import annotations

import math

import torch

from ..grid import VideoGrid

_FULL_DISTANCE = 1
_DECIMATION = 128


def element_density(grid: VideoGrid, decay: float, block: int, sink: bool) -> float:
    """Fraction of token pairs that the rule counts, before it decides on whole blocks (1 to 10 % more, relative).

    Closed form: a band |k - l| <= w in a frame pair holds A(w) = s (2w + 1) - w (w + 1) pairs.
    """
    frame = grid.frame
    kept = 0
    for distance, (base, counts) in enumerate(_bands(grid)):
        width = frame - 1 if distance <= _FULL_DISTANCE else min(math.floor(max(base * decay, block)), frame - 1)
        area = (frame * (2 * width + 1) - width * (width + 1)) * counts
        kept += (2 * (grid.t - distance) if distance else grid.t) * area
        kept += (frame * frame - area) * (sink and distance > 0)
    return kept / grid.tokens**2


def keeps_neighbours(grid: VideoGrid) -> bool:
    """Whether frames see the frames next to them: not where a frame has fewer than 128 tokens."""
    return all(counts for _, counts in _bands(grid)[: _FULL_DISTANCE + 1])


def decay_thresholds(grid: VideoGrid, block: int, sink: bool) -> torch.Tensor:
    """(blocks, blocks) float64: the smallest decay at which each block is kept; 0 always, inf never.

    One map holds the masks of all decays, since a wider band never loses a block: with every token of width, the well
    filled columns grow at least as fast as the touched ones. Own blocks are always kept, also where frames are too
    short to fill a third of them.
    """
    frame, tokens = grid.frame, grid.tokens
    blocks = -(-tokens // block)
    cuts = torch.unique(
        torch.cat([torch.arange(0, tokens, frame), torch.arange(0, tokens, block), torch.tensor([tokens])])
    )
    # A piece is what one frame and one block share: tokens first..last of its frame.
    start, end = cuts[:-1], cuts[1:]
    frame_of, block_of = start // frame, start // block
    first, last = start - frame_of * frame, end - 1 - frame_of * frame
    rows = (tokens - block_of * block).clamp(max=block)

    # Frames start at few different places in a block, so few kinds of pieces stand for all of them.
    kinds, kind = torch.unique(torch.stack([first, last, rows], 1), dim=0, return_inverse=True)
    width = _smallest_width(kinds, block, frame)
    base, counts = (torch.tensor(column, dtype=torch.float64) for column in zip(*_bands(grid), strict=True))
    # A band of B tokens is there at any decay. The bases are powers of two, so that dividing by them is exact.
    banded = torch.where(width > block, width, 0)[kind[:, None], kind]
    full = torch.where(width < math.inf, 0, width)[kind[:, None], kind]

    distance = (frame_of[:, None] - frame_of).abs()
    decay = torch.where(distance <= _FULL_DISTANCE, full, banded / base[distance])
    decay.masked_fill_(~counts.bool()[distance], math.inf)
    if sink:
        decay = torch.where(frame_of == 0, full, decay)
    thresholds = torch.full((blocks, blocks), math.inf, dtype=torch.float64).fill_diagonal_(0).flatten()
    into = block_of[:, None] * blocks + block_of
    return thresholds.scatter_reduce_(0, into.flatten(), decay.flatten(), "amin").view(blocks, blocks)


def _smallest_width(kinds: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """(kinds, kinds) float64: the narrowest band, from `low` on, that keeps the block around two pieces, by bisection.

    Args:
        kinds: (kinds, 3) first and last token in the frame, and the rows of the block.
        low: a band is never narrower than this.
        high: a width at which every token of the frame sees every other.
    """
    first, last, rows = kinds.unbind(1)
    enough = rows // 3 + 1  # the fewest rows that are more than 1/3 of them

    def columns(width: torch.Tensor, inset: torch.Tensor) -> torch.Tensor:
        upper = torch.minimum(last[:, None] + width - inset, last)
        return (upper - torch.maximum(first[:, None] - width + inset, first) + 1).clamp(min=0)

    below = torch.full((len(kinds), len(kinds)), low - 1)
    reached = torch.full_like(below, max(low, high))
    while bool((reached - below > 1).any()):
        middle = (below + reached) // 2
        # A column at the very edge of the band has one row in it; each step inwards adds one.
        kept = 5 * columns(middle, enough[:, None] - 1) > 3 * columns(middle, torch.zeros_like(middle))
        below, reached = torch.where(kept, below, middle), torch.where(kept, middle, reached)
    return reached.double().masked_fill((last - first + 1 < enough)[:, None], math.inf)


def _bands(grid: VideoGrid) -> list[tuple[float, bool]]:
    """For each frame distance: the width at decay 1, and whether such frame pairs count at all."""
    power = 1 << grid.frame.bit_length()
    bases = [power / (1 << distance.bit_length()) for distance in range(grid.t)]
    return [(base, base >= _DECIMATION or d % int(_DECIMATION / base) == 0) for d, base in enumerate(bases)]
