"""What patterns that choose blocks from q and k share: tile orders, what is always kept, and how long rows are.

Idea: how many blocks a call keeps is fixed when it is planned, only which ones is not. So its density is known before
    it runs, its tensors have fixed shapes, and no call waits for a GPU. Such a pattern says `chooses = True`, so that a
    union plans it first, and `reselect`, how many steps one choice serves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..blocks import BlockMask
from ..errors import PatternError
from ..grid import TokenLayout
from ..order import flat_box
from .parameters import check_density, check_needed
from .plan import Plan, Select
from .radial import ranked_layout


@dataclass(frozen=True, eq=False)
class EqualRows(Select):
    """What keeps equally many blocks in every row.

    Attributes:
        layout: token order.
        forced: (video blocks, video blocks) bool, kept by every choice.
        kept: video blocks in a row.
        moves: its masks count other keys than those given, or in another order, so that others cannot join them.
    """

    moves: ClassVar[bool] = False

    forced: torch.Tensor
    kept: int

    def forcing(self, forced: torch.Tensor, kept: int) -> EqualRows:
        """The same with other blocks that every choice keeps, and another number of blocks."""
        return replace(self, forced=forced, kept=kept)


def check_dynamic(pattern: str, layout: TokenLayout, density: float | None) -> float:
    """The density, which this pattern cannot do without.

    Raises:
        PatternError: there is none, or none in (0, 1]; or texts of several lengths, which are told apart later.
    """
    check_needed(pattern, density)
    check_density(density)
    assert density is not None
    if layout.k_len.ndim == 2 and layout.k_len.shape[0] > 1:
        raise PatternError(
            f"{pattern} was planned for texts of {layout.k_len.shape[0]} lengths; plan it for the whole text, and give "
            "the lengths to Plan.with_valid_text"
        )
    return density


def check_reselect(pattern: str, reselect: int | tuple[int, ...]) -> None:
    """Raise PatternError unless it is a number of steps from 1 on, or a tuple of step numbers from 0 on."""
    counts = isinstance(reselect, int) and reselect >= 1
    listed = isinstance(reselect, tuple) and all(isinstance(step, int) and step >= 0 for step in reselect)
    if not (counts or listed):
        raise PatternError(
            f"{pattern} reselect={reselect!r} was asked for; give the number of steps that a choice serves, from 1 on, "
            "or the steps at which it is made anew, such as (0, 10, 20)"
        )


def tile_layout(layout: TokenLayout, sink_frames: int, density: float) -> TokenLayout:
    """Compact tiles without holes; with a sink, one frame thick; boxes if these would fill half a row with several."""
    tiled = ranked_layout(layout, sink_frames > 0)
    share = _always_kept_share(tiled, sink_frames)
    if share <= max(1 / tiled.video_blocks, density / 2):
        return tiled
    boxes = layout.tiled(flat_box(layout.grid, layout.block))
    return boxes if _always_kept_share(boxes, sink_frames) < 0.8 * share else tiled


def _always_kept_share(layout: TokenLayout, sink_frames: int) -> float:
    return int(always_kept(layout, sink_frames)[-1].sum()) / layout.video_blocks


def frame_layout(layout: TokenLayout) -> TokenLayout:
    """Tiles of one frame each, but for those at the end of one and the beginning of the next."""
    # Frames of few tiles would be mostly such ones.
    small = layout.grid.frame < 4 * layout.block
    return layout.tiled(flat_box(layout.grid, layout.block)) if small else ranked_layout(layout, sink=True)


def always_kept(layout: TokenLayout, sink_frames: int) -> torch.Tensor:
    """(video blocks, video blocks) bool: the own block, and blocks with a token of the first frames."""
    video, block = layout.video_blocks, layout.block
    slots = layout.positions[: video * block, 0]
    frame = torch.nn.functional.pad(slots, (0, video * block - len(slots)), value=-1).view(video, block)
    sink = ((frame >= 0) & (frame < sink_frames)).any(1)
    return sink | torch.eye(video, dtype=torch.bool, device=layout.device)


def row_length(pattern: str, layout: TokenLayout, forced: torch.Tensor, density: float) -> int:
    """How many video blocks a row keeps.

    Args:
        pattern: its name, for the error.
        layout: of the tokens.
        forced: (video blocks, video blocks) bool, what every row keeps in any case.
        density: that was asked for.

    Raises:
        PatternError: fewer than must be kept.
    """
    video, least = layout.video_blocks, int(forced.sum(1).max())
    kept = round(density * video)
    if kept < least:
        raise PatternError(
            f"density {density:.4g} was asked of {pattern}, {kept} of {video} blocks a row; what every choice keeps "
            f"(the own block, the first frames, other parts) is {least} already: ask for {least / video:.3f} or more, "
            "or for fewer sink_frames"
        )
    return kept


def rows_up_to(chosen: torch.Tensor, count: torch.Tensor, layout: TokenLayout) -> BlockMask:
    """The mask of rows of different lengths. Text sees all and is seen by all.

    Its list of blocks has room for the longest rows, so that nobody has to know how long they are.

    Args:
        chosen: (h, video blocks, most) int64, video blocks; the first ones of each row count, ascending.
        count: (h, video blocks) int64, how many of them.
        layout: the order of the blocks.
    """
    heads, video, most = chosen.shape
    blocks, device = layout.blocks, chosen.device
    text, every = torch.arange(video, blocks, device=device), torch.arange(blocks, device=device)
    length = torch.cat([count + len(text), count.new_full((heads, len(text)), blocks)], 1).flatten()
    ptr = torch.nn.functional.pad(length.cumsum(0), (1, 0))
    room = heads * (video * (most + len(text)) + len(text) * blocks)
    first, within = ptr[:-1].view(heads, blocks), torch.arange(most, device=device)
    places = [
        # What does not count goes to one place more, which is cut off.
        torch.where(within < count[..., None], first[:, :video, None] + within, room),
        (first[:, :video] + count)[..., None] + torch.arange(len(text), device=device),
        first[:, video:, None] + every,
    ]
    found = [chosen, text.expand(heads, video, -1), every.expand(heads, len(text), -1)]
    place, block = (torch.cat([part.flatten() for part in parts]) for parts in (places, found))
    idx = torch.zeros(room + 1, dtype=torch.int64, device=device).scatter(0, place, block)[:-1]
    return BlockMask(ptr.int(), idx.int(), length.int(), layout)


def dynamic_plan(select: EqualRows, density: float, rule: str, reselect: int | tuple[int, ...] = 1) -> Plan:
    """The plan of equally long rows: its density is expected over all choices of what is not forced."""
    layout, forced = select.layout, select.forced.double()
    length = layout.q_len[: layout.video_blocks].double()
    tokens = layout.grid.tokens
    certain, count = forced @ length, forced.sum(1)
    rest = (select.kept - count) * (tokens - certain) / (layout.video_blocks - count).clamp(min=1)
    delivered = float(length @ (certain + rest)) / tokens**2
    visited = select.kept * layout.video_blocks * layout.block**2 / tokens**2
    return Plan(density, delivered, visited, None, rule, select=select, reselect=reselect)
