"""Cross-attention to the prompt tokens that hash like the queries (AnnCA), and padding that is one token.

Idea: pipelines pad a prompt with zeros, and nothing masks them out: equal tokens, often most of the prompt. They are
    merged first, exactly; a prompt of few words then has nothing left to drop, and is not hashed at all: 50 words of
    512 tokens are one block of 64, density 0.125, without an error.
Math: m equal keys are one whose logit has log(m) added. Of the others, where they are more than the budget: codes as in
    `selection.py`; a token counts by how many queries share its code, codes r bits apart 16^-r. Each head keeps as many
    tokens, the padding and the best ones, so that none is left with nothing and shapes are fixed.
Cost: merging, once a prompt. Hashing, at every call: bits x d products a query, and a gather of the prompt's keys and
    values. Cross-attention is 1 to 4 % of a block at 512 tokens, so little can be gained here.
Source: AnnCA of FAST-AR, arXiv 2602.01801, section 4.3, which drops tokens that share no bucket with any query.
Limits: kernels read keys a block at a time, so that no prompt is cut below one block: it would lose, and gain nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..kernels.attention import attention
from ..patterns.hashing import HashPlanes
from ..ranks import Ranks
from .methods import AnnCross

# Below so many tokens hashing takes longer than it saves: at 480p on one H200, 0.24 ms a call, nine times what dense
# attention to 512 tokens takes.
PAYS_FROM = 8192
# Equal rows of a product may differ by rounding, words differ by about their own length.
_EQUAL = 0.02


class Prompt(NamedTuple):
    """What a layer has of one prompt.

    Attributes:
        tensors: keys and values (b, tokens, h, d); behind them, where tokens stand for several, the logarithms of their
            number (b, 1, tokens) fp32, -inf for none.
        is_hashed: more tokens differ than the budget has room for.
        note: why it is as it is.
    """

    tensors: tuple[torch.Tensor, ...]
    is_hashed: bool = False
    note: str = ""


@dataclass(frozen=True, eq=False)
class PromptChoice:
    """Chooses prompt tokens.

    Attributes:
        planes: of the hash.
        settings: how many.
        ranks: that share the queries; all of them count.
        least: tokens of a prompt that is hashed; shorter ones are attended to whole.
    """

    planes: HashPlanes
    settings: AnnCross
    ranks: Ranks | None = None
    least: int = 0

    @classmethod
    def of(cls, settings: AnnCross, device: torch.device, ranks: Ranks | None = None, least: int = 0) -> PromptChoice:
        """With planes on `device`."""
        return cls(HashPlanes.of(settings.bits).to(device), settings, ranks, least)

    def prepare(self, text: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Prompt:
        """Merge padding, once a prompt; waits for the device.

        Args:
            text: (b, tokens, width), states that the keys and values were projected from.
            key: (b, tokens, h, d).
            value: likewise.
        """
        tokens, budget = text.shape[1], self._budget(text.shape[1])
        if budget == tokens:
            why = "" if self.settings.density == 1 else f", as one block of keys has {self.settings.block}"
            return Prompt((key, value), note=f"all {tokens} prompt tokens are attended to{why}")
        bias = merged_padding(text)
        differ = int(bias.isfinite().sum(1).max())
        if differ > budget and tokens < self.least:
            why = f"to choose among fewer than {self.least} takes longer than it saves, by estimate"
            return Prompt((key, value), note=f"all {tokens} prompt tokens are attended to: {why}")
        if differ > budget:
            return Prompt((key, value, bias[:, None]), True, f"{budget} of {differ} prompt tokens in each head")
        # Whole blocks, so that few shapes occur: compiled graphs know them soon.
        block = self.settings.block
        room = min(budget, -(-differ // block) * block)
        first = (~bias.isfinite()).byte().argsort(dim=1, stable=True)[:, :room]
        wide = first[..., None, None].expand(-1, -1, *key.shape[2:])
        kept = (key.gather(1, wide), value.gather(1, wide), bias.gather(1, first)[:, None])
        what = f"{differ} of {tokens} prompt tokens differ, and all of these are attended to"
        return Prompt(kept, note=f"{what}: density {room / tokens:.3f} of the prompt")

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values and logarithms (b, h, kept) of a hashed prompt's best tokens, for queries (b, l, h, d)."""
        batch, tokens, heads, _ = key.shape
        q, k = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key))
        if self.ranks is None:
            counts = self.planes.counts(self.planes.codes(q))
        else:
            # Channels of all queries, and how many they are: codes are taken around the mean of all.
            many = q.new_full((q.shape[2], 1), q.shape[1], dtype=torch.float32)
            total = self.ranks.sum(torch.cat([q[0].sum(0, dtype=torch.float32), many], 1))
            code = self.planes.codes(q, total[:, :-1] / total[:, -1:])
            counts = self.ranks.sum(self.planes.counts(code))
        score = (counts @ self.planes.affinity).gather(1, self.planes.codes(k)).unflatten(0, (batch, heads))
        score = torch.where(bias > 0, torch.inf, torch.where(bias.isfinite(), score, -torch.inf))
        best = score.topk(self._budget(tokens), dim=-1, sorted=False).indices.sort(-1).values
        place = best.transpose(1, 2)[..., None].expand(-1, -1, -1, key.shape[-1])
        return key.gather(1, place), value.gather(1, place), bias.expand(-1, heads, -1).gather(2, best)

    def _budget(self, tokens: int) -> int:
        return min(tokens, max(self.settings.block, round(self.settings.density * tokens)))


def attend_merged(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Attention of (b, l, h, d) to tokens that stand for several; it is none of the layers that a trace counts."""
    return attention(query, key, value, key_bias=bias, counted=False)[0]


def merged_padding(text: torch.Tensor) -> torch.Tensor:
    """(b, tokens) fp32 for (b, tokens, width): log(m) at the first of the m tokens equal to the last, -inf at others.

    Tokens that differ from the last have 0.
    """
    last = text[:, -1:].float()
    equal = (text.float() - last).norm(dim=-1) <= _EQUAL * last.norm(dim=-1)
    first = equal & (equal.cumsum(1) == 1)
    number = equal.sum(1, keepdim=True).float().log()
    return torch.where(first, number, torch.where(equal, -torch.inf, 0.0))
