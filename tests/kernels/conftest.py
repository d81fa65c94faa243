"""Problems for kernels, their answers in float64, and the rule that decides whether a kernel is right."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

# Triton decides at import whether its kernels run on a GPU or, without one, in Python.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from vidaccel.blocks import BlockMask, Window
from vidaccel.grid import TokenLayout
from vidaccel.kernels import canary, reference
from vidaccel.kernels.problem import Rows


@dataclass(frozen=True)
class Case:
    """Arguments of one attention call."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: BlockMask | None
    key_bias: torch.Tensor | None = None
    scale: float = 0.3

    @property
    def rows(self) -> Rows | None:
        return None if self.mask is None else Rows.of(self.mask)

    def kwargs(self, backend: str) -> dict[str, object]:
        return {"mask": self.mask, "key_bias": self.key_bias, "scale": self.scale, "backend": backend}

    def assert_right(self, result: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Every row within twice the error of the dense attention in the same precision."""
        out, lse = result
        b, lq, h, _ = self.q.shape
        assert out.shape == self.q.shape
        assert out.dtype == self.q.dtype
        assert lse.shape == (b, h, lq)
        assert lse.dtype == torch.float32
        assert out.is_contiguous()
        assert lse.is_contiguous()
        slots, heads = torch.arange(lq, device=out.device), torch.arange(h, device=out.device)
        problem = (self.q, self.k, self.v, self.rows, self.scale, self.key_bias, slots, heads)
        exact, near = (reference.sampled(*problem, dtype) for dtype in (torch.float64, self.q.dtype))
        assert not exact[0].isnan().any()
        for name, given, true, low, least in zip(("out", "lse"), result, exact, near, (0.0, 1.0), strict=True):
            error = canary.largest_error(given, true)
            assert error <= canary.error_budget(true, low, given.dtype, least), name
        nothing = exact[1] == -torch.inf
        assert torch.equal(lse == -torch.inf, nothing)
        assert (out.transpose(1, 2)[nothing] == 0).all()


def poison(x: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    """NaN and infinity along axis 1, wherever `spare` (l,) says that nobody may look."""
    x[:, spare] = torch.tensor(torch.nan, dtype=x.dtype)
    x[:, spare.nonzero()[::2, 0]] = torch.inf
    return x


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    """Builds a problem of random blocks; see its arguments."""

    def make(
        *,
        grid: tuple[int, int, int] = (3, 4, 5),
        text: int = 0,
        block: int = 16,
        tile: tuple[int, int, int] | None = None,
        heads: int = 2,
        shared: bool = False,
        batch: int = 1,
        d: int = 16,
        density: float = 0.5,
        valid: list[int] | None = None,
        window: int = 0,
        bias: tuple[int, int] | None = None,
        one_block: bool = False,
        lengths: bool = False,
        strides: str = "blhd",
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        seed: int = 0,
    ) -> Case:
        generator = torch.Generator().manual_seed(seed)
        layout = TokenLayout.of(grid, text, block, tile)
        if valid is not None:
            layout = layout.with_valid_text(torch.tensor(valid))
        n = layout.blocks
        if lengths:
            # Any block may have any length, for queries and keys apart; the last is cut by the tensor's end too.
            q_len, k_len = (torch.randint(1, block + 1, (n,), generator=generator).int() for _ in range(2))
            layout = replace(layout, q_len=torch.minimum(q_len, layout.q_len), k_len=k_len)
        keep = torch.rand(1 if shared else heads, n, n, generator=generator) < density
        if one_block:
            keep = torch.zeros_like(keep)
            keep[:, torch.arange(n), torch.randperm(n, generator=generator)] = True
        elif n > 2:
            keep[:, 1] = False  # an empty row
            keep[:, 2] = keep[:, 0]  # and two that are alike
        partial = rule = None
        if window:
            position = layout.positions
            # Windows of one length take one word, of two lengths two.
            rule = Window.of(position - 2, position + 2 + position % window, position, layout.grid)
            partial = torch.rand(keep.shape, generator=generator) < 0.6
        mask = BlockMask.of(keep, layout, partial=partial, window=rule)
        shape = (batch, layout.slots, heads, d)
        q, k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
        slot = torch.arange(layout.slots)
        k_len = layout.k_len.reshape(-1, n).amax(0)
        unseen = (slot % block >= k_len[slot // block]) | ~(keep.any(0).any(0)[slot // block])
        q, k, v = poison(q, slot % block >= layout.q_len[slot // block]), poison(k, unseen), poison(v, unseen)
        key_bias = None
        if bias is not None:
            key_bias = torch.randn(*bias, layout.slots, generator=generator)
            key_bias[..., unseen] = torch.nan
            key_bias[..., ::7] = -torch.inf
        if strides == "bhld":
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        if strides == "packed":
            q, k, v = torch.cat([q, k, v], -1).split(d, -1)
        moved = (x.to(device) for x in (q, k, v))
        return Case(*moved, mask.to(device), None if key_bias is None else key_bias.to(device))

    return make


@pytest.fixture(scope="session")
def make_dense() -> Callable[..., Case]:
    """Builds a problem without a mask, of more keys than queries."""

    def make(bias: tuple[int, int] | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Case:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, n, 3, 16, generator=generator) for n in (37, 150, 150))
        key_bias = None
        if bias is not None:
            key_bias = torch.randn(*bias, 150, generator=generator)
            key_bias[..., ::3] = -torch.inf
            key_bias = key_bias.to(device)
        moved = (x.to(device, dtype) for x in (q, k, v))
        return Case(*moved, None, key_bias)

    return make


# What a kernel must survive; each is given to `make_case`.
KINDS: dict[str, dict[str, object]] = {
    "short last block": {"grid": (3, 4, 5)},
    "clipped tiles": {"grid": (3, 5, 5), "tile": (2, 2, 3)},
    "any lengths": {"lengths": True, "grid": (3, 5, 5)},
    "text": {"grid": (2, 5, 5), "text": 20, "tile": (1, 3, 5)},
    "valid text": {"grid": (2, 4, 4), "text": 20, "batch": 2, "valid": [3, 20], "shared": True},
    "shared rows": {"shared": True, "heads": 3},
    "partial": {"grid": (3, 5, 5), "tile": (2, 2, 3), "window": True},
    "partial, shared": {"window": True, "shared": True},
    "bias": {"bias": (1, 1), "batch": 2},
    "bias of each head": {"bias": (2, 2), "batch": 2, "window": True},
    "bias, shared": {"bias": (1, 2), "shared": True},
    "one block a row": {"one_block": True},
    "one token": {"grid": (1, 1, 1), "density": 1.0},
    "everything": {"density": 1.0, "grid": (3, 5, 5)},
    "nothing": {"density": 0.0},
    "b h l d": {"strides": "bhld", "batch": 2},
    "packed": {"strides": "packed"},
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> dict[str, object]:
    """Arguments for `make_case`, one kind of trouble each."""
    return KINDS[request.param]
