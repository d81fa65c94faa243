"""Attention to the past, computed once and used again at later steps of a chunk.

Idea: while a chunk is denoised the past does not change, and queries change little, so the past's part of attention
    (its output A_out and log-sum-exp L_out) of an earlier step serves again; the own chunk's part is always fresh.
Math: A = merge((A_out, L_out), (A_in, L_in)), exact where both are fresh.
    What a reused part costs a head is estimated on some rows whose past is attended to anew:
        error = mean_i [ w_i sqrt(2 - 2 cos_i) + |dL_i| / 4 ],   w = sigmoid(L_out - L_in)
    since d|A| <= w |dA_out| + |dw| |A_out - A_in| and |dw| <= |dL_out| / 4. Heads below `threshold` reuse; the others
    are computed anew at once and kept.
Cost: the own chunk's attention, the past's for `probe` rows, and for the heads that fail.
Source: FlashBlock, arXiv 2602.05305; its masks are calibrated offline by cos < 0.85 or |dL| > 0.05 (`calibrated`). The
    error above is a bound from first principles, and needs no calibration. L_out stays in fp32: bf16's spacing at 8..16
    is 0.06, coarser than that threshold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import UsageError


@dataclass(frozen=True)
class FlashBlock:
    """Reuse of the past's part of attention.

    Attributes:
        threshold: predicted relative error below which a head reuses.
        probe: rows whose past is computed anew to predict it.
        refresh: reuse in the pass that writes a clean chunk to the cache too. Its keys then carry the error on for
            ever; off, as published numbers have it on.
        calibrated: [step][layer][head], True recomputes; replaces the probe. Steps count from the second forward of a
            chunk. See `Calibration`.
    """

    threshold: float = 0.05
    probe: int = 64
    refresh: bool = False
    calibrated: tuple[tuple[tuple[bool, ...], ...], ...] | None = None

    def __post_init__(self) -> None:
        if not self.threshold >= 0 or self.probe < 1:
            raise UsageError(f"{self} cannot be: threshold starts at 0, probe at 1")


def predicted_error(
    out: torch.Tensor, lse: torch.Tensor, old_out: torch.Tensor, old_lse: torch.Tensor, own_lse: torch.Tensor
) -> torch.Tensor:
    """How wrong attention becomes where the past's part is an old one.

    Args:
        out: (b, rows, h, d), the past's part anew.
        lse: (b, h, rows), likewise.
        old_out: as `out`, of an earlier step.
        old_lse: as `lse`, of an earlier step.
        own_lse: (b, h, rows), of the own chunk now.

    Returns:
        (b, h) fp32, relative to the output.
    """
    cos = torch.nn.functional.cosine_similarity(out.float(), old_out.float(), dim=-1).transpose(1, 2)
    weight = torch.sigmoid(lse - own_lse)
    # A past without any key has -inf at both times, and has not moved.
    drift = torch.where(lse == old_lse, 0, lse - old_lse).abs()
    moved: torch.Tensor = weight * (2 - 2 * cos.clamp(-1, 1)).sqrt() + drift / 4
    return moved.mean(-1)


class Calibration:
    """Averages of cosine and LSE drift over calibration videos, and the masks that follow from them.

    Args:
        cosine: a head below it is recomputed.
        drift: a head above it, in nats, is recomputed.
    """

    def __init__(self, cosine: float = 0.85, drift: float = 0.05) -> None:
        self.cosine, self.drift = cosine, drift
        self._sums: dict[tuple[int, int], list[torch.Tensor]] = {}

    def see(
        self,
        step: int,
        layer: int,
        out: torch.Tensor,
        lse: torch.Tensor,
        old_out: torch.Tensor,
        old_lse: torch.Tensor,
    ) -> torch.Tensor:
        """Count one chunk; shapes as in `predicted_error`, all rows.

        Returns:
            (b, h) bool, heads that reuse: a failing one is refreshed at once, as it will be later.
        """
        cos = torch.nn.functional.cosine_similarity(out.float(), old_out.float(), dim=-1).mean(1)
        drift = (lse - old_lse).abs().mean(-1)
        here = torch.stack([cos.mean(0), drift.mean(0)]).double()
        total = self._sums.setdefault((step, layer), [torch.zeros_like(here), torch.zeros(())])
        total[0] = total[0] + here
        total[1] = total[1] + 1
        return (cos >= self.cosine) & (drift <= self.drift)

    def table(self) -> tuple[tuple[tuple[bool, ...], ...], ...]:
        """[step][layer][head] for `FlashBlock.calibrated`."""
        steps = 1 + max(step for step, _ in self._sums)
        layers = 1 + max(layer for _, layer in self._sums)
        rows = []
        for step in range(steps):
            row = []
            for layer in range(layers):
                sums, count = self._sums[step, layer]
                cos, drift = sums / count
                row.append(tuple(((cos < self.cosine) | (drift > self.drift)).tolist()))
            rows.append(tuple(row))
        return tuple(rows)
