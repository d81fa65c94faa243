"""Orders of a video's tokens, as blocks of a kernel: raster, boxes, and rods.

Idea: a block should hold tokens that are near each other in time and space, and it should be full, since a kernel
    computes whole blocks: a mask over blocks filled to a share f costs 1 / f^2 of what it keeps.
    raster   frame-major, cut into blocks.
    boxes    a tile (t, y, x) of tokens is a block; the last tile of an axis is clipped where it does not divide it.
    rods     a tile (t, y, 0) has no length of its own: one path goes back and forth through rods of this cross-section
             along x, next to the rod before, and is cut into blocks. Only the last block has holes. Rods share out
             their axes evenly, so that a cross-section is the largest that occurs.
Cost: a few index operations for each tile or rod.
Source: ours. 45 rows, which 720 pixels have, are 3 x 3 x 5: boxes that divide them fill 120 of 128 slots, that is 0.88
    of the pairs; on CogVideoX's 13x30x45 grid 0.77.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch

from .errors import LayoutError

Sides = tuple[int, int, int]

_RADIUS = 4
"""Tokens around each token that should be in few blocks, when orders are compared."""

_FULL = 1.02
"""Boxes are taken before rods where they need at most this many times as many blocks."""

_COMPACT = 1.25
"""And where they are at most this many times as spread out."""


def raster(grid: Sides, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Order and lengths in raster order; only the last block can be short, and has no slots for its holes."""
    tokens = math.prod(grid)
    start = torch.arange(-(-tokens // block)) * block
    return torch.arange(tokens), (tokens - start).clamp(max=block).int()


def folded(length: int, fold: int) -> torch.Tensor:
    """(length,) int64: the coordinates of an axis, those with the same remainder by `fold` side by side."""
    return torch.cat([torch.arange(remainder, length, fold) for remainder in range(fold)])


def tiled(grid: Sides, block: int, tile: Sides, fold: Sides = (1, 1, 1)) -> tuple[torch.Tensor, torch.Tensor]:
    """Order and lengths of boxes or rods.

    Args:
        grid: (t, y, x) tokens.
        block: slots of a block.
        tile: sides of a box, or of a rod where the last is 0.
        fold: how far apart neighbours are on each axis; boxes only.

    Returns:
        (blocks x block,) int64, the raster index of the token in each slot, 0 in holes; (blocks,) int32.

    Raises:
        LayoutError: a tile that does not fit its block, or rods of a folded axis.
    """
    if min(tile[:2]) < 1 or tile[2] < 0 or math.prod(tile[:2]) * max(1, tile[2]) > block:
        raise LayoutError(
            f"a tile of {tile} tokens was asked for in blocks of {block}; its product must lie in 1..{block}, or its "
            "last side be 0, for rods that go on from block to block"
        )
    if tile[2]:
        return _boxes(grid, block, tile, fold)
    if max(fold) > 1:
        raise LayoutError(f"a fold of {fold} was asked for with rods of {tile}; fold boxes, whose sides are 1 or more")
    path = _rods(grid, tile)
    blocks = -(-len(path) // block)
    length = torch.full((blocks,), block, dtype=torch.int32)
    length[-1] = len(path) - (blocks - 1) * block
    return torch.nn.functional.pad(path, (0, blocks * block - len(path))), length


def _boxes(grid: Sides, block: int, tile: Sides, fold: Sides) -> tuple[torch.Tensor, torch.Tensor]:
    """One tile a block, tiles and the tokens in them in raster order, each packed from its block's front."""
    token = torch.arange(math.prod(grid)).view(grid)
    for axis, apart in enumerate(fold):
        token = token.index_select(axis, folded(grid[axis], apart))
    counts = [-(-length // side) for length, side in zip(grid, tile, strict=True)]
    order = torch.zeros(math.prod(counts), block, dtype=torch.int64)
    lengths = torch.zeros(math.prod(counts), dtype=torch.int32)
    for n, (i, j, k) in enumerate(itertools.product(*map(range, counts))):
        t, y, x = tile
        box = token[i * t : (i + 1) * t, j * y : (j + 1) * y, k * x : (k + 1) * x].flatten()
        order[n, : len(box)] = box
        lengths[n] = len(box)
    return order.flatten(), lengths


def _rods(grid: Sides, tile: Sides) -> torch.Tensor:
    """(tokens,) int64, raster indices along the path. In rods one token thick, each touches the one before."""
    token = torch.arange(math.prod(grid)).view(grid)
    rods: list[torch.Tensor] = []
    for number, slab in enumerate(_even(token, 0, tile[0])):
        strips = _even(slab, 1, tile[1])
        rods += reversed(strips) if number % 2 else strips
    return torch.cat([_along(rod.flip(2) if number % 2 else rod) for number, rod in enumerate(rods)])


def _even(token: torch.Tensor, axis: int, most: int) -> list[torch.Tensor]:
    """Parts of an axis, as few as have at most so many tokens, as equal as can be."""
    return list(token.tensor_split(-(-token.shape[axis] // most), axis))


def _along(rod: torch.Tensor) -> torch.Tensor:
    """The tokens of one rod, (t, y, x) -> (t * y * x,): cross-section after cross-section, each back and forth."""
    section = rod.clone()
    section[1::2] = rod[1::2].flip(1)
    cells = section.flatten(0, 1).T.clone()
    cells[1::2] = cells[1::2].flip(1)
    return cells.flatten()


def _spread(sides: tuple[float, float, float]) -> float:
    """How many tiles a cube around every token touches, over those that it would fill: small for compact ones."""
    return math.prod((side + 2 * _RADIUS) / side for side in sides)


def choose_tile(grid: Sides, block: int) -> Sides:
    """A compact box of at most `block` tokens, one that divides the grid where that costs little.

    The cost of a tile is the number of tile pairs that a cube of radius 4 around every token touches: few tiles, and
    none of them long and thin.
    """

    def cost(tile: Sides) -> float:
        return _spread(tile) * math.prod(-(-length // side) for length, side in zip(grid, tile, strict=True))

    best = min(_tiles(grid, block), key=cost)
    dividing = [t for t in _tiles(grid, block) if all(length % side == 0 for length, side in zip(grid, t, strict=True))]
    neat = min(dividing, key=cost)
    return neat if cost(neat) <= 1.1 * cost(best) else best


def flat_box(grid: Sides, block: int) -> Sides:
    """The box of one frame of which the fewest cover it; among equals the most compact."""

    def cost(tile: Sides) -> tuple[int, int, int]:
        _, y, x = tile
        return -(-grid[1] // y) * -(-grid[2] // x), y + x, grid[1] % y + grid[2] % x

    return min(((1, y, min(grid[2], block // y)) for y in range(1, min(grid[1], block) + 1)), key=cost)


def fullest(grid: Sides, block: int, flat: bool = False) -> Sides:
    """A compact tile that needs hardly more blocks than the tokens fill: a box, or else rods.

    Args:
        grid: (t, y, x) tokens.
        block: slots of a block.
        flat: of one frame, as nearly as full blocks allow.
    """

    def spread(section: tuple[int, int]) -> tuple[float, float]:
        t, y = (length / -(-length // side) for length, side in zip(grid, section, strict=False))
        long = block / (t * y)
        # A rod shorter than its blocks makes them longer in another direction.
        return _spread((t, y, long)) * max(1, long / grid[2]), y

    sections = ((t, y) for t in range(1, 2 if flat else grid[0] + 1) for y in range(1, min(grid[1], block // t) + 1))
    section = min(sections, key=spread)
    tile = flat_box(grid, block) if flat else choose_tile(grid, block)
    count = math.prod(-(-length // side) for length, side in zip(grid, tile, strict=True))
    is_full = count <= _FULL * -(-math.prod(grid) // block)
    return tile if is_full and _spread(tile) <= _COMPACT * spread(section)[0] else (*section, 0)


def described(tile: Sides | None) -> str:
    """A tile in words, to follow "tiles of"."""
    return f"{tile}" if tile is None or tile[2] else f"rods {tile[:2]}"


def _tiles(grid: Sides, block: int) -> Iterator[Sides]:
    for t, y in itertools.product(range(1, grid[0] + 1), range(1, grid[1] + 1)):
        yield from ((t, y, x) for x in range(1, min(grid[2], block // (t * y)) + 1))
