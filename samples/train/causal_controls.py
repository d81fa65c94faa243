"""Streams that should fail: as much kept, merged or reused as by a method, without what it rests on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from vidaccel.patterns.hashing import HashPlanes
from vidaccel.reuse import memory
from vidaccel.reuse.memory import LayerMemory
from vidaccel.reuse.parts import Part
from vidaccel.reuse.selection import FrameRule
from vidaccel.reuse.tempcache import MergedKeys


@contextmanager
def drawing_lots() -> Iterator[None]:
    """Within this block, all that the methods choose is drawn at random.

    Blocks of history and codes of tokens: all as likely. Keys that are merged and heads that reuse: as many as the
    method finds, others.
    """
    stock = FrameRule.scores, HashPlanes.codes, MergedKeys._correspondence, memory.late_error

    def lots(device: torch.device) -> torch.Generator:
        return generators.setdefault(device, torch.Generator(device).manual_seed(0))

    def draw(rule: FrameRule, query: Tensor, key: Tensor, frame: Tensor, empty: Tensor | None = None) -> Tensor:
        score = torch.rand(*query.shape[:2], key.shape[1], device=query.device, generator=lots(query.device))
        if empty is not None:
            score[..., : rule.before] = score[..., : rule.before].masked_fill(empty[:, None], -1)
        return score

    def any_code(planes: HashPlanes, x: Tensor) -> Tensor:
        size = (x.shape[2], x.shape[1])
        return torch.randint(planes.affinity.shape[0], size, device=x.device, generator=lots(x.device))

    def any_key(merged: MergedKeys, k: Tensor) -> tuple[Tensor, Tensor]:
        joins, group = stock[2](merged, k)
        return shuffled(joins), group

    def any_head(now: Tensor, late: Tensor) -> Tensor:
        return shuffled(stock[3](now, late))

    def shuffled(x: Tensor) -> Tensor:
        return x[:, torch.randperm(x.shape[1], device=x.device, generator=lots(x.device))]

    generators: dict[torch.device, torch.Generator] = {}
    FrameRule.scores, HashPlanes.codes = draw, any_code
    MergedKeys._correspondence, memory.late_error = any_key, any_head
    try:
        yield
    finally:
        FrameRule.scores, HashPlanes.codes, MergedKeys._correspondence, memory.late_error = stock


@contextmanager
def dropping_history() -> Iterator[None]:
    """Within this block, heads that FlashBlock would let reuse their past's part go without it, where they would.

    The measure of error, the threshold and what is stored are the method's: it saves as much, and a head is spared its
    past for the same reason. What an old part is worth, against none, is all that differs.
    """
    stock = LayerMemory._reused, memory.late_error
    errors: list[Tensor] = []

    def noted(now: Tensor, late: Tensor) -> Tensor:
        errors.append(stock[1](now, late))
        return errors[-1]

    def without(layer: LayerMemory, q: Tensor, k: Tensor, v: Tensor, start: int) -> tuple[Part, Part]:
        (out, lse), own = stock[0](layer, q, k, v, start)
        assert layer.methods.flash is not None
        reuse = errors.pop() < layer.methods.flash.threshold
        return (out, lse.masked_fill(reuse[..., None], -torch.inf)), own

    LayerMemory._reused, memory.late_error = without, noted
    try:
        yield
    finally:
        LayerMemory._reused, memory.late_error = stock
