"""Attention to the past, computed once and used again at later steps of a chunk.

Idea: while a chunk is denoised the past does not change, and queries change little, so the past's part of attention
    (its output A_out and log-sum-exp L_out) of an earlier step serves again; the own chunk's part is always fresh.
Math: A = merge((A_out, L_out), (A_in, L_in)), exact where both are fresh.
    What a reused part costs a head is measured on some rows, whose past is attended to anew; both parts then give what
    these rows should be, A, and what they would be with the old past, A':
        error = |A' - A| / |A|, over the rows of a head. Heads below `threshold` reuse; the others are computed anew at
    once and kept.
Cost: the own chunk's attention, the past's for `probe` rows, and for the heads that fail.
Source: FlashBlock, arXiv 2602.05305; its masks are calibrated offline by cos < 0.85 or |dL| > 0.05 (`calibrated`),
    which say little of the output: what a head has little of may change much. A bound on the error from cosine and
    drift, w sqrt(2 - 2 cos) + |dL| / 4, was tried before: on cogvideox-tiny it was so loose that 0.98 of all pairs was
    computed at a threshold of 0.1, where the error itself lets 0.67 do. L_out stays in fp32: bf16's spacing at 8..16 is
    0.06, coarser than that drift.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import UsageError


@dataclass(frozen=True)
class FlashBlock:
    """Reuse of the past's part of attention.

    Attributes:
        threshold: relative error of a head's output below which it reuses.
        probe: rows whose past is computed anew to measure it.
        refresh: reuse in the pass that writes a clean chunk to the cache too. Its keys then carry the error on for
            ever; off, as published numbers have it on.
        calibrated: [step][layer][head], True recomputes; replaces the probe. Steps count from the second forward of a
            chunk. `vidaccel.pipelines.causal_calibration.calibrated` makes it.
    """

    threshold: float = 0.05
    probe: int = 64
    refresh: bool = False
    calibrated: tuple[tuple[tuple[bool, ...], ...], ...] | None = None

    def __post_init__(self) -> None:
        if not self.threshold >= 0 or self.probe < 1:
            raise UsageError(f"{self} cannot be: threshold starts at 0, probe at 1")
        if self.calibrated is not None:
            # Lists, as JSON gives them, have no hash.
            table = tuple(tuple(tuple(layer) for layer in step) for step in self.calibrated)
            object.__setattr__(self, "calibrated", table)

    def check(self, layers: int, heads: int) -> None:
        """Whether the calibration is of a model with so many layers and heads.

        Raises:
            UsageError: it is not.
        """
        if self.calibrated is None:
            return
        found = {tuple(len(layer) for layer in step) for step in self.calibrated}
        if found != {(heads,) * layers}:
            raise UsageError(
                f"FlashBlock was given a calibration with heads of each layer {sorted(found)}; this transformer has "
                f"{layers} layers of {heads} heads: calibrate with it, or leave `calibrated` out"
            )


def late_error(now: torch.Tensor, late: torch.Tensor) -> torch.Tensor:
    """How wrong rows of attention are where a part of them is of an earlier step.

    Args:
        now: (b, rows, h, d), everything anew.
        late: likewise, with the old part.

    Returns:
        (b, h) fp32, relative to `now`.
    """
    fresh = now.float()
    error: torch.Tensor = (late.float() - fresh).norm(dim=(1, 3)) / fresh.norm(dim=(1, 3)).clamp(min=1e-30)
    return error


class Calibration:
    """Averages of cosine and LSE drift over calibration videos, and the masks that follow from them.

    Args:
        cosine: a head below it is recomputed.
        drift: a head above it, in nats, is recomputed.
    """

    def __init__(self, cosine: float = 0.85, drift: float = 0.05) -> None:
        self.cosine, self.drift = cosine, drift
        self._sums: dict[tuple[int, int], list[torch.Tensor]] = {}

    @property
    def is_empty(self) -> bool:
        """Nothing was seen yet."""
        return not self._sums

    def see(
        self,
        step: int,
        layer: int,
        out: torch.Tensor,
        lse: torch.Tensor,
        old_out: torch.Tensor,
        old_lse: torch.Tensor,
    ) -> torch.Tensor:
        """Count one chunk.

        Args:
            step: of the chunk, from its second forward on.
            layer: its number.
            out: (b, rows, h, d), the past's part anew.
            lse: (b, h, rows), likewise.
            old_out: as `out`, of an earlier step.
            old_lse: as `lse`, of an earlier step.

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
