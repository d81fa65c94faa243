"""Sign hashing on a GPU: codes of tokens in one pass, their order without sorting, and tokens moved into that order.

Idea: codes are few enough to be counted. A token's place is how many have a smaller code, how many of its own code
    stand in earlier groups of tokens, and how many of them before it in its group.
Cost: `sign_codes` reads x once and writes 8 bytes a token and head; `in_order` reads codes twice, and writes a count
    for each code and group of 128 tokens, and 8 bytes a token and head.
Source: counting sort, as in Knuth, The Art of Computer Programming 3, section 5.2, algorithm D.
    `moved` reads and writes each token once.
Limits: up to 8 planes. `select.sign_codes`, `select.in_order`, `select.taken` and `select.put_back` define these, and
    serve the rest.
Each function is an op with a fake, so that compiled models see one opaque call.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from . import fused

_GROUP = 128


@torch.library.custom_op("vidaccel::sign_codes", mutates_args=())
def sign_codes(x: torch.Tensor, mean: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
    """See `select.sign_codes`; strides of x are any, `planes` is contiguous."""
    _, tokens, h, d = x.shape
    codes = x.new_empty((h, tokens), dtype=torch.int64)
    x = x if x.stride(-1) == 1 else x.contiguous()
    pad = fused.power_of_two(d)
    with torch.cuda.device_of(x):
        _kernels().sign_codes[-(-tokens // 64), h](
            x,
            mean.contiguous(),
            planes,
            codes,
            x.stride(1),
            x.stride(2),
            tokens,
            BITS=planes.shape[1],
            D=d,
            TOKENS=64,
            PAD=pad,
            num_warps=4 if pad <= 128 else 8,
        )
    return codes


@sign_codes.register_fake
def _(x: torch.Tensor, mean: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[2], x.shape[1]), dtype=torch.int64)


@torch.library.custom_op("vidaccel::in_order", mutates_args=())
def in_order(codes: torch.Tensor, kinds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `select.in_order`."""
    h, tokens = codes.shape
    groups = -(-tokens // _GROUP)
    codes = codes.contiguous()
    seen = codes.new_empty((h, kinds * groups), dtype=torch.int32)
    order = torch.empty_like(codes)
    with torch.cuda.device_of(codes):
        _kernels().count[groups, h](codes, seen, tokens, kinds, PAD=fused.power_of_two(kinds), GROUP=_GROUP)
        before = seen.cumsum(1, dtype=torch.int32) - seen
        _kernels().place[groups, h](codes, before, order, tokens, kinds, GROUP=_GROUP)
    return order, before.view(h, kinds, groups)[..., 0].contiguous()


@in_order.register_fake
def _(codes: torch.Tensor, kinds: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(codes), codes.new_empty((codes.shape[0], kinds), dtype=torch.int32)


@torch.library.custom_op("vidaccel::moved", mutates_args=())
def moved(x: torch.Tensor, order: torch.Tensor, back: bool) -> torch.Tensor:
    """See `select.taken`, or, `back`, `select.put_back`."""
    _, n, h = order.shape
    d = x.shape[3]
    out = x.new_empty(1, n, h, d)
    x = x if x.stride(-1) == 1 else x.contiguous()
    with torch.cuda.device_of(x):
        _kernels().moved[-(-n // 64), h](
            x,
            order,
            out,
            x.stride(1),
            x.stride(2),
            order.stride(1),
            order.stride(2),
            n,
            BACK=back,
            D=d,
            TOKENS=64,
            PAD=fused.power_of_two(d),
        )
    return out


@moved.register_fake
def _(x: torch.Tensor, order: torch.Tensor, back: bool) -> torch.Tensor:
    return x.new_empty(*order.shape, x.shape[3])


@lru_cache(maxsize=1)
def _kernels() -> Any:
    from . import hashing_kernel

    return hashing_kernel
