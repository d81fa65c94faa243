"""Sign hashing: queries and keys that point the same way fall on the same side of most random planes.

Math: code(x) has one bit a plane, the side on which x - mean(x) lies; all tokens share the planes. Codes are numbered
    in Gray order, so that neighbours differ in one bit. A pair of codes r bits apart counts 16^-r, so that what is near
    counts first, and what is further away never nothing.
Cost: bits x d products a token, and a sort by counting.
Source: AnnSA of FAST-AR, arXiv 2602.01801, section 4.2; multi-probe hashing: Lv et al., VLDB 2007.
Limits: head dim up to 256; 1 to 8 bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..kernels.select import in_order, sign_codes

_PROBE = 16.0
_MOST_CHANNELS = 256
MOST_BITS = 8


class HashPlanes(NamedTuple):
    """Planes, and what two codes have in common.

    Attributes:
        planes: (256, bits) fp32, normals of the planes, of which d channels use the first d.
        affinity: (codes, codes) fp32, what a pair of codes counts, in Gray order.
    """

    planes: torch.Tensor
    affinity: torch.Tensor

    @classmethod
    def of(cls, bits: int, seed: int = 0) -> HashPlanes:
        """Random planes of a seed."""
        planes = torch.randn(_MOST_CHANNELS, bits, generator=torch.Generator().manual_seed(seed))
        place = torch.arange(2**bits)
        code = place ^ (place >> 1)
        differ = code[:, None] ^ code
        distance = torch.stack([(differ >> bit) & 1 for bit in range(bits)]).sum(0)
        return cls(planes, _PROBE ** -distance.float())

    def to(self, device: torch.device | str) -> HashPlanes:
        """The same with its tensors on `device`."""
        return HashPlanes(self.planes.to(device), self.affinity.to(device))

    def codes(self, x: torch.Tensor, mean: torch.Tensor | None = None) -> torch.Tensor:
        """(h, tokens) int64, the place in Gray order of each token's code; x (1, tokens, h, d), its mean (h, d)."""
        mean = x[0].mean(0, dtype=torch.float32) if mean is None else mean
        return sign_codes(x, mean.float(), self.planes)

    def sort(
        self, codes: torch.Tensor, block: int, first: torch.Tensor | None = None, last: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens by code, of equal codes the first first.

        Args:
            codes: (h, tokens).
            block: tokens of a block of them, once sorted.
            first: (tokens,) or (h, tokens) bool, what stands before all codes.
            last: likewise, what stands behind all codes.

        Returns:
            The token in each place, (h, tokens) int64, and (h, blocks, codes) fp32, how often each code stands in each
            block; what is first or last is not counted.
        """
        kinds, tokens = self.affinity.shape[0], codes.shape[1]
        rank = codes + 1
        rank = rank if first is None else rank.masked_fill(first, 0)
        rank = rank if last is None else rank.masked_fill(last, kinds + 1)
        order, start = in_order(rank, kinds + 2)
        begin, end = start[:, None, 1:-1], start[:, None, 2:]
        edge = torch.arange(0, tokens, block, device=codes.device)[:, None]
        counts = torch.minimum(end, edge + block) - torch.maximum(begin, edge)
        return order, counts.clamp(min=0).float()

    def shared(self, q_counts: torch.Tensor, k_counts: torch.Tensor) -> torch.Tensor:
        """(h, query blocks, key blocks) fp32: what blocks of so many codes have in common, pair by pair."""
        with torch.autocast("cpu" if q_counts.is_meta else q_counts.device.type, enabled=False):
            return q_counts @ self.affinity @ k_counts.transpose(1, 2)

    def counts(self, codes: torch.Tensor) -> torch.Tensor:
        """(h, codes) fp32: how often each stands in (h, tokens) codes."""
        counts = torch.zeros(codes.shape[0], self.affinity.shape[0], device=codes.device)
        return counts.scatter_add(1, codes, torch.ones_like(codes, dtype=torch.float32))
