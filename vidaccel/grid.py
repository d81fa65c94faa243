"""Where tokens are: the video grid, and the order and blocks in which a kernel sees it.

Tensor letters, used in every shape of this project:
    b  batch        h  attention heads      l  tokens (`lq` queries, `lk` keys)      d  channels of one head

Two orders of the same tokens:
    model order   what the transformer holds: frame-major raster (t, y, x), text before or after it
    kernel order  [video blocks | text blocks]; a block is `block` slots, filled from its front
A slot that no token fills is a hole: whatever stands there is never read by a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch

from . import order as orders
from .errors import LayoutError
from .order import choose_tile as choose_tile

BLOCK_SIZES = (16, 32, 64, 128)


class VideoGrid(NamedTuple):
    """Latent tokens after patching, along time, height and width."""

    t: int
    y: int
    x: int

    @property
    def tokens(self) -> int:
        """How many tokens the grid holds."""
        return self.t * self.y * self.x

    @property
    def frame(self) -> int:
        """Tokens in one latent frame."""
        return self.y * self.x

    def __str__(self) -> str:
        return f"{self.t}x{self.y}x{self.x}"


@dataclass(frozen=True)
class Site:
    """One attention layer of a transformer.

    Attributes:
        name: its place in `attn_processors`, such as "blocks.0.attn1.processor".
        index: number of the layer, counted over the sites of its kind.
        kind: "self" (video to video), "joint" (video and text together) or "cross" (video to text).
        family: the model family, such as "wan": patterns with a rule per family look at it.
        native: (height, width) in latent tokens of the frames that the model was trained on; None where nobody says.
    """

    name: str
    index: int
    kind: str
    family: str
    native: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Order and blocks of one attention call. Build it with `TokenLayout.of`.

    Attributes:
        grid: the video tokens.
        text: text tokens beside them (joint attention), 0 elsewhere.
        block: slots in a block, one of 16, 32, 64, 128 (GPU kernels are tuned for 64 and 128).
        tile: tokens of one block along (t, y, x), or None for raster order. The last tile of an axis is
            clipped where the tile does not divide it. A last side of 0: blocks are cut from rods, see `order`.
        fold: tiles along an axis gather tokens `fold` apart: those with the same remainder by it come first to last,
            then those with the next remainder. (1, 1, 1) is the usual order; dilated windows use others.
        order: (slots,) int64, the model-order index of the token in each slot; holes hold 0.
        q_len: (blocks,) int32, filled slots of each query block, counted from its front.
        k_len: (blocks,) or (b, blocks) int32, the same for keys; two-dimensional where the valid text
            differs between samples.
        slot_of: (tokens,) int64, the slot of each model-order token: the inverse of `order`.
        text_first: the model holds [text | video] rather than [video | text].
        is_identity: kernel order is model order, nothing needs to move.
    """

    grid: VideoGrid
    text: int
    block: int
    tile: tuple[int, int, int] | None
    order: torch.Tensor
    q_len: torch.Tensor
    k_len: torch.Tensor
    slot_of: torch.Tensor
    text_first: bool = False
    is_identity: bool = False
    fold: tuple[int, int, int] = (1, 1, 1)

    @classmethod
    def of(
        cls,
        grid: VideoGrid | tuple[int, int, int],
        text: int = 0,
        block: int = 128,
        tile: tuple[int, int, int] | None = None,
        *,
        text_first: bool = False,
        fold: tuple[int, int, int] = (1, 1, 1),
    ) -> TokenLayout:
        """Lay out a grid and its text.

        Args:
            grid: (t, y, x) latent tokens.
            text: text tokens of a joint attention.
            block: slots in a block.
            tile: shape of the box of tokens that makes one block, or (t, y, 0) for blocks cut from rods of this
                cross-section; None keeps raster order.
            text_first: the model holds [text | video] (CogVideoX) rather than [video | text].
            fold: along each axis, how far apart the neighbours inside a tile are; needs a tile.

        Raises:
            LayoutError: an empty axis, an unknown block size, a tile that does not fit its block, or a fold without a
                tile or beyond its axis.
        """
        grid = VideoGrid(*grid)
        if min(grid) < 1 or text < 0:
            raise LayoutError(
                f"a grid of {grid} with {text} text tokens was asked for; every axis needs 1 token or more"
            )
        if block not in BLOCK_SIZES:
            raise LayoutError(f"blocks of {block} tokens were asked for; possible: {', '.join(map(str, BLOCK_SIZES))}")
        if any(not 1 <= apart <= length for apart, length in zip(fold, grid, strict=True)) or (
            tile is None and max(fold) > 1
        ):
            raise LayoutError(
                f"a fold of {fold} was asked for; on a {grid} grid it lies in 1..axis, and needs a tile, not {tile}"
            )
        order, lengths = orders.raster(grid, block) if tile is None else orders.tiled(grid, block, tile, fold)
        if text:
            holes = len(lengths) * block - len(order)
            text_order, text_lengths = orders.raster((1, 1, text), block)
            order = torch.cat([order, order.new_zeros(holes), text_order + grid.tokens])
            lengths = torch.cat([lengths, text_lengths])
        slots = torch.arange(len(order))
        filled = slots % block < lengths.repeat_interleave(block)[: len(order)]
        if text_first:
            order = torch.where(filled, (order + text) % (grid.tokens + text), 0)
        slot_of = torch.empty(grid.tokens + text, dtype=torch.int64)
        slot_of[order[filled]] = slots[filled]
        identity = len(order) == len(slot_of) and bool((order == slots).all())
        return cls(grid, text, block, tile, order, lengths, lengths, slot_of, text_first, identity, fold)

    def tiled(
        self, tile: tuple[int, int, int] | None, block: int | None = None, fold: tuple[int, int, int] = (1, 1, 1)
    ) -> TokenLayout:
        """The same tokens in another tile order."""
        layout = TokenLayout.of(self.grid, self.text, block or self.block, tile, text_first=self.text_first, fold=fold)
        if self.k_len.ndim == 2:
            layout = layout.with_valid_text(self.k_len[:, self.video_blocks :].sum(1).cpu())
        return layout.to(self.device)

    def with_valid_text(self, valid: torch.Tensor) -> TokenLayout:
        """Keys of padded text fall away: `valid` (b,) counts the valid text tokens of each sample."""
        lengths = self.q_len.repeat(valid.shape[0], 1)
        start = torch.arange(self.blocks - self.video_blocks, device=self.device) * self.block
        lengths[:, self.video_blocks :] = (valid.to(self.device)[:, None] - start).clamp(0, self.block).int()
        return replace(self, k_len=lengths)

    @property
    def is_boxes(self) -> bool:
        """Every video block is a box of tokens."""
        return self.tile is not None and self.tile[2] > 0

    @property
    def device(self) -> torch.device:
        """Where the index tensors are."""
        return self.order.device

    def to(self, device: torch.device | str) -> TokenLayout:
        """The same layout with its tensors on `device`."""
        if self.order.device == torch.device(device):
            return self
        moved = {name: getattr(self, name).to(device) for name in ("order", "q_len", "k_len", "slot_of")}
        return replace(self, **moved)

    @property
    def tokens(self) -> int:
        """Video and text tokens together."""
        return self.grid.tokens + self.text

    @property
    def slots(self) -> int:
        """Length of a tensor in kernel order: blocks x block, less the holes at the very end."""
        return self.order.shape[0]

    @property
    def blocks(self) -> int:
        """Blocks of video and text together."""
        return self.q_len.shape[0]

    @property
    def video_blocks(self) -> int:
        """Blocks that hold video; text blocks follow them."""
        return self.blocks - self.text_blocks

    @property
    def text_blocks(self) -> int:
        """Blocks that hold text, the last ones."""
        return -(-self.text // self.block)

    @cached_property
    def filled(self) -> torch.Tensor:
        """(slots,) bool: a token stands in this slot."""
        within = torch.arange(self.blocks * self.block, device=self.device) % self.block
        return (within < self.q_len.repeat_interleave(self.block))[: self.slots]

    @cached_property
    def positions(self) -> torch.Tensor:
        """(slots, 3) int32: (t, y, x) of the video token in each slot; -1 in text slots and holes."""
        token = self.order - (self.text if self.text_first else 0)
        position = torch.stack([token // self.grid.frame, token // self.grid.x % self.grid.y, token % self.grid.x], 1)
        video = self.filled & (torch.arange(self.slots, device=self.device) < self.video_blocks * self.block)
        return torch.where(video[:, None], position, -1).int()

    def to_kernel(self, x: torch.Tensor) -> torch.Tensor:
        """(b, tokens, ...) in model order -> (b, slots, ...) in kernel order. No copy where the orders agree."""
        return x if self.is_identity else x.index_select(1, self.order)

    def to_model(self, x: torch.Tensor) -> torch.Tensor:
        """(b, slots, ...) in kernel order -> (b, tokens, ...) in model order."""
        return x if self.is_identity else x.index_select(1, self.slot_of)
