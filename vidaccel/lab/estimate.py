"""What a model would cost and could gain, from its configuration alone: no weights, no GPU.

Idea: a call is matrix products, attention, what stands around it (norms, RoPE, reordering) and everything else, each at
    the rate that a GPU gives it; a sparse layer divides attention, and does what stands around it in one kernel.
    What it costs to choose blocks, and to sort by them, comes on top.
Math: linear 2 n (4 w^2 + 2 w f [+ 2 w^2 where text has its own cross-attention]), attention 4 n^2 w, both a layer, of n
    tokens, w channels, f channels of the feed-forward layer. Speed-up <= 1 / (1 - a (1 - visited) - b), a the share of
    attention in the time, b of what that one kernel saves. Over a video: the mean over steps, branches and layers of
    the schedule.
Source: the scaling argument of Radial Attention (arXiv 2506.19852); `traffic.py` counts everything else, and
    `patterns.gain` knows what cut tiles and holes cost.
Memory: what serves several steps (`choices`) is held for each layer that is ever sparse and each branch: lists of
    blocks, and of FlashBlock the output and log-sum-exp of what they leave out; and, where FreeSwim's second path has a
    period, the cross-attention outputs of the layers that it guides, but for those in host memory.
Second path: where it runs, a sparse call takes as long as a dense one more, and holds twice as much.
Limits: eager diffusers; embedding and head (a few thousandths) and the first call are left out; blocks count as chosen
    anew at every call (`reselect` 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch

from ..caching import CachePolicy, estimate_bytes
from ..errors import UsageError
from ..family import Call, family_named
from ..grid import Site, TokenLayout, VideoGrid
from ..guide import check_guide, guide_of, layers_here
from ..guide import kept_bytes as guide_bytes
from ..patterns import FreeSwim, Pattern, Plan, advice, check_model, of_layer, sparse_rate, would_lose
from ..patterns.dynamic import EqualRows
from ..patterns.flashblock import Kept
from ..pipelines.zoo import RealModel, build, parameters
from ..schedule import DENSE, Schedule, Step
from .traffic import mask_bytes, selection, traffic

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """What a GPU gives, in bf16, as models see it.

    Attributes:
        attention: FLOP/s of the fastest dense attention, by channels of a head.
        sparse: rate of a sparse kernel over that, on the pairs that it visits, likewise.
        linear: FLOP/s of matrix products.
        memory: bytes/s of elementwise operations.
        rows: rows a second of layer norms over one head.
        masks: elements a second of masks over all pairs of tokens: single bytes, one of two operands transposed.
        gib: memory.
    """

    attention: Mapping[int, float]
    sparse: Mapping[int, float]
    linear: float
    memory: float
    rows: float
    masks: float
    gib: float


# Fitted to one layer of Wan2.1-14B at 720p on one H100 and one H200 (284 and 275 ms with FlashAttention 3; attention by
# subtraction, about 173 and 171); the sparse rate is radial attention's there. Head dim 64: one layer of CogVideoX-5b
# on an H200 (37 ms; attention 14, norms and RoPE 9.9; radial 4.4 for 0.25 of the pairs). Masks: HunyuanVideo 1.5 at
# 720p on an H200, whose stock processor makes two of 12.5 GB and takes 127 ms beside attention. Products on an H100:
# what attention leaves of seven models' sparse calls, within 7 %; HunyuanVideo 1.5 takes two fifths more.
_ATTENTION, _SPARSE = {128: 675e12, 64: 560e12}, {128: 0.88, 64: 0.8}
# Seconds between the small operations of a choice, which leave a GPU waiting: SVG's on CogVideoX-5b.
_LAUNCH = 12e-6
GPUS: dict[str, Gpu] = {
    "h100": Gpu(_ATTENTION, _SPARSE, 680e12, 2.9e12, 0.6e9, 0.22e12, 79.6),
    "h200": Gpu(_ATTENTION, _SPARSE, 760e12, 3.3e12, 0.6e9, 0.22e12, 140.4),
}
# Of one sparse layer per token and channel: q, k and v are read and written once, 2 bytes each.
_FUSED = 12.0


def gpu_key(name: str) -> str:
    """The key in `GPUS` of a GPU's full name, such as "NVIDIA H100 80GB HBM3".

    Raises:
        UsageError: none of them.
    """
    found = [key for key in GPUS if key.upper() in name.upper().split()]
    if not found:
        raise UsageError(f"gpu {name!r} has no rates here; known: {', '.join(GPUS)}")
    return found[0]


def flops(model: RealModel, grid: VideoGrid) -> tuple[float, float]:
    """Of all layers in one call: (attention over all pairs, matrix products)."""
    tokens, width = grid.tokens + model.joint_text, model.width
    linear = 4 * width**2 + 2 * width * model.ffn + (2 * width**2 if model.cross else 0)
    layers = sum(model.layers.values()) * model.batch
    return layers * 4.0 * tokens**2 * width, layers * 2.0 * tokens * linear


def kept_pairs(grid: VideoGrid, text: int, density: float) -> float:
    """Share of all query-key pairs that is left where video-video pairs have this density and text sees all.

    (density n^2 + 2 n t + t^2) / (n + t)^2 for n video and t text tokens.
    """
    video = grid.tokens
    return (density * video**2 + 2 * video * text + text**2) / (video + text) ** 2


@dataclass(frozen=True)
class Parts:
    """Milliseconds of one dense call, by what they are spent on.

    Attributes:
        attention: over all pairs.
        linear: matrix products.
        other: the rest.
        saved: of `other`, what sparse layers do not spend: their norms, RoPE and reordering are one kernel, and they
            make no masks over all pairs of tokens.
        rate: of sparse attention over dense, on whole tiles.
    """

    attention: float
    linear: float
    other: float
    saved: float
    rate: float

    @property
    def call(self) -> float:
        """All of it."""
        return self.attention + self.linear + self.other

    @classmethod
    def of(cls, model: RealModel, grid: VideoGrid, gpu: Gpu) -> Parts:
        """Predict them."""
        attention, linear = flops(model, grid)
        tokens = grid.tokens + model.joint_text
        elements = tokens * model.width * model.batch
        found = traffic(model.name)

        def ms(counted: Mapping[str, float], rate: float) -> float:
            return 1e3 * elements * sum(count * counted[name] for name, count in model.layers.items()) / rate

        norms, fused = ms(found.rows, gpu.rows), ms(dict.fromkeys(model.layers, _FUSED), gpu.memory)
        pairs = sum(count * found.masks[name] for name, count in model.layers.items()) * tokens**2 * model.batch
        apart = norms + 1e3 * pairs / gpu.masks
        width = min(gpu.attention, key=lambda d: abs(d - model.head_dim))
        return cls(
            attention=1e3 * attention / gpu.attention[width],
            linear=1e3 * linear / gpu.linear,
            other=ms(found.moved, gpu.memory) + apart,
            saved=ms(found.around, gpu.memory) + apart - fused,
            rate=gpu.sparse[width],
        )

    def sparse(self, visited: float, rate: float | None = None, selection: float = 0.0) -> float:
        """Milliseconds where attention visits this share of all pairs.

        Args:
            visited: the share.
            rate: on their tiles; None where they are whole. See `patterns.sparse_rate`.
            selection: milliseconds to choose them, of all layers; see `choosing_ms`.
        """
        return self.bound(visited / (rate or self.rate)) + selection

    def bound(self, visited: float) -> float:
        """The same at the dense kernel's rate, which no sparse one exceeds."""
        return self.call - self.saved - self.attention * (1 - visited)


def estimate(
    model: RealModel,
    size: tuple[int, int, int],
    *,
    attention: Pattern | None = None,
    density: float | None = None,
    schedule: Schedule | None = None,
    cache: CachePolicy | None = None,
    computed: int | None = None,
    steps: int | None = None,
    gpu: str = "h100",
    guidance: bool = True,
) -> dict[str, Any]:
    """Everything that can be known before a run, as plain data.

    Args:
        model: a released model.
        size: (height, width, frames).
        attention: a pattern.
        density: of the pattern.
        schedule: which steps and layers stay dense.
        cache: a caching policy.
        computed: steps that it computes; what a gate will decide cannot be known before.
        steps: denoising steps; default the model's own.
        gpu: a key of `GPUS`.
        guidance: at a scale above 1; without it, every step is one call.

    Raises:
        UsageError: a size that does not fit, or an unknown GPU.
        PatternError: a density that the pattern cannot give here.
        InstallError: a second path that cannot be.
    """
    if gpu not in GPUS:
        raise UsageError(f"gpu {gpu!r} is unknown here; known: {', '.join(GPUS)}")
    grid, steps = model.grid(*size), model.steps if steps is None else steps
    if steps < 1:
        raise UsageError(f"{steps} steps were asked for; give 1 or more")
    if computed is not None and not 1 <= computed <= steps:
        raise UsageError(f"{computed} computed steps were asked of {model.name}, which has {steps}; give 1 to {steps}")
    if attention is not None and attention.name == "dense":
        attention = None  # Dense layers run as they are.
    rates = GPUS[gpu]
    parts = Parts.of(model, grid, rates)
    calls = 2 if model.guidance == "two calls" and guidance else 1
    elements = (grid.tokens + model.joint_text) * model.width * model.batch
    weights = model.experts * parameters(model) * 2 / GIB
    held = traffic(model.name).held * elements / GIB
    found: dict[str, Any] = {
        "model": model.name,
        "size": list(size),
        "grid": list(grid),
        "tokens": grid.tokens,
        "text": model.joint_text,
        "layers": sum(model.layers.values()),
        "heads": model.heads,
        "head_dim": model.head_dim,
        "batch": model.batch,
        "calls_a_step": calls,
        "steps": steps,
        "gpu": gpu,
        "attention_pflop": flops(model, grid)[0] / 1e15,
        "linear_pflop": flops(model, grid)[1] / 1e15,
        "attention_share": parts.attention / parts.call,
        "dense_ms": parts.call,
        "dense_parts_ms": {"attention": parts.attention, "linear": parts.linear, "other": parts.other},
        "dense_video_s": steps * calls * parts.call / 1e3,
        "free_attention_speedup": parts.call / (parts.call - parts.attention),
        "weights_gib": weights,
        "activations_gib": held,
        "mask_gib": mask_bytes(model, grid) / GIB,
    }
    shares, depth, beside = [0.0] * steps, sum(model.layers.values()), 0.0
    if attention is not None:
        schedule = schedule or Schedule()
        check_model(attention, depth, model.heads)
        if guide := guide_of(attention, range(depth)):
            check_guide(guide[0], model.transformer, cross=model.cross, experts=model.experts > 1)
        layout, site = _first_layer(model, grid, attention.block)
        plan, first = attention.plan(layout, density, site), of_layer(attention, site.index)
        useless = advice(first, plan, layout, density, site, forced=schedule.even_if_slower)
        told = [note for note in (useless, schedule.covers(steps, depth)) if note]
        if schedule.even_if_slower or not would_lose(first, plan):
            shares = _sparse_shares(schedule, steps, depth, density)
        visited = kept_pairs(grid, model.joint_text, min(1.0, plan.visited))
        slots = plan.layout.video_blocks * plan.layout.block
        selection = choosing_ms(plan, model, rates)
        kept = kept_bytes(plan, model, calls) * max(shares) / GIB
        if guide and max(shares):
            kept += _guide_gib(*guide, model, grid)
            beside = sum(_guided(shares, guide[0].guide)) * (calls if guide[0].guide == 1 else 1) * parts.call / 1e3
            found["activations_gib"] = held = 2 * held
        found |= {
            "pattern": attention.name,
            "requested": density,
            "delivered": plan.delivered,
            "visited": plan.visited,
            "visited_pairs": visited,
            "padding": 1 - grid.tokens / slots,
            "rule": plan.rule,
            "notes": [*plan.notes, *told],
            "kept_gib": kept,
            "selection_ms": selection,
            "sparse_ms": parts.sparse(visited, sparse_rate(plan, parts.rate), selection),
            "bound": parts.call / parts.bound(visited),
            "sparse_share": sum(shares) / steps,
            "schedule_bound": parts.call / (parts.call - (parts.call - parts.bound(visited)) * sum(shares) / steps),
        }
    per_step = [parts.call - share * (parts.call - found["sparse_ms"]) if attention else parts.call for share in shares]
    if cache is not None:
        kept = estimate_bytes(cache, build(model, "meta", torch.bfloat16), grid, batch=model.batch, branches=calls)
        found |= {"cache": cache.name, "cache_gib": kept / GIB, "computed_steps": computed}
    found["peak_gib"] = weights + held + (0.0 if attention else found["mask_gib"])
    found["peak_gib"] += found.get("cache_gib", 0.0) + found.get("kept_gib", 0.0)
    found["fits"] = found["peak_gib"] < rates.gib
    if cache is None or computed is not None:
        ran = range(steps) if cache is None else spread(steps, computed or steps)
        # A forecast step runs the first layer of the branch that decides, and little else.
        skipped = (steps - len(ran)) * parts.call / depth
        found["video_s"] = (sum(per_step[step] for step in ran) * calls + skipped) / 1e3 + beside
        found["video_speedup"] = found["dense_video_s"] / found["video_s"]
    return found


def planned(model: RealModel, grid: VideoGrid, pattern: Pattern, density: float | None) -> Plan:
    """The plan of a model's first layer, text without its padding.

    Raises:
        PatternError: a density that the pattern cannot give here.
    """
    layout, site = _first_layer(model, grid, pattern.block)
    return pattern.plan(layout, density, site)


def choosing_ms(plan: Plan, model: RealModel, gpu: Gpu) -> float:
    """Milliseconds that all layers of a call spend on choosing blocks."""
    moved, calls = selection(plan, model)
    return 1e3 * sum(model.layers.values()) * (moved / gpu.memory + calls * _LAUNCH)


def kept_bytes(plan: Plan, model: RealModel, calls: int) -> float:
    """Bytes of the choices that serve several steps, were all layers sparse; see `choices`.

    Args:
        plan: of a layer.
        model: whose layers.
        calls: guidance branches.
    """
    if plan.reselect == 1:
        return 0.0
    layout = plan.layout
    rest = layout.slots * (2 * model.head_dim + 4) if plan.residual is not None else 0
    chosen = plan.select.part if isinstance(plan.select, Kept) else plan.select
    lists = 4 * layout.video_blocks * chosen.kept if isinstance(chosen, EqualRows) else 0
    return float(sum(model.layers.values()) * calls * model.batch * model.heads * (rest + lists))


def _guide_gib(guide: FreeSwim, layers: Set[int], model: RealModel, grid: VideoGrid) -> float:
    """GiB of the cross-attention outputs that a second path keeps on the GPU."""
    size = guide_bytes(1, model.batch, grid.tokens, model.width, torch.bfloat16)
    return layers_here(guide, len(layers), size) * size / GIB


def _guided(shares: Sequence[float], period: int) -> list[float]:
    """The shares of the steps in which a second path runs: the first sparse one, and every so many from there on."""
    found: dict[int, float] = {}
    for step, share in enumerate(shares):
        if share and step - max(found, default=-period) >= period:
            found[step] = share
    return list(found.values())


def _first_layer(model: RealModel, grid: VideoGrid, block: int) -> tuple[TokenLayout, Site]:
    family = family_named(model.transformer)
    call = Call(grid, model.joint_text, torch.zeros(1), None, torch.device("cpu"))
    site = Site("", 0, "self" if model.cross else "joint", family.name, family.native(model.config))
    return family.layout(call, block), site


def _sparse_shares(schedule: Schedule, steps: int, layers: int, density: float | None) -> list[float]:
    """For each step, the share of layers that run sparse."""
    return [
        sum(
            schedule.density(Step(step, steps, 0.0, step == 0), layer, layers, None, None, density) != DENSE
            for layer in range(layers)
        )
        / layers
        for step in range(steps)
    ]


def spread(steps: int, computed: int, warmup: int = 6) -> tuple[int, ...]:
    """A schedule of so many computed steps: the warm-up, the last step, and the rest evenly between."""
    warmup = min(warmup, computed - 1, steps - 1)
    rest = computed - warmup
    gap = (steps - warmup) / rest
    return (*range(warmup), *(round(warmup + gap * (n + 1)) - 1 for n in range(rest)))
