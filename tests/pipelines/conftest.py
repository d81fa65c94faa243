"""The oracle of every pipeline test: the stock pipeline, whose own SDPA is given the block mask as a dense one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from vidaccel.trace import CallRecord


class MaskedProcessor:
    """A layer's stock processor with a mask; None leaves the call alone."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock
        self.mask: torch.Tensor | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        rope: Any = None,
    ) -> Any:
        return self.stock(attn, hidden_states, encoder_hidden_states, self.mask, rope)


@contextmanager
def masked(
    transformers: list[Any], calls: list[CallRecord], mask: Callable[[CallRecord, str], torch.Tensor]
) -> Iterator[None]:
    """Replays a recorded run on stock processors: what ran sparse there gets `mask(call, site)` here."""
    remaining = iter(calls)
    undo: list[Callable[[], None]] = []

    def before(processors: dict[str, MaskedProcessor]) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            call = next(remaining)
            sparse = {name for name, _ in call.scheduled}
            for name, processor in processors.items():
                processor.mask = mask(call, name) if name in sparse else None

        return hook

    for transformer in transformers:
        stock = dict(transformer.attn_processors)
        ours = {name: MaskedProcessor(p) for name, p in stock.items() if ".attn1." in name}
        transformer.set_attn_processor(stock | ours)
        handle = transformer.register_forward_pre_hook(before(ours))
        undo += [handle.remove, lambda t=transformer, s=stock: t.set_attn_processor(dict(s))]
    try:
        yield
    finally:
        for step in undo:
            step()
    assert next(remaining, None) is None, "the stock run made fewer transformer calls than the accelerated one"


@pytest.fixture
def assert_equals_masked_stock(render: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Runs a pipeline accelerated and as the oracle; the latents must agree, and all scheduled layers run."""

    def check(pipe: Any, accelerated: Any, size: str = "even", tolerance: float = 2e-5, **kwargs: Any) -> torch.Tensor:
        before = len(accelerated.trace.calls)
        latents = render(pipe, size, **kwargs)
        calls = accelerated.trace.calls[before:]
        plans = {
            (str(plan.layout.grid), round(plan.delivered, 9)): plan.mask.to_dense()
            for installation in accelerated._installations
            for plan in installation.plans.values()
        }
        assert calls
        for call in calls:
            assert len(call.kernels) == len(call.scheduled), "a scheduled layer did not run sparse"
        assert any(call.scheduled for call in calls), "nothing ran sparse at all"
        accelerated.remove()

        def mask(call: CallRecord, site: str) -> torch.Tensor:
            return plans[str(call.grid), round(dict(call.scheduled)[site], 9)]

        transformers = [t for t in (pipe.transformer, getattr(pipe, "transformer_2", None)) if t is not None]
        with masked(transformers, calls, mask):
            expected = render(pipe, size, **kwargs)
        torch.testing.assert_close(latents, expected, atol=tolerance, rtol=1e-4)
        return latents

    return check
