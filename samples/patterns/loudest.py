"""A pattern of one's own that chooses: tiles whose keys match a query and whose values say much.

Where `checkerboard.py` is planned once, this one looks at q, k and v at every call, head by head. `learned.py` does so
with trained weights, and `clusters.py` moves tokens too.

    >>> import vidaccel
    >>> from loudest import Loudest
    >>> with vidaccel.accelerate(pipe, Loudest(), density=0.3) as run:
    ...     video = pipe("a cat playing piano", num_frames=81).frames[0]

What `choose` does must not depend on how many blocks it finds: shapes are fixed, so that nothing waits for a GPU and
torch.compile can trace it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vidaccel.grid import Site, TokenLayout, choose_tile
from vidaccel.kernels.select import best_blocks, block_means
from vidaccel.patterns import Choice, Plan, Select


@dataclass(frozen=True, eq=False)
class LoudestBlocks(Select):
    """Chooses for one token order.

    Attributes:
        layout: that order.
        forced: (video blocks, video blocks) bool, kept whatever their score.
        kept: video blocks in a row.
    """

    forced: torch.Tensor
    kept: int

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Choice:
        """Means of tiles, (heads, tiles, channels), decide."""
        query, key, value = (block_means(x, self.layout) for x in (q, k, v))
        likely = (query @ key.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
        loud = likely * value.norm(dim=-1)[:, None]
        return Choice(best_blocks(loud, self.forced, self.kept, self.layout))


@dataclass(frozen=True)
class Loudest:
    """The tiles of each row with the largest probability times mean value.

    Attributes:
        block: tokens of a block.
    """

    name: ClassVar[str] = "loudest"
    per_site: ClassVar[bool] = False  # one plan serves all layers

    block: int = 128

    def plan(self, layout: TokenLayout, density: float | None, site: Site) -> Plan:
        """Plan all layers: how many tiles a row keeps is fixed here, which ones is not.

        Args:
            layout: the tokens in raster order.
            density: the density that the user asked for.
            site: the layer.
        """
        tiled = layout.tiled(choose_tile(layout.grid, self.block))
        video = tiled.video_blocks
        kept = max(1, round((density or 0.25) * video))
        own = torch.eye(video, dtype=torch.bool, device=layout.device)
        visited = kept * video * self.block**2 / layout.grid.tokens**2
        select = LoudestBlocks(tiled, own, kept)
        return Plan(density, kept / video, visited, None, f"loudest {kept} of {video} tiles", select=select)
