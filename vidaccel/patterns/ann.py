"""Attention to approximate nearest neighbours: queries and keys that hash alike stand together, and attend.

Idea: the keys that matter to a query point its way, and so fall on the same side of most planes.
Math: each head sorts its queries and its keys by hash code (`hashing.py`), and cuts both into blocks. A query block
    keeps the key blocks with the largest sum of what its pairs of codes count, round(density x blocks) in all. This
    probes near buckets first and further ones until the row is full, so that no row is ever empty. Keys of the first
    frames are not sorted and always kept.
Cost: bits x d products a token, two sorts by counting, and a gather of q, k, v and the output a call.
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
from .hashing import MOST_BITS, HashPlanes
from .parameters import check_needed, check_sink
from .plan import Choice, Plan


@dataclass(frozen=True, eq=False)
class SharedBuckets(EqualRows):
    """Sorts by hash code and chooses the blocks with the most codes in common.

    Attributes:
        layout: raster order.
        forced: (video blocks, video blocks) bool, key blocks of the first frames.
        kept: video blocks in a row.
        planes: of the hash.
        sink: key tokens that stay where they are.
    """

    moves: ClassVar[bool] = True

    planes: HashPlanes
    sink: int

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Choice:
        """See `patterns.plan.Select`."""
        planes, tokens, block = self.planes, self.layout.grid.tokens, self.layout.block
        q_code, k_code = planes.codes(q[:, :tokens]), planes.codes(k[:, :tokens])
        q_order, q_count = planes.sort(q_code, block)
        k_order, k_count = planes.sort(k_code, block, first=torch.arange(tokens, device=k.device) < self.sink)
        scores = planes.shared(q_count, k_count)
        mask = best_blocks(scores, self.forced, self.kept, self.layout)
        return Choice(mask, self._with_text(q_order), self._with_text(k_order))

    def _with_text(self, order: torch.Tensor) -> torch.Tensor:
        """(1, slots, h): an order (h, video tokens), everything behind them in its place."""
        rest = torch.arange(order.shape[1], self.layout.slots, device=order.device)
        return torch.cat([order.T, rest[:, None].expand(-1, order.shape[0])])[None]


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
        if not 1 <= self.bits <= MOST_BITS:
            raise PatternError(f"ann bits={self.bits} was asked for; give 1 to {MOST_BITS}")

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
        select = SharedBuckets(raster, forced, kept, HashPlanes.of(self.bits, self.seed), sink)
        rule = f"best {kept} of {blocks} blocks by {self.bits} bits"
        return dynamic_plan(select, density, rule, self.reselect).to(layout.device)
