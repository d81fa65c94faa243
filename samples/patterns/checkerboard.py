"""A pattern of one's own: tiles see the tiles of their colour, as on a checkerboard in space and time.

A pattern is a frozen dataclass with a name and a `plan` method; it needs no registration:

    >>> import vidaccel
    >>> from checkerboard import Checkerboard
    >>> with vidaccel.accelerate(pipe, Checkerboard()) as run:
    ...     video = pipe("a cat playing piano", num_frames=81).frames[0]

`plan` gets the tokens in raster order, and gives back which blocks of key tokens each block of query tokens keeps. It
runs once for each video size, on the CPU or not, and knows neither the model nor the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vidaccel.blocks import BlockMask
from vidaccel.grid import Site, TokenLayout, choose_tile
from vidaccel.patterns import Plan


@dataclass(frozen=True)
class Checkerboard:
    """Half of all pairs, whatever the density that is asked for.

    Attributes:
        block: tokens of a block.
        alternate: odd layers see the other colour, and their own tile.
    """

    name: ClassVar[str] = "checkerboard"
    per_site: ClassVar[bool] = True  # ask for a plan at every layer, because `alternate` looks at its number

    block: int = 128
    alternate: bool = True

    def plan(self, layout: TokenLayout, density: float | None, site: Site) -> Plan:
        """Plan one layer.

        Args:
            layout: the tokens in raster order.
            density: the density that the user asked for; this pattern has only one.
            site: the layer.
        """
        # Boxes of neighbouring tokens make better blocks than stretches of the raster order.
        tiled = layout.tiled(choose_tile(layout.grid, self.block))
        video = tiled.video_blocks

        # The first token of each tile tells where on the board it stands.
        corner = tiled.positions[:: self.block][:video]
        colour = (corner // torch.tensor(tiled.tile, device=corner.device)).sum(1) % 2
        same = colour[:, None] == colour
        if self.alternate and site.index % 2:
            same = ~same

        # True everywhere else: text sees all of the video, and the video sees all of the text.
        keep = torch.ones(tiled.blocks, tiled.blocks, dtype=torch.bool, device=layout.device)
        keep[:video, :video] = same | torch.eye(video, dtype=torch.bool, device=layout.device)
        return Plan.of(BlockMask.of(keep, tiled), density, rule=f"tiles of {tiled.tile}")
