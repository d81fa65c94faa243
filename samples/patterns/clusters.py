"""A pattern of one's own that clusters: tokens that mean alike stand together, wherever in the video they are.

Semantic-aware permutation as in Sparse VideoGen 2 (arXiv 2505.18875, section 4), on blocks of one size: queries and
keys of each head are clustered by k-means, sorted by cluster, and each block of queries keeps the key blocks whose
means agree best with its own. Attention is the same in any order, so that only what is left out changes the result.

    >>> import vidaccel
    >>> from clusters import Clusters
    >>> with vidaccel.accelerate(pipe, Clusters(reselect=5), density=0.3) as run:
    ...     video = pipe("a cat playing piano", num_frames=81).frames[0]

`reselect=5` lets one clustering serve five steps; the report says how far the choices drift meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vidaccel.grid import Site, TokenLayout
from vidaccel.kernels.select import best_blocks, block_means
from vidaccel.patterns import Choice, Plan, Select


@dataclass(frozen=True, eq=False)
class ClusteredBlocks(Select):
    """Clusters, sorts and chooses, head by head.

    Attributes:
        layout: raster order.
        forced: (video blocks, video blocks) bool, nothing: where tokens move, no block is certain.
        kept: video blocks in a row.
        clusters: how many, of the queries and of the keys.
        rounds: of k-means.
    """

    forced: torch.Tensor
    kept: int
    clusters: int
    rounds: int

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Choice:
        """A choice that moves tokens: `q_order` and `k_order` say which token stands in each slot of a head."""
        q_order, k_order = self.sorted_by_cluster(q), self.sorted_by_cluster(k)
        query, key = (
            block_means(x.gather(1, order[..., None].expand(x.shape)), self.layout)
            for x, order in ((q, q_order), (k, k_order))
        )
        mask = best_blocks(query @ key.transpose(1, 2), self.forced, self.kept, self.layout)
        return Choice(mask, q_order, k_order)

    def sorted_by_cluster(self, x: torch.Tensor) -> torch.Tensor:
        """(1, slots, h) int64 for x (1, slots, h, d); what is no video stays where it is."""
        tokens, slots = self.layout.grid.tokens, x.shape[1]
        video = x[0, :tokens].float().transpose(0, 1)
        centre = video[:, :: -(-tokens // self.clusters)]
        for _ in range(self.rounds):
            # The nearest centre c of a token x has the largest <x, c> - |c|^2 / 2.
            near = (video @ centre.mT - centre.square().sum(-1)[:, None] / 2).argmax(-1, keepdim=True)
            count = torch.zeros_like(centre[..., :1]).scatter_add(1, near, torch.ones_like(video[..., :1]))
            total = torch.zeros_like(centre).scatter_add(1, near.expand(video.shape), video)
            centre = torch.where(count > 0, total / count.clamp(min=1), centre)
        rest = torch.arange(tokens, slots, device=x.device)[:, None].expand(-1, x.shape[2])
        return torch.cat([near[..., 0].argsort(dim=1, stable=True).T, rest])[None]


@dataclass(frozen=True)
class Clusters:
    """The best blocks among clustered tokens.

    Attributes:
        clusters: how many, of the queries and of the keys.
        rounds: of k-means.
        block: tokens of a block.
        reselect: how many steps one clustering serves.
    """

    name: ClassVar[str] = "clusters"
    per_site: ClassVar[bool] = False  # one plan serves all layers

    clusters: int = 64
    rounds: int = 3
    block: int = 128
    reselect: int = 1

    def plan(self, layout: TokenLayout, density: float | None, site: Site) -> Plan:
        """Plan all layers: how many blocks a row keeps is fixed here, which ones is not.

        Args:
            layout: the tokens in raster order.
            density: the density that the user asked for.
            site: the layer.
        """
        video = layout.video_blocks
        kept = max(1, round((density or 0.25) * video))
        forced = torch.zeros(video, video, dtype=torch.bool, device=layout.device)
        visited = kept * video * self.block**2 / layout.grid.tokens**2
        select = ClusteredBlocks(layout, forced, kept, self.clusters, self.rounds)
        rule = f"best {kept} of {video} blocks of {self.clusters} clusters"
        return Plan(density, kept / video, visited, None, rule, select=select, reselect=self.reselect)
