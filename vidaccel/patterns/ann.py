"""Attention to approximate nearest neighbours: queries and keys that hash alike stand together, and attend.

Idea: the keys that matter to a query point its way, and so fall on the same side of most planes.
Math: code(x) has one bit a random plane, the side on which x - mean(x) lies; q and k share the planes. Each head sorts
    its queries and its keys by code, in Gray order, so that neighbours differ in one bit, and cuts both into blocks. A
    pair of codes at Hamming distance r counts 16^-r; a query block keeps the key blocks with the largest sum over its
    pairs, round(density x blocks) in all. This probes near buckets first and further ones until the row is full, so
    that no row is ever empty. Keys of the first frames are not sorted and always kept.
Cost: bits x d products a token, two sorts, and a gather of q, k, v and the output a call.
Source: AnnSA of FAST-AR, arXiv 2602.01801, section 4.2, which leaves empty rows open; multi-probe hashing: Lv et al.,
    VLDB 2007.
Limits: head dim up to 256; 1 to 8 bits. Its blocks mix all places of a video. Not in a union.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..errors import PatternError
from ..grid import Site, TokenLayout
from ..kernels.select import best_blocks
from .dynamic import EqualRows, check_dynamic, check_reselect, dynamic_plan, row_length
from .parameters import check_needed, check_sink
from .plan import Choice, Plan

_PROBE = 16.0
_MOST_BITS = 8
_MOST_CHANNELS = 256


@dataclass(frozen=True, eq=False)
class SharedBuckets(EqualRows):
    """Sorts by hash code and chooses the blocks with the most codes in common.

    Attributes:
        layout: raster order.
        forced: (video blocks, video blocks) bool, key blocks of the first frames.
        kept: video blocks in a row.
        planes: (256, bits) fp32, normals of the hash planes.
        affinity: (codes, codes) fp32, what a pair of codes counts, in Gray order.
        sink: key tokens that stay where they are.
    """

    moves: ClassVar[bool] = True

    planes: torch.Tensor
    affinity: torch.Tensor
    sink: int

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Choice:
        """See `patterns.plan.Select`."""
        q_code, k_code = self.codes(q), self.codes(k)
        # First frames sort before every code.
        first = torch.arange(k_code.shape[0], device=k.device)[:, None] < self.sink
        q_order = q_code.argsort(dim=0, stable=True)
        k_order = k_code.masked_fill(first, -1).argsort(dim=0, stable=True)
        q_count, k_count = self._counts(q_code.gather(0, q_order)), self._counts(k_code.gather(0, k_order))
        scores = q_count @ self.affinity @ k_count.transpose(1, 2)
        mask = best_blocks(scores, self.forced, self.kept, self.layout)
        return Choice(mask, self._with_text(q_order), self._with_text(k_order))

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """(video tokens, h) int64, the place in Gray order of each token's code; x (1, slots, h, d)."""
        video = x[0, : self.layout.grid.tokens].float()
        sides: torch.Tensor = (video - video.mean(0)) @ self.planes[: x.shape[-1]] > 0
        code: torch.Tensor = (sides.long() << torch.arange(sides.shape[-1], device=x.device)).sum(-1)
        for shift in (1, 2, 4):
            code = code ^ (code >> shift)
        return code

    def _counts(self, codes: torch.Tensor) -> torch.Tensor:
        """(h, video blocks, codes) fp32: how often each code stands in each block; codes (video tokens, h)."""
        blocks, kinds = self.layout.video_blocks, self.affinity.shape[0]
        token = torch.arange(codes.shape[0], device=codes.device)
        cell = (token // self.layout.block)[:, None] * kinds + codes
        counts = torch.zeros(codes.shape[1], blocks * kinds, device=codes.device)
        counts = counts.scatter_add(1, cell.T, torch.ones_like(cell.T, dtype=torch.float32))
        return counts.view(-1, blocks, kinds)

    def _with_text(self, order: torch.Tensor) -> torch.Tensor:
        """(1, slots, h): an order of video tokens, everything behind them in its place."""
        rest = torch.arange(order.shape[0], self.layout.slots, device=order.device)
        return torch.cat([order, rest[:, None].expand(-1, order.shape[1])])[None]


@dataclass(frozen=True)
class Ann:
    """Approximate nearest neighbours by sign hashing.

    Attributes:
        bits: planes, and so 2^bits buckets.
        sink_frames: first latent frames that every query sees, in whole blocks.
        seed: of the planes.
        block: slots of a block.
        reselect: how many steps a choice serves, or the steps at which it is made anew.
    """

    name: ClassVar[str] = "ann"
    per_site: ClassVar[bool] = False
    chooses: ClassVar[bool] = True

    bits: int = 8
    sink_frames: int = 1
    seed: int = 0
    block: int = 128
    reselect: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        check_reselect(self.name, self.reselect)
        if not 1 <= self.bits <= _MOST_BITS:
            raise PatternError(f"ann bits={self.bits} was asked for; give 1 to {_MOST_BITS}")

    def check(self, density: float | None) -> None:
        """See `Pattern.check`."""
        check_needed(self.name, density)

    def plan(self, layout: TokenLayout, density: float | None, site: Site) -> Plan:
        """Plan all layers of one grid; see `Pattern.plan`.

        Raises:
            PatternError: no density, or one that the first frames exceed.
        """
        density = check_dynamic(self.name, layout, density)
        check_sink(self.name, self.sink_frames, layout.grid)
        raster = layout.to("cpu").tiled(None, self.block)
        sink = self.sink_frames * layout.grid.frame
        blocks = raster.video_blocks
        forced = (torch.arange(blocks) < -(-sink // self.block)).expand(blocks, -1)
        kept = max(1, row_length(self.name, raster, forced, density))
        planes = torch.randn(_MOST_CHANNELS, self.bits, generator=torch.Generator().manual_seed(self.seed))
        place = torch.arange(2**self.bits)
        code = place ^ (place >> 1)
        differ = code[:, None] ^ code
        distance = sum((differ >> bit) & 1 for bit in range(self.bits))
        affinity = _PROBE ** -torch.as_tensor(distance).float()
        select = SharedBuckets(raster, forced, kept, planes, affinity, sink)
        rule = f"best {kept} of {blocks} blocks by {self.bits} bits"
        return dynamic_plan(select, density, rule, self.reselect).to(layout.device)
