"""The link between GPUs, measured alone: what one layer's exchange costs, and what follows for more GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..exchange import Exchange
from ..grid import VideoGrid
from ..pipelines.zoo import RealModel
from ..ranks import Ranks, all_to_all, wait

# Median milliseconds of each call, all ranks begin each together.
Timer = Callable[[Mapping[str, Callable[[], object]]], dict[str, float]]


@dataclass(frozen=True)
class Link:
    """What the exchange of one layer costs, measured.

    Attributes:
        ranks: how many.
        sent: bytes that leave a rank.
        all_to_all: ms of two collectives of as many bytes, q, k and v in one and the output in the other.
        latency: ms of one collective of a few bytes.
        exchange: ms of what a layer does, with what puts tokens in order, where nothing else runs beside it.
    """

    ranks: int
    sent: int
    all_to_all: float
    latency: float
    exchange: float

    def of(self, ranks: int) -> float:
        """Milliseconds of a layer's exchange on another number of ranks, by `predict`'s model."""
        # Of its tokens a rank sends all but its own share of the heads; both shrink with its share of the tokens.
        sent = self.sent * (ranks - 1) / ranks**2 / ((self.ranks - 1) / self.ranks**2)
        per_byte = max(0.0, self.all_to_all - 2 * self.latency) / self.sent
        order = max(0.0, self.exchange - self.all_to_all) * self.ranks / ranks
        return 2 * self.latency + per_byte * sent + order


def predict(one_ms: float, all_ms: float, layers: int, link: Link, ranks: int) -> dict[str, float]:
    """A call on another number of GPUs of the same kind, from one that was measured. A model, no measurement.

    call(n) = one / n + shown x layers x exchange(n) + rest: compute divides by the ranks; exchange(n) is two latencies,
    the bytes that leave a rank at the measured rate, and reordering that divides by the ranks; rest is what the
    measured call took beyond the first two, and does not shrink. Where it took less, compute hid a part of the
    exchange, and `shown` is the other part; else it is 1. It assumes that the link of a rank is as fast to n - 1 others
    as it was to those measured, as behind a switch inside one host.

    Args:
        one_ms: a call on one GPU.
        all_ms: a call on `link.ranks` GPUs.
        layers: of the model.
        link: as measured.
        ranks: how many to predict for.
    """
    more, exchange = all_ms - one_ms / link.ranks, layers * link.of(link.ranks)
    rest, shown = max(0.0, more - exchange), min(1.0, max(0.0, more) / exchange)
    call = one_ms / ranks + shown * layers * link.of(ranks) + rest
    return {"call_ms": call, "speedup": one_ms / call, "efficiency": one_ms / call / ranks}


def measure_link(
    transformer: Any, model: RealModel, grid: VideoGrid, dtype: torch.dtype, device: torch.device, times: Timer
) -> Link:
    """The exchange of one layer, alone: its collectives, and with what puts tokens in order.

    Args:
        transformer: one that ranks share.
        model: which.
        grid: video tokens.
        dtype: of q, k and v.
        device: of this rank.
        times: how calls are timed.
    """
    ranks = Ranks.of(transformer)
    assert ranks is not None
    first = model.transformer.startswith("CogVideoX")
    exchange = Exchange.of(ranks, grid.tokens, model.joint_text, text_first=first, device=device)
    own, each, n = exchange.sizes[ranks.rank], ranks.heads(model.heads).each, ranks.count
    query, key, value = torch.randn(3, model.batch, own, model.heads, model.head_dim, device=device).to(dtype)
    part = ranks.heads(model.heads)
    packed = [exchange.packed(x) for x in (query, key, value)]
    row = model.batch * each * model.head_dim
    sizes = [size * row for size in exchange.sizes]
    before, after, few = (query.new_zeros(many) for many in (3 * own * row * n, sum(sizes), n))

    def collectives() -> None:
        wait(all_to_all(before, [3 * size for size in sizes], [3 * own * row] * n, ranks))
        wait(all_to_all(after, [own * row] * n, sizes, ranks))

    def whole() -> None:
        # Norm and RoPE write what leaves, as on one GPU they write what attends: that costs nothing more.
        arrived = exchange.receive([exchange.send(x) for x in packed], part)
        exchange.leave(arrived[0], model.heads)

    calls: dict[str, Callable[[], object]] = {
        "all_to_all": collectives,
        "exchange": whole,
        "latency": lambda: wait(all_to_all(few, [1] * n, [1] * n, ranks)),
    }
    for call in calls.values():
        call()
    taken = times(calls)
    sent = 4 * own * row * (n - 1) * dtype.itemsize
    return Link(n, sent, taken["all_to_all"], taken["latency"], taken["exchange"])
