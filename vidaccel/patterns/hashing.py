"""Sign hashing: queries and keys that point the same way fall on the same side of most random planes.

Math: code(x) has one bit a plane, the side on which x - mean(x) lies; all tokens share the planes. Codes are numbered
    in Gray order, so that neighbours differ in one bit. A pair of codes r bits apart counts 16^-r, so that what is near
    counts first, and what is further away never nothing.
Cost: bits x d products a token.
Source: AnnSA of FAST-AR, arXiv 2602.01801, section 4.2; multi-probe hashing: Lv et al., VLDB 2007.
Limits: head dim up to 256; 1 to 8 bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

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
        centred = x[0].float() - (x[0].float().mean(0) if mean is None else mean)
        sides = centred @ self.planes[: x.shape[-1]] > 0
        code: torch.Tensor = (sides.long() << torch.arange(sides.shape[-1], device=x.device)).sum(-1)
        for shift in (1, 2, 4):
            code = code ^ (code >> shift)
        return code.T

    def counts(self, codes: torch.Tensor, block: int, weight: torch.Tensor | None = None) -> torch.Tensor:
        """(h, blocks, codes) fp32: how often each code stands in each block of (h, tokens) codes, or its weights."""
        kinds, tokens = self.affinity.shape[0], codes.shape[1]
        blocks = -(-tokens // block)
        cell = torch.arange(tokens, device=codes.device) // block * kinds + codes
        counts = torch.zeros(codes.shape[0], blocks * kinds, device=codes.device)
        counts = counts.scatter_add(1, cell, torch.ones_like(cell, dtype=torch.float32) if weight is None else weight)
        return counts.view(-1, blocks, kinds)
