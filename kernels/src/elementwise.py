"""What stands between a layer's projections and its attention: QK-norm, RoPE, and the way into kernel order and back.

Idea: each is a few flops an element, so that what counts is how often q, k and v cross memory. One program a slot reads
    its token's q, k and v once, and writes them where the kernels want them.
Math, for a token x and its rows cos, sin of RoPE's tables:
    rms    x w / sqrt(mean x^2 + eps)                    over the channels of a head, or over those of all heads
    layer  (x - mean) w / sqrt(var + eps) + b            over the channels of a head
    rope   x cos + (-x_1, x_0, -x_3, x_2, ...) sin       video tokens only
Cost: q, k and v are read and written once; all arithmetic is fp32, rounded once at the end, so that it is nearer to the
    exact result than the model's own chain of 16-bit steps.
Source: RMSNorm (arXiv 1910.07467), RoFormer (arXiv 2104.09864).
Limits: fp16, bf16, fp32; head dims that are powers of two from 16 to 256; inference. `can_run` tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch.nn import functional

from ..grid import TokenLayout
from . import fused

# Elements of a token handled at a time: 8 a thread of 4 warps.
_TILE = 1024

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Tables = tuple[torch.Tensor, torch.Tensor]


class Norm(NamedTuple):
    """The norms of q and k of one stream.

    Attributes:
        kind: "rms" or "layer".
        eps: added to the mean square.
        weights: of q and of k, each (d,) for every head alone, or, of "rms", (h * d,) for all heads together.
        biases: of q and of k, (d,) each, of "layer"; None of "rms".
    """

    kind: Literal["rms", "layer"]
    eps: float
    weights: tuple[torch.Tensor, torch.Tensor]
    biases: tuple[torch.Tensor, torch.Tensor] | None = None


class OneNorm(NamedTuple):
    """The norm of q or of k alone, in the same words; of kind "none" it has no weight."""

    kind: Literal["rms", "layer", "none"]
    eps: float
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    @classmethod
    def of(cls, norm: Norm | None, which: int) -> OneNorm:
        """That of q (0) or k (1); v (2) has none."""
        if norm is None or which == 2:
            return NO_NORM
        return cls(norm.kind, norm.eps, norm.weights[which], None if norm.biases is None else norm.biases[which])


NO_NORM = OneNorm("none", 0.0, None, None)


class Stream(NamedTuple):
    """Projected tokens of one kind, video or text.

    Attributes:
        q, k, v: (b, l, h, d), of one dtype.
        norm: of q and k; None where there is none, or where it is done.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    norm: Norm | None = None


def can_run(x: torch.Tensor) -> bool:
    """The kernels serve tensors (b, l, h, d) like this one; elsewhere the model's own modules do the same."""
    d = x.shape[-1]
    return fused.can_run(x) and 16 <= d <= 256 and d & (d - 1) == 0


def to_kernel(
    layout: TokenLayout,
    video: Stream,
    text: Stream | None = None,
    rope: Tables | None = None,
) -> Heads:
    """Normalise, rotate and reorder.

    Args:
        layout: the order.
        video: the grid's tokens.
        text: the layout's text tokens, where it has any. Its norm is of the video's kind, with weights of its own.
        rope: cos and sin, l * d numbers each, for the video's tokens: every angle twice, once a channel.

    Returns:
        q, k, v: (b, slots, h, d) in kernel order; holes hold zeros.
    """
    streams = [video] if text is None else [video, text]
    norm = video.norm
    q, k, v = torch.ops.vidaccel.to_kernel(
        [x for stream in streams for x in stream[:3]],
        [x for stream in streams if stream.norm for x in stream.norm.weights],
        [x for stream in streams if stream.norm for x in stream.norm.biases or ()],
        list(rope or ()),
        layout.order,
        layout.q_len,
        layout.block,
        # Without text, nothing here tells layouts of one size apart: compiled models need no graph for each.
        layout.order.shape[0] if text is None else layout.video_blocks * layout.block,
        layout.text if layout.text_first else 0,
        0 if layout.text_first else layout.grid.tokens,
        norm.kind if norm else "none",
        norm.eps if norm else 0.0,
    )
    return q, k, v


def to_ranks(
    streams: Sequence[torch.Tensor], norms: Sequence[OneNorm], rope: Tables | None, ranks: int, each: int
) -> torch.Tensor:
    """Normalise, rotate, and put side by side what goes to one rank.

    Args:
        streams: q, k or v (b, l, h, d) of the video, and of text behind it.
        norms: of each, of one kind.
        rope: as in `to_kernel`.
        ranks: how many.
        each: heads of each.

    Returns:
        (ranks, b, tokens, each, d); what stands in heads past the last is undefined.
    """
    sent: torch.Tensor = torch.ops.vidaccel.to_ranks(
        list(streams),
        [norm.weight for norm in norms if norm.weight is not None],
        [norm.bias for norm in norms if norm.bias is not None],
        list(rope or ()),
        ranks,
        each,
        norms[0].kind,
        norms[0].eps,
    )
    return sent


def by_formula(stream: Stream, which: int, rope: Tables | None, dtype: torch.dtype) -> torch.Tensor:
    """The definition: q (0), k (1) or v (2) of a stream in model order, (b, l, h, d), each step rounded to `dtype`.

    Models compute so in their own type; the kernels are held against float64.
    """
    x = (stream.q, stream.k, stream.v)[which].to(dtype)
    if which == 2:
        return x
    if stream.norm is not None:
        kind, eps, weights, biases = stream.norm
        weight = weights[which].to(dtype)
        flat = x if weight.numel() == x.shape[-1] else x.flatten(2)
        if kind == "rms":
            x = functional.rms_norm(flat, weight.shape, weight, eps).view_as(x)
        else:
            bias = None if biases is None else biases[which].to(dtype)
            x = functional.layer_norm(flat, weight.shape, weight, bias, eps)
    if rope is not None:
        # Models keep the tables in fp32, and compute this step so.
        cos, sin = (table.view(-1, 1, x.shape[-1]).to(torch.promote_types(dtype, table.dtype)) for table in rope)
        x = (x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin).to(dtype)
    return x


def to_model(layout: TokenLayout, x: torch.Tensor) -> torch.Tensor:
    """(b, slots, h, d) in kernel order -> (b, tokens, h, d) in model order, contiguous where anything moved."""
    return x if layout.is_identity else take(x, layout.slot_of)


def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Tokens of x (b, l, h, d) by their numbers (n,): (b, n, h, d), contiguous."""
    if not can_run(x):
        return x.index_select(1, index)
    moved: torch.Tensor = torch.ops.vidaccel.to_model(x, index)
    return moved


@torch.library.custom_op(
    "vidaccel::to_kernel",
    mutates_args=(),
    schema="(Tensor[] streams, Tensor[] weights, Tensor[] biases, Tensor[] rope, Tensor order, Tensor q_len, "
    "int block, int video_slots, int video_start, int text_start, str norm, float eps) -> (Tensor, Tensor, Tensor)",
)
def _to_kernel(
    streams: list[torch.Tensor],
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    rope: list[torch.Tensor],
    order: torch.Tensor,
    q_len: torch.Tensor,
    block: int,
    video_slots: int,
    video_start: int,
    text_start: int,
    norm: str,
    eps: float,
) -> Heads:
    b, _, h, d = streams[0].shape
    q, k, v = _in_slots(streams, order)
    video, text = _rows(streams[:3]), _rows(streams[3:] or streams[:3])
    # Where something is missing, any tensor stands in: nothing reads it.
    cos, sin = (x.reshape(-1, d).contiguous() for x in rope) if rope else (q, q)
    weights, biases = ((x * 2 if len(x) == 2 else x) or [q] * 4 for x in (weights, biases))
    with torch.cuda.device_of(q):
        _kernels().to_kernel[order.shape[0], b](
            *video,
            *text,
            q,
            k,
            v,
            cos,
            sin,
            *(weights[n] for n in (0, 1)),
            *(biases[n] for n in (0, 1)),
            *(weights[n] for n in (2, 3)),
            *(biases[n] for n in (2, 3)),
            order,
            q_len,
            eps,
            *video[0].stride()[:2],
            *text[0].stride()[:2],
            block,
            video_slots,
            video_start,
            text_start,
            NORM=norm,
            ACROSS=norm == "rms" and weights[0].numel() > d,
            ROPE=bool(rope),
            **_tile(h, d),
        )
    return q, k, v


@_to_kernel.register_fake
def _(
    streams: list[torch.Tensor],
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    rope: list[torch.Tensor],
    order: torch.Tensor,
    *rest: object,
) -> Heads:
    return _in_slots(streams, order)


def _in_slots(streams: list[torch.Tensor], order: torch.Tensor) -> Heads:
    b, _, h, d = streams[0].shape
    # Samples side by side in each slot, so that they can be taken for heads as they are.
    q, k, v = (streams[0].new_empty((order.shape[0], b, h, d)).transpose(0, 1) for _ in range(3))
    return q, k, v


@torch.library.custom_op(
    "vidaccel::to_ranks",
    mutates_args=(),
    schema="(Tensor[] streams, Tensor[] weights, Tensor[] biases, Tensor[] rope, int ranks, int each, str norm, "
    "float eps) -> Tensor",
)
def _to_ranks(
    streams: list[torch.Tensor],
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    rope: list[torch.Tensor],
    ranks: int,
    each: int,
    norm: str,
    eps: float,
) -> torch.Tensor:
    b, _, h, d = streams[0].shape
    sent, before = _for_ranks(streams, ranks, each), 0
    cos, sin = (x.reshape(-1, d).contiguous() for x in rope) if rope else (sent, sent)
    for n, x in enumerate(streams):
        x = x if x.stride()[2:] == (d, 1) else x.contiguous()
        with torch.cuda.device_of(x):
            _kernels().to_ranks[x.shape[1], b](
                x,
                sent,
                weights[n] if weights else sent,
                biases[n] if biases else sent,
                cos,
                sin,
                eps,
                *x.stride()[:2],
                sent.shape[2],
                before,
                EACH=each,
                NORM=norm,
                ACROSS=norm == "rms" and weights[0].numel() > d,
                # Text has no place in the video.
                ROPE=bool(rope) and n == 0,
                **_tile(h, d),
            )
        before += x.shape[1]
    return sent


@_to_ranks.register_fake
def _(
    streams: list[torch.Tensor],
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    rope: list[torch.Tensor],
    ranks: int,
    each: int,
    *rest: object,
) -> torch.Tensor:
    return _for_ranks(streams, ranks, each)


def _for_ranks(streams: list[torch.Tensor], ranks: int, each: int) -> torch.Tensor:
    b, _, _, d = streams[0].shape
    return streams[0].new_empty((ranks, b, sum(x.shape[1] for x in streams), each, d))


@torch.library.custom_op("vidaccel::to_model", mutates_args=())
def _to_model(x: torch.Tensor, slot_of: torch.Tensor) -> torch.Tensor:
    b, _, h, d = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = x.new_empty((b, slot_of.shape[0], h, d))
    with torch.cuda.device_of(x):
        _kernels().to_model[slot_of.shape[0], b](x, out, slot_of, *x.stride()[:3], **_tile(h, d))
    return out


@_to_model.register_fake
def _(x: torch.Tensor, slot_of: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], slot_of.shape[0], *x.shape[2:]))


def _rows(stream: list[torch.Tensor]) -> list[torch.Tensor]:
    """q, k and v of equal strides, each token's channels together: as they are, where a layer made them."""
    _, _, _, d = stream[0].shape
    same = all(x.stride() == stream[0].stride() for x in stream)
    return stream if same and stream[0].stride()[2:] == (d, 1) else [x.contiguous() for x in stream]


def _tile(h: int, d: int) -> dict[str, int]:
    """How many heads are handled at a time: as many as fit, unless that leaves much of the last tile empty."""
    groups = [1 << n for n in range(_TILE.bit_length()) if d << n <= _TILE]
    group = max(n for n in groups if -(-h // n) * n <= 1.125 * h)
    return {"H": h, "D": d, "GROUP": group, "num_warps": max(1, group * d // 256)}


@lru_cache(maxsize=1)
def _kernels() -> Any:
    from . import elementwise_kernel

    return elementwise_kernel
