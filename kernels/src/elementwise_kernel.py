"""The Triton programs of `elementwise.py`, in a file of their own because importing them needs Triton."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _arrange(
    X, OUT, WEIGHT, BIAS, cos, sin, eps, far,
    H: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, EACH: tl.constexpr,
    NORM: tl.constexpr, ACROSS: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """One token, (h, d): normalised, rotated, written, `GROUP` heads at a time; every `EACH` heads, `far` on."""
    head, channel = tl.arange(0, GROUP)[:, None], tl.arange(0, D)[None, :]
    # What all heads share is loaded once a head, straight into the threads that want it.
    same = channel + 0 * head
    share = 1.0
    if ACROSS:
        # The second pass over the token finds it in the first-level cache.
        total = tl.zeros([GROUP, D], tl.float32)
        for first in tl.static_range(0, H, GROUP):
            x = tl.load(X + (first + head) * D + channel, mask=first + head < H, other=0.0).to(tl.float32)
            total += x * x
        share = tl.rsqrt(tl.sum(tl.sum(total, 1), 0) / (H * D) + eps)
    for first in tl.static_range(0, H, GROUP):
        within = first + head < H
        at = (first + head) * D + channel
        x = tl.load(X + at, mask=within, other=0.0).to(tl.float32)
        if ACROSS:
            weight = tl.load(WEIGHT + at, mask=within, other=0.0, eviction_policy="evict_last")
            x = x * share * weight.to(tl.float32)
        elif NORM == "rms":
            weight = tl.load(WEIGHT + same, eviction_policy="evict_last").to(tl.float32)
            x = x * tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None] * weight
        elif NORM == "layer":
            weight = tl.load(WEIGHT + same, eviction_policy="evict_last").to(tl.float32)
            bias = tl.load(BIAS + same, eviction_policy="evict_last").to(tl.float32)
            x = x - (tl.sum(x, 1) / D)[:, None]
            x = x * tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None] * weight + bias
        if ROPE:
            even, odd = tl.split(tl.reshape(x, [GROUP, D // 2, 2]))
            x = x * cos + tl.reshape(tl.join(-odd, even), [GROUP, D]) * sin
        to = at if EACH == H else (first + head) // EACH * far + (first + head) % EACH * D + channel
        tl.store(OUT + to, x.to(OUT.dtype.element_ty), mask=within)


@triton.jit
def _angles(COS, SIN, token, D: tl.constexpr, GROUP: tl.constexpr, ROPE: tl.constexpr):
    """RoPE of one token's place: cos and sin, (GROUP, d) fp32, the same for every head."""
    cos = 1.0
    sin = 0.0
    if ROPE:
        same = tl.arange(0, D)[None, :] + 0 * tl.arange(0, GROUP)[:, None]
        cos = tl.load(COS + token * D + same).to(tl.float32)
        sin = tl.load(SIN + token * D + same).to(tl.float32)
    return cos, sin


@triton.jit
def _copy(X, OUT, H: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr):
    """One token, (h, d)."""
    head, channel = tl.arange(0, GROUP)[:, None], tl.arange(0, D)[None, :]
    for first in tl.static_range(0, H, GROUP):
        at = (first + head) * D + channel
        tl.store(OUT + at, tl.load(X + at, mask=first + head < H), mask=first + head < H)


@triton.jit
def _clear(OUT, H: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr):
    """A hole, (h, d)."""
    head, channel = tl.arange(0, GROUP)[:, None], tl.arange(0, D)[None, :]
    for first in tl.static_range(0, H, GROUP):
        nothing = tl.zeros([GROUP, D], OUT.dtype.element_ty)
        tl.store(OUT + (first + head) * D + channel, nothing, mask=first + head < H)


@triton.jit
def to_kernel(
    Q, K, V, TEXT_Q, TEXT_K, TEXT_V, OUT_Q, OUT_K, OUT_V, COS, SIN,
    WEIGHT_Q, WEIGHT_K, BIAS_Q, BIAS_K, TEXT_WEIGHT_Q, TEXT_WEIGHT_K, TEXT_BIAS_Q, TEXT_BIAS_K,
    ORDER, LENGTH, eps, x_b, x_l, text_b, text_l, block, video_slots, video_start, text_start,
    H: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr,
    NORM: tl.constexpr, ACROSS: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """q, k and v of one slot. Program (slot, sample)."""
    slot, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    out = (slot.to(tl.int64) * tl.num_programs(1) + b) * (H * D)
    # Both are on their way before either is looked at; holes have a token too, the first.
    token, length = tl.load(ORDER + slot), tl.load(LENGTH + slot // block)
    if slot % block >= length:
        _clear(OUT_Q + out, H, D, GROUP)
        _clear(OUT_K + out, H, D, GROUP)
        _clear(OUT_V + out, H, D, GROUP)
    elif slot < video_slots:
        token -= video_start
        at = b * x_b + token * x_l
        cos, sin = _angles(COS, SIN, token, D, GROUP, ROPE)
        _arrange(Q + at, OUT_Q + out, WEIGHT_Q, BIAS_Q, cos, sin, eps, 0, H, D, GROUP, H, NORM, ACROSS, ROPE)
        _arrange(K + at, OUT_K + out, WEIGHT_K, BIAS_K, cos, sin, eps, 0, H, D, GROUP, H, NORM, ACROSS, ROPE)
        _copy(V + at, OUT_V + out, H, D, GROUP)
    else:
        at = b * text_b + (token - text_start) * text_l
        _arrange(
            TEXT_Q + at, OUT_Q + out, TEXT_WEIGHT_Q, TEXT_BIAS_Q, 1.0, 0.0, eps, 0,
            H, D, GROUP, H, NORM, ACROSS, False,
        )  # fmt: skip
        _arrange(
            TEXT_K + at, OUT_K + out, TEXT_WEIGHT_K, TEXT_BIAS_K, 1.0, 0.0, eps, 0,
            H, D, GROUP, H, NORM, ACROSS, False,
        )  # fmt: skip
        _copy(TEXT_V + at, OUT_V + out, H, D, GROUP)


@triton.jit
def to_ranks(
    X, OUT, WEIGHT, BIAS, COS, SIN, eps, x_b, x_l, tokens, before,
    H: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, EACH: tl.constexpr,
    NORM: tl.constexpr, ACROSS: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """One token of q, k or v: each rank's heads to where it will be sent from. Program (token, sample)."""
    token, b = tl.program_id(0).to(tl.int64), tl.program_id(1)
    out = OUT + (b * tokens + before + token) * (EACH * D)
    far = tl.num_programs(1).to(tl.int64) * tokens * (EACH * D)
    cos, sin = _angles(COS, SIN, token, D, GROUP, ROPE)
    at = b * x_b + token * x_l
    _arrange(X + at, out, WEIGHT, BIAS, cos, sin, eps, far, H, D, GROUP, EACH, NORM, ACROSS, ROPE)


@triton.jit
def to_model(X, OUT, SLOT_OF, x_b, x_l, x_h, H: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr):
    """One token taken back from its slot. Program (token, sample)."""
    token, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    source = X + b * x_b + tl.load(SLOT_OF + token) * x_l
    target = OUT + (b * tl.num_programs(0) + token) * (H * D)
    head, channel = tl.arange(0, GROUP)[:, None], tl.arange(0, D)[None, :]
    for first in tl.static_range(0, H, GROUP):
        within = first + head < H
        x = tl.load(source + (first + head) * x_h + channel, mask=within)
        tl.store(target + (first + head) * D + channel, x, mask=within)
