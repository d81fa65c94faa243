"""Cross-attention to the prompt tokens that hash like the queries (AnnCA).

Math: codes as in `selection.py`; a prompt token counts by how many queries share its code, codes r bits apart 16^-r.
    Each head keeps the same number of tokens, the best ones, so that none is left with nothing and shapes are fixed.
Cost: bits x d products a query, and a gather of the prompt's keys and values. Cross-attention is 1 to 4 % of a block at
    512 tokens, so little can be gained here.
Source: AnnCA of FAST-AR, arXiv 2602.01801, section 4.3, which drops tokens that share no bucket with any query.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .methods import AnnCross
from .selection import HashPlanes


@dataclass(frozen=True, eq=False)
class PromptChoice:
    """Chooses prompt tokens.

    Attributes:
        planes: of the hash.
        density: fraction of tokens kept.
    """

    planes: HashPlanes
    density: float

    @classmethod
    def of(cls, settings: AnnCross, d: int, device: torch.device) -> PromptChoice:
        """For heads of `d` channels."""
        return cls(HashPlanes.of(d, settings.bits, device), settings.density)

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (b, kept, h, d) of those given, (b, text, h, d), for queries (b, l, h, d)."""
        batch, text, heads, _ = key.shape
        kept = max(1, round(self.density * text))
        q, k = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key))
        counts = self.planes.counts(self.planes.codes(q), q.shape[1])[:, 0]
        score = (counts @ self.planes.affinity).gather(1, self.planes.codes(k))
        best = score.topk(kept, dim=-1, sorted=False).indices.sort(-1).values
        place = best.unflatten(0, (batch, heads)).transpose(1, 2)[..., None].expand(-1, -1, -1, key.shape[-1])
        return key.gather(1, place), value.gather(1, place)
