"""The oracle of every pipeline test: the stock pipeline, whose own SDPA is given the same pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from vidaccel.family import attn_processors_of, place_processors
from vidaccel.frontdoor import FrontDoor
from vidaccel.install import Installation
from vidaccel.kernels import reference
from vidaccel.kernels.problem import Rows
from vidaccel.patterns import Plan


class PlannedAttention(TorchFunctionMode):
    """While it is on, torch's own attention keeps only the pairs that a plan keeps."""

    def __init__(self, plan: Plan, valid: tuple[int, ...] | None) -> None:
        super().__init__()
        self.plan = plan
        self.valid = valid
        self.samples = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | (kwargs or {})
        query, key, value, own = (given.get(name) for name in ("query", "key", "value", "attn_mask"))
        first, self.samples = self.samples, self.samples + len(query)
        if self.plan.residual is not None:
            assert self.plan.residual.threshold == 0, "what is reused has no mask; ask that all of it is computed"
            return function(query, key, value, attn_mask=own)
        if self.plan.mask is not None:
            keep = fitted(dense_mask(self.plan), query.shape[2])
            return function(query, key, value, attn_mask=keep if own is None else keep & own)
        samples = zip(*(x.split(1) for x in (query, key, value)), strict=True)
        return torch.cat([self.chosen(first + n, *sample) for n, sample in enumerate(samples)])

    def chosen(self, sample: int, *qkv: torch.Tensor) -> torch.Tensor:
        """(1, h, tokens, d): attention on the pairs that the plan chooses for one sample."""
        layout, length = self.plan.layout, qkv[0].shape[2]
        plan = replace(self.plan, text_bias=None)
        if self.valid is not None:
            plan = plan.with_valid_text(torch.tensor([self.valid[min(sample, len(self.valid) - 1)]]))
        assert plan.select is not None
        # Stock models attend with more padding than the layout has, or with none.
        rows = (F.pad(x.transpose(1, 2), (0, 0, 0, 0, 0, max(0, layout.tokens - length))) for x in qkv)
        query, key, value = (layout.to_kernel(x[:, : layout.tokens]) for x in rows)
        selected = plan.select(query, key, value)
        order = None if selected.order is None else selected.order[..., None].expand(query.shape)
        moved = query if order is None else query.gather(1, order)
        everything = [torch.arange(size, device=query.device) for size in query.shape[1:3]]
        rows, scale = Rows.of(selected.mask), query.shape[-1] ** -0.5
        out, _ = reference.sampled(moved, selected.k, selected.v, rows, scale, selected.key_bias, *everything)
        out = out if order is None else torch.zeros_like(out).scatter(1, order, out)
        out = layout.to_model(out)
        return F.pad(out, (0, 0, 0, 0, 0, max(0, length - layout.tokens)))[:, :length].transpose(1, 2)


@lru_cache(maxsize=64)
def dense_mask(plan: Plan) -> torch.Tensor:
    """(h, tokens, tokens) bool in model order; a plan serves many calls."""
    return plan.static.to_dense()


def fitted(mask: torch.Tensor, length: int) -> torch.Tensor:
    """A mask (h, tokens, tokens) for `length` tokens: text at the end is cut, or added and left to the model's mask."""
    more = max(0, length - mask.shape[-1])
    return F.pad(mask, (0, more, 0, more), value=True)[:, :length, :length]


class StockProcessor:
    """A layer's stock processor, under a plan where there is one."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock
        self.plan: Plan | None = None
        self.valid: tuple[int, ...] | None = None

    def __call__(
        self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None,
        rotary_emb: Any = None, image_rotary_emb: Any = None,
    ) -> Any:  # fmt: skip
        rope = rotary_emb if rotary_emb is not None else image_rotary_emb
        inputs = (hidden_states, encoder_hidden_states, attention_mask, rope)
        if self.plan is None:
            return self.stock(attn, *inputs)
        with PlannedAttention(self.plan, self.valid) as planned:
            result = self.stock(attn, *inputs)
        assert planned.samples == len(hidden_states), "the stock layer did not call torch's attention"
        return result


class PlansSeen:
    """What an installation wrote on its processors, call by call."""

    def __init__(self, installation: Installation) -> None:
        self.installation = installation
        self.calls: list[tuple[tuple[int, ...] | None, dict[str, Plan | None]]] = []

    def before(self, call: Any, step: Any, record: Any) -> None:
        self.calls.append((call.valid, {name: p.plan for name, p in self.installation.processors.items()}))

    def after(self, record: Any) -> None:
        pass


@contextmanager
def planned(transformer: Any, seen: PlansSeen) -> Iterator[None]:
    """Replays a recorded run on stock processors."""
    remaining = iter(seen.calls)
    stock = attn_processors_of(transformer)
    ours = {name: StockProcessor(stock[name]) for name in seen.installation.processors}

    def before(*_: Any) -> None:
        valid, plans = next(remaining)
        for name, processor in ours.items():
            processor.plan, processor.valid = plans[name], valid

    place_processors(transformer, stock | ours)
    handle = transformer.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
        place_processors(transformer, stock)
    assert next(remaining, None) is None, "the stock run made fewer transformer calls than the accelerated one"


@pytest.fixture
def assert_equals_masked_stock(render: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Runs a pipeline accelerated and as the oracle; the latents must agree, and all scheduled layers run."""

    def check(pipe: Any, accelerated: Any, size: str = "even", tolerance: float = 2e-5, **kwargs: Any) -> torch.Tensor:
        before = len(accelerated.trace.calls)
        every = [PlansSeen(installation) for installation in accelerated._installations]
        doors = [FrontDoor.of(seen.installation.door.transformer) for seen in every]
        leave = [door.subscribe(seen) for door, seen in zip(doors, every, strict=True)]
        latents = render(pipe, size, **kwargs)
        for unsubscribe in leave:
            unsubscribe()
        calls = accelerated.trace.calls[before:]
        assert calls
        for call in calls:
            assert len(call.kernels) == len(call.scheduled), "a scheduled layer did not run sparse"
        assert any(call.scheduled for call in calls), "nothing ran sparse at all"
        accelerated.remove()
        with ExitStack() as stack:
            for door, seen in zip(doors, every, strict=True):
                stack.enter_context(planned(door.transformer, seen))
            expected = render(pipe, size, **kwargs)
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(latents, expected, atol=tolerance * scale, rtol=1e-4)
        return latents

    return check


OUTCOMES: dict[str, bool] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Which tests of this session have passed."""
    if report.when == "call" or report.failed:
        OUTCOMES[report.nodeid] = report.passed


@pytest.fixture
def outcomes() -> dict[str, bool]:
    """Node id -> passed, of the tests that have run so far."""
    return OUTCOMES
