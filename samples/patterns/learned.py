"""A pattern of one's own with weights: a learned look at block means decides, another one in each layer.

Selectors that were trained beside a model (SeerAttention, arXiv 2410.13276; VSA, arXiv 2505.13389) score blocks by
small projections of their pooled queries and keys. Theirs or yours come from a safetensors file with one tensor
`query` and one tensor `key`, each (layers, head dim, rank):

    >>> import vidaccel
    >>> from learned import Learned
    >>> with vidaccel.accelerate(pipe, Learned("gates.safetensors"), density=0.3) as run:
    ...     video = pipe("a cat playing piano", num_frames=81).frames[0]

or `vidaccel render --attention learned:Learned --set attention.file=gates.safetensors --density 0.3 ...`
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from safetensors.torch import load_file

from vidaccel.grid import Site, TokenLayout
from vidaccel.kernels.select import best_blocks, block_means
from vidaccel.order import fullest
from vidaccel.patterns import Choice, Plan, Select


@dataclass(frozen=True, eq=False)
class ProjectedBlocks(Select):
    """Chooses for one layer.

    Attributes:
        layout: tile order.
        forced: (video blocks, video blocks) bool, kept whatever their score.
        kept: video blocks in a row.
        query: (d, rank), what block means of queries are projected by.
        key: (d, rank), likewise of keys.
    """

    forced: torch.Tensor
    kept: int
    query: torch.Tensor
    key: torch.Tensor

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Choice:
        """Products of the projected means, (heads, tiles, tiles), decide."""
        query, key = block_means(q, self.layout) @ self.query, block_means(k, self.layout) @ self.key
        return Choice(best_blocks(query @ key.transpose(1, 2), self.forced, self.kept, self.layout))


@dataclass(frozen=True)
class Learned:
    """The tiles of each row that a trained selector likes best, and the own one.

    Attributes:
        file: safetensors with `query` and `key`, (layers, head dim, rank).
        block: tokens of a block.
    """

    name: ClassVar[str] = "learned"
    per_site: ClassVar[bool] = True  # each layer has weights of its own

    file: str
    block: int = 128

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """What the file holds."""
        return load_file(self.file)

    def plan(self, layout: TokenLayout, density: float | None, site: Site) -> Plan:
        """Plan one layer: how many tiles a row keeps is fixed here, which ones is not.

        Args:
            layout: the tokens in raster order.
            density: the density that the user asked for.
            site: the layer, whose number picks the weights.
        """
        tiled = layout.tiled(fullest(layout.grid, self.block))
        video = tiled.video_blocks
        kept = max(1, round((density or 0.25) * video))
        own = torch.eye(video, dtype=torch.bool, device=layout.device)
        visited = kept * video * self.block**2 / layout.grid.tokens**2
        query, key = (self.weights[name][site.index].float().to(layout.device) for name in ("query", "key"))
        select = ProjectedBlocks(tiled, own, kept, query, key)
        return Plan(density, kept / video, visited, None, f"learned, {kept} of {video} tiles", select=select)
