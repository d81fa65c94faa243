"""Time what stands around attention, at the sizes of real models, after checking each result: GPUs only.

Memory bandwidth bounds all of it, so each row is held against a plain copy, timed in the same run, and, at the size of
a Wan layer, against the sparse attention that it serves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..blocks import BlockMask
from ..grid import TokenLayout, choose_tile
from . import canary, compact, elementwise, forecast
from .attention import attention
from .bench import interleaved
from .elementwise import Heads, Norm, Stream, Tables
from .portable import interpreted

REPEATS = 15
DENSITY = 0.25
_SAMPLED = 256

Make = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """One attention layer.

    Attributes:
        name: of the model.
        grid: video tokens (t, y, x).
        heads: attention heads.
        d: channels of a head.
        norm: "rms" or "layer".
        across: the norm goes over all heads together.
        text: text tokens beside the video.
        text_first: where the model has them.
        block: slots in a block.
    """

    name: str
    grid: tuple[int, int, int]
    heads: int
    d: int
    norm: str
    across: bool = False
    text: int = 0
    text_first: bool = False
    block: int = 128

    def layout(self) -> TokenLayout:
        """Its tokens in compact tiles."""
        plain = TokenLayout.of(self.grid, self.text, self.block, text_first=self.text_first)
        return plain.tiled(choose_tile(plain.grid, self.block))

    def streams(self, make: Make) -> tuple[Stream, Stream | None, Tables]:
        """Its projected tokens and RoPE tables, of tensors made by `make(*shape, dtype=)`."""
        channels = self.heads * self.d if self.across else self.d

        def stream(tokens: int) -> Stream:
            q, k, v = (make(1, tokens, self.heads, self.d, dtype=torch.bfloat16) for _ in range(3))
            weights, biases = (
                (make(channels, dtype=torch.bfloat16), make(channels, dtype=torch.bfloat16)) for _ in "wb"
            )
            if self.norm == "rms":
                return Stream(q, k, v, Norm("rms", 1e-6, weights))
            return Stream(q, k, v, Norm("layer", 1e-6, weights, biases))

        tokens = self.grid[0] * self.grid[1] * self.grid[2]
        cos, sin = (make(tokens, self.d, dtype=torch.float32) for _ in range(2))
        return stream(tokens), stream(self.text) if self.text else None, (cos, sin)


SHAPES = (
    Shape("Wan 14B 720p", (21, 45, 80), 40, 128, "rms", across=True),
    Shape("Wan 14B 720p, blocks of 64", (21, 45, 80), 40, 128, "rms", across=True, block=64),
    Shape("Wan 1.3B 480p", (21, 30, 52), 12, 128, "rms", across=True),
    Shape("HunyuanVideo 720p", (33, 45, 80), 24, 128, "rms", text=256),
    Shape("CogVideoX 5B", (13, 30, 45), 48, 64, "layer", text=226, text_first=True),
)


@dataclass(frozen=True)
class Work:
    """Something to time.

    Attributes:
        name: as printed.
        call: does it.
        moved: bytes that must cross memory.
        check: from what `call` gives to the error's share of what is allowed: above 1 is red.
        shared: its time is held against the attention's.
    """

    name: str
    call: Callable[[], Any]
    moved: int
    check: Callable[[Any], float]
    shared: bool = True


def run(
    device: str, shapes: tuple[Shape, ...] = SHAPES, repeats: int = REPEATS, attention_ms: float | None = None
) -> Iterator[dict[str, Any]]:
    """Measure shape by shape.

    Args:
        device: "cuda"; "cpu" has none of these kernels, so it gives no rows, unless Triton's interpreter stands in.
        shapes: the layers.
        repeats: how often each thing runs.
        attention_ms: time of the sparse attention at density 0.25; None measures it in this run.

    Yields:
        A row for each thing and shape: `key`, the shape's fields, `work`, and `ok` and `error` (share of what is
        allowed) of its check. Where that is green also `ms` (median), `gb_s` (bytes that must move, over time),
        `copy_gb_s` and `ratio` (to a copy in the same run), `attention_ms` and `share` of it.
    """
    if device == "cpu" and not interpreted():
        return
    for shape in shapes:
        generator = torch.Generator(device).manual_seed(0)

        def noise(*size: int, dtype: torch.dtype, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(size, generator=generator, device=device, dtype=dtype)

        layout = shape.layout().to(device)
        video, text, (angle, _) = shape.streams(noise)
        rope = (angle.cos(), angle.sin())
        heads = elementwise.to_kernel(layout, video, text, rope)
        things = [*_selection(layout, heads), *_reorder(layout, video, text, rope, heads), *_forecasts(video.q)]
        checks = {thing.name: thing.check(thing.call()) for thing in things}
        sound = [thing for thing in things if checks[thing.name] <= 1]
        mask = _best(layout, heads) if attention_ms is None else None
        sound += _scale(video.q, heads, mask)
        median = {name: sorted(taken)[len(taken) // 2] for name, taken in interleaved(sound, repeats, device).items()}
        copy = 2 * video.q.nbytes / median["copy"] / 1e6
        whole = median.get("attention", attention_ms)
        for thing in things:
            row = {"key": f"{shape.name}, {thing.name}", **asdict(shape), "work": thing.name}
            row |= {"ok": checks[thing.name] <= 1, "error": checks[thing.name]}
            if thing.name in median:
                ms = median[thing.name]
                speed = thing.moved / ms / 1e6
                row |= {"ms": ms, "gb_s": speed, "copy_gb_s": copy, "ratio": speed / copy}
                if thing.shared and whole:
                    row |= {"attention_ms": whole, "share": ms / whole}
            yield row


def _scale(x: torch.Tensor, heads: Heads, mask: BlockMask | None) -> list[Work]:
    """What the others are held against: a copy, and the attention over a mask."""
    q, k, v = heads
    copied = torch.empty_like(x)
    found = [Work("copy", lambda: copied.copy_(x), 2 * x.nbytes, lambda _: 0.0)]
    return found if mask is None else [*found, Work("attention", lambda: attention(q, k, v, mask), 0, lambda _: 0.0)]


def _scores(layout: TokenLayout, heads: Heads) -> torch.Tensor:
    lengths = layout.q_len[: layout.video_blocks]
    query, key = (compact.block_means(x, lengths, layout.block) for x in heads[:2])
    scores: torch.Tensor = query @ key.transpose(1, 2)
    return scores


def _own(layout: TokenLayout) -> torch.Tensor:
    return torch.eye(layout.video_blocks, dtype=torch.bool, device=layout.device)


def _kept(layout: TokenLayout) -> int:
    return max(1, round(DENSITY * layout.video_blocks))


def _best(layout: TokenLayout, heads: Heads) -> BlockMask:
    return compact.best_blocks(_scores(layout, heads), _own(layout), _kept(layout), layout)


def _selection(layout: TokenLayout, heads: Heads) -> list[Work]:
    """Means, lists, and all of it from q and k to the mask."""
    q, k, _ = heads
    video, kept = layout.video_blocks, _kept(layout)
    own, scores = _own(layout), _scores(layout, heads)
    likely = (scores * q.shape[-1] ** -0.5).softmax(-1)
    lengths = layout.q_len[:video]

    def means_error(means: torch.Tensor) -> float:
        """Against float64 on a few heads; fp32 sums of a block may be 1e-5 off."""
        x = torch.where(layout.filled[:, None, None], q[0], 0)[:, :2].double()
        owner = torch.arange(len(x), device=x.device) // layout.block
        sums = x.new_zeros(layout.blocks, *x.shape[1:]).index_add_(0, owner, x)[:video]
        exact = (sums / lengths[:, None, None]).transpose(0, 1)
        return float((means[:2] - exact).abs().max() / (1e-5 * exact.abs().max()))

    def choice_error(ranks: torch.Tensor, rowwise: bool) -> Callable[[BlockMask], float]:
        """Red where the number is wrong, or what was dropped ranks above what was kept."""

        def error(mask: BlockMask) -> float:
            chosen = mask.block_map()[:, :video, :video] == 2
            ranked = ranks.masked_fill(own, torch.inf)
            least = torch.where(chosen, ranked, torch.inf).amin(-1)
            most = torch.where(chosen, -torch.inf, ranked).amax(-1)
            least, most = (least, most) if rowwise else (least.min(), most.max())
            count = chosen.sum(-1) if rowwise else chosen.sum() / chosen[..., 0].numel()
            wrong = bool((least < most).any()) or bool((count != kept).any())
            return 2.0 if wrong else 0.0

        return error

    lists = 4 * kept * video * len(scores)
    best, likeliest = choice_error(scores, True), choice_error(likely, False)
    works = [
        Work("block means of q", lambda: compact.block_means(q, lengths, layout.block), q.nbytes, means_error),
        Work("best blocks", lambda: compact.best_blocks(scores, own, kept, layout), scores.nbytes + lists, best),
        Work("mask from q and k", lambda: _best(layout, heads), q.nbytes + k.nbytes, best),
    ]
    if likely.numel() <= compact.MOST_RANKED:
        rank = lambda: compact.likeliest_blocks(likely, own, kept, layout)  # noqa: E731
        works.append(Work("likeliest blocks", rank, scores.nbytes + lists, likeliest))
    return works


def _reorder(layout: TokenLayout, video: Stream, text: Stream | None, rope: Tables, heads: Heads) -> list[Work]:
    """Norm, RoPE and reorder of q, k and v, and the way back of the output."""
    start = layout.text if layout.text_first else 0
    token = torch.randint(layout.grid.tokens, (_SAMPLED,), generator=torch.Generator().manual_seed(0))
    token = token.to(layout.device)
    slot = layout.slot_of[start + token]
    some = Stream(video.q[:, token], video.k[:, token], video.v[:, token], video.norm)
    tables = (rope[0][token], rope[1][token])

    def arranged_error(found: Heads) -> float:
        shares = []
        for which, given in enumerate(found):
            exact, near = (elementwise.by_formula(some, which, tables, kind) for kind in (torch.float64, given.dtype))
            budget = canary.error_budget(exact, near, given.dtype, 0.0)
            shares.append(canary.largest_error(given[:, slot], exact) / budget)
        return float(torch.tensor(shares).max())

    def moved_error(found: torch.Tensor) -> float:
        return 0.0 if torch.equal(found, layout.to_model(heads[0])) else 2.0

    tensors = [x for stream in (video, text) if stream is not None for x in stream[:3]]
    moved = sum(x.nbytes for x in (*tensors, *heads, *rope))
    return [
        Work("norm, RoPE, to kernel order", lambda: elementwise.to_kernel(layout, video, text, rope), moved,
             arranged_error),
        Work("to model order", lambda: torch.ops.vidaccel.to_model(heads[0], layout.slot_of), 2 * tensors[0].nbytes,
             moved_error),
    ]  # fmt: skip


def _forecasts(x: torch.Tensor) -> list[Work]:
    """A forecast of order 1, and the error of one of order 3."""
    terms = [x.flatten(2), *(x.flatten(2).roll(n, 1) for n in (1, 2, 3))]
    weights = [1.0, -0.5, 0.25, 2.0]
    actual = terms[0].roll(5, 1)

    def sum_error(found: torch.Tensor) -> float:
        exact = sum(w * t[:, :_SAMPLED].double() for w, t in zip(weights, terms[:2], strict=False))
        assert isinstance(exact, torch.Tensor)
        allowed = 2 * (exact.to(x.dtype) - exact).abs().max()
        return float((found[:, :_SAMPLED] - exact).abs().max() / allowed)

    def sums_error(found: torch.Tensor) -> float:
        exact = torch.zeros_like(found)
        for part in range(0, x.shape[1], 4096):
            own = slice(part, part + 4096)
            total = sum(w * t[:, own].double() for w, t in zip(weights, terms, strict=True))
            exact[0] += (total - actual[:, own]).abs().flatten(1).sum(1)
            exact[1] += actual[:, own].double().abs().flatten(1).sum(1)
        return float(((found - exact) / exact).abs().max() / 1e-6)

    return [
        Work("forecast of order 1", lambda: forecast.weighted_sum(terms[:2], weights[:2], x.dtype), 3 * x.nbytes,
             sum_error, shared=False),
        Work("error of order 3", lambda: forecast.error_sums(terms, weights, actual, None), 5 * x.nbytes,
             sums_error, shared=False),
    ]  # fmt: skip
