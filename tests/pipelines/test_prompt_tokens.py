"""AnnCA on a Wan that sees all frames at once: beside any self-attention, per prompt and branch, and away again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_pipelines
import torch

import vidaccel
from vidaccel.errors import InstallError
from vidaccel.family import attn_processors_of
from vidaccel.frontdoor import FrontDoor
from vidaccel.patterns import TopK
from vidaccel.pipelines.prompt_tokens import AnnCrossAttnProcessor, ann_cross, remove

TEXT = {"prompt": "a cat and a dog", "negative_prompt": "bad", "steps": 2}


@pytest.fixture(scope="module")
def wan() -> Any:
    return tiny_pipelines.wan(layers=2)


def place(pipe: Any, **settings: Any) -> None:
    transformer = pipe.transformer
    transformer.set_attn_processor(attn_processors_of(transformer) | ann_cross(transformer, **settings))


def test_what_drops_nothing_is_stock_and_what_drops_something_is_near(wan: Any, render: Callable[..., Any]) -> None:
    stock, before = render(wan, **TEXT), attn_processors_of(wan.transformer)
    errors = {}
    for density, block in ((1.0, 64), (0.5, 8), (0.1, 2)):
        place(wan, density=density, block=block)
        errors[density] = float((render(wan, **TEXT) - stock).norm() / stock.norm())
        # Another prompt, and the same again: nothing of a prompt outlives its video.
        other = render(wan, **{**TEXT, "prompt": "two dogs that run"})
        assert not torch.equal(other, render(wan, **TEXT))
        remove(wan.transformer)
    assert errors[1.0] < 1e-4
    assert 1e-5 < errors[0.1] < 0.5
    assert errors[0.5] <= errors[0.1]
    assert all(attn_processors_of(wan.transformer)[name] is processor for name, processor in before.items())
    assert torch.equal(render(wan, **TEXT), stock)


def test_it_stands_beside_sparse_self_attention(wan: Any, render: Callable[..., Any]) -> None:
    transformer, topk = wan.transformer, TopK(block=16)
    transformer.set_attn_processor(
        vidaccel.attn_processors(transformer, topk, density=0.4) | ann_cross(transformer, density=0.1, block=2)
    )
    both = render(wan, **TEXT)
    trace = FrontDoor.of(transformer).trace
    assert all(len(call.kernels) == len(call.scheduled) == 2 for call in trace.calls)
    assert any(note.startswith("ann-cross: 2 of") for note in trace.notes)
    remove(transformer)
    topk_alone = render(wan, **TEXT)
    vidaccel.remove(transformer)
    assert len({float(x.double().sum()) for x in (both, topk_alone, render(wan, **TEXT))}) == 3


def test_one_object_for_all_layers(wan: Any, render: Callable[..., Any]) -> None:
    transformer, stock = wan.transformer, attn_processors_of(wan.transformer)
    place(wan, density=0.1, block=2)
    expected = render(wan, **TEXT)
    remove(transformer)
    transformer.set_attn_processor(AnnCrossAttnProcessor(transformer, density=0.1, block=2))
    assert torch.equal(render(wan, **TEXT), expected)
    remove(transformer)
    assert all(attn_processors_of(transformer)[name] is processor for name, processor in stock.items())


def test_compiled_blocks_see_one_form(render: Callable[..., Any]) -> None:
    from torch._dynamo.testing import CompileCounter

    pipe, counter = tiny_pipelines.wan(layers=2), CompileCounter()
    place(pipe, density=0.1, block=2)
    expected = render(pipe, **TEXT)
    torch._dynamo.reset()
    try:
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
        torch.testing.assert_close(render(pipe, **TEXT), expected, atol=1e-5, rtol=1e-4)
        compiled = counter.frame_count
        render(pipe, **TEXT)
        assert counter.frame_count == compiled <= 2
    finally:
        torch._dynamo.reset()
    remove(pipe.transformer)


@pytest.mark.parametrize("family", ["hunyuan", "cogvideox"])
def test_families_without_cross_attention_say_so(family: str) -> None:
    with pytest.raises(InstallError, match="no cross-attention"):
        ann_cross(getattr(tiny_pipelines, family)().transformer)
    with pytest.raises(InstallError, match="that of this LTXVideoTransformer3DModel is another one"):
        ann_cross(tiny_pipelines.ltx().transformer)


def test_twice_is_too_often(wan: Any) -> None:
    place(wan)
    with pytest.raises(InstallError, match="already"):
        ann_cross(wan.transformer)
    remove(wan.transformer)
    with pytest.raises(InstallError, match="nothing to remove"):
        remove(wan.transformer)
