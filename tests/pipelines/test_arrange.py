"""Norm, RoPE and reorder of real layers in one kernel, against the layers' own modules in float64."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import tiny_pipelines
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

# Triton decides at import whether its kernels run on a GPU or, without one, in Python.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton")

from vidaccel.exchange import Exchange
from vidaccel.family import family_of
from vidaccel.grid import TokenLayout
from vidaccel.kernels import canary, elementwise, fused
from vidaccel.ranks import Ranks

GRID = (1, 2, 5)
TEXT = 3
LAYERS: dict[str, Callable[[], Any]] = {
    "wan": lambda: tiny_pipelines.wan(layers=1),
    "hunyuan, two streams": lambda: tiny_pipelines.hunyuan(),
    "hunyuan, one stream": lambda: tiny_pipelines.hunyuan(),
    "hunyuan15": lambda: tiny_pipelines.hunyuan15(layers=1),
    "cogvideox": lambda: tiny_pipelines.cogvideox(),
}


@cache
def transformer_of(name: str) -> Any:
    """Built once; who changes something takes a copy."""
    return LAYERS[name]().transformer


class Watch(TorchDispatchMode):
    """Notes which norm every launch of the fused kernels had, "none" where the modules did it."""

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.vidaccel.to_kernel.default:
            self.norms.append(args[10])
        elif function is torch.ops.vidaccel.to_ranks.default:
            self.norms.append(args[6])
        return function(*args, **(kwargs or {}))


class Layer:
    """One attention layer with norms of random weights, and a call of it."""

    def __init__(self, name: str, device: str, dtype: torch.dtype = torch.bfloat16, batch: int = 1) -> None:
        transformer = transformer_of(name)
        self.family = family_of(transformer)
        single = name == "hunyuan, one stream"
        place = next(s.name for s in self.family.sites(transformer) if ("single" in s.name) == single)
        self.attn = copy.deepcopy(transformer.get_submodule(place.removesuffix(".processor")))
        generator = torch.Generator().manual_seed(0)
        for part, module in self.attn.named_modules():
            if "norm" in part:
                for parameter in module.parameters():
                    parameter.data = torch.randn(parameter.shape, generator=generator)
        self.attn.to(device, dtype).requires_grad_(False)
        width = self.attn.to_q.in_features
        d = self.attn.to_q.out_features // self.attn.heads
        text = TEXT * (name != "wan")
        first = getattr(self.family, "text_first", False)
        self.layout = TokenLayout.of(GRID, text, 16, (1, 2, 4), text_first=first).to(device)
        angles = torch.randn(self.layout.grid.tokens, d // 2, generator=generator).repeat_interleave(2, -1).to(device)
        shape = (1, -1, 1, d) if name == "wan" else (-1, d)
        hidden, encoder = (
            torch.randn(batch, n, width, generator=generator).to(device, dtype) for n in (self.layout.grid.tokens, text)
        )
        self.inputs = [hidden, encoder if text else None, None, (angles.cos().view(shape), angles.sin().view(shape))]

    def project(self, exchange: Exchange | None = None) -> elementwise.Heads:
        return self.family.project(self.attn, self.layout, *self.inputs, exchange)  # type: ignore[no-any-return]

    def exact(self) -> elementwise.Heads:
        """The layer's own modules in float64."""
        attn = copy.deepcopy(self.attn).double()
        inputs = [x.double() if isinstance(x, torch.Tensor) else x for x in self.inputs]
        return self.family.project(attn, self.layout, *inputs)  # type: ignore[no-any-return]

    def assert_right(self, found: elementwise.Heads, near: elementwise.Heads) -> None:
        """Within twice the error of the layer's own modules; holes are empty."""
        filled = self.layout.filled
        for given, exact, low in zip(found, self.exact(), near, strict=True):
            assert given.dtype == low.dtype
            error = canary.largest_error(given[:, filled], exact[:, filled])
            assert error <= canary.error_budget(exact[:, filled], low[:, filled], given.dtype)
            assert not given[:, ~filled].any()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels are compiled here, not interpreted")
    return str(request.param)


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Turns the kernels on, where an interpreter runs them too, or off."""

    def turn(on: bool) -> None:
        monkeypatch.setattr(fused, "can_run", lambda *x: on and all(t.dtype in fused.DTYPES for t in x))

    return turn


@pytest.fixture
def ranks(device: str) -> Iterator[Ranks]:
    """A group of one, which swaps with itself."""
    store = torch.distributed.HashStore()
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    yield Ranks(torch.distributed.group.WORLD, 0, 1, True)
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch.distributed with gloo")
@pytest.mark.parametrize("name", ["wan", "hunyuan, two streams", "cogvideox"])
def test_layers_on_their_way_to_ranks(name: str, switch: Any, device: str, ranks: Ranks) -> None:
    layer = Layer(name, device, batch=2 if name == "wan" else 1)
    layout = layer.layout
    exchange = Exchange.of(ranks, layout.grid.tokens, layout.text, text_first=layout.text_first, device=device)
    switch(False)
    near = layer.project()
    for given, wanted in zip(layer.project(exchange), near, strict=True):
        assert torch.equal(given[:, layout.filled], wanted[:, layout.filled])
    switch(True)
    with Watch() as watch:
        found = layer.project(exchange)
    norm = "layer" if name == "cogvideox" else "rms"
    assert watch.norms == ["none", norm, norm]  # v leaves first
    filled = layout.filled[:, None, None]
    layer.assert_right(tuple(torch.where(filled, x, 0) for x in found), near)
    # Somebody watches the norm of k: it is called.
    layer.attn.norm_k.register_forward_hook(lambda *_: None)
    with Watch() as watch:
        layer.project(exchange)
    assert watch.norms == ["none", "none", norm]


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, switch: Any, device: str) -> None:
    layer = Layer(name, device, batch=2 if name == "wan" else 1)
    switch(False)
    near = layer.project()
    switch(True)
    with Watch() as watch:
        found = layer.project()
    layer.assert_right(found, near)
    assert watch.norms == ["layer" if name == "cogvideox" else "rms"]
    # Without RoPE, as CogVideoX 2b.
    layer.inputs[3] = None
    found = layer.project()
    switch(False)
    layer.assert_right(found, layer.project())


def hooked(attn: Any) -> None:
    attn.norm_q.register_forward_hook(lambda module, args, output: 2 * output)


def replaced_forward(attn: Any) -> None:
    forward = attn.norm_k.forward
    attn.norm_k.forward = lambda x: 2 * forward(x)


def of_another_class(attn: Any) -> None:
    class Doubled(nn.RMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    old = attn.norm_q
    attn.norm_q = Doubled(old.normalized_shape, old.eps, device=old.weight.device, dtype=old.weight.dtype)


def of_its_own_eps(attn: Any) -> None:
    attn.norm_k.eps = 0.5


def without_eps(attn: Any) -> None:
    attn.norm_q.eps = None


def offloaded(attn: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(attn.norm_q, execution_device=attn.to_q.weight.device)


@pytest.mark.parametrize(
    "change", [hooked, replaced_forward, of_another_class, of_its_own_eps, without_eps, offloaded],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_norms_that_do_more_are_called(change: Callable[[Any], None], switch: Any, device: str) -> None:
    layer = Layer("wan", device)
    plain = layer.project()
    change(layer.attn)
    switch(False)
    near = layer.project()
    switch(True)
    with Watch() as watch:
        found = layer.project()
    assert watch.norms == ["none"]
    for given, low in zip(found, near, strict=True):
        # Only RoPE is left, and the interpreter cuts where torch rounds.
        filled = layer.layout.filled
        torch.testing.assert_close(given[:, filled], low[:, filled], rtol=0.02, atol=0.02)
    if change not in (without_eps, offloaded):
        assert any(not torch.equal(x, y) for x, y in zip(near, plain, strict=True))


def test_other_linears_change_nothing(switch: Any, device: str) -> None:
    """Whatever the projections are (LoRA, quantised, fused), only their outputs count."""
    layer = Layer("wan", device)
    switch(True)
    expected = layer.project()
    layer.attn.fuse_projections()
    for given, wanted in zip(layer.project(), expected, strict=True):
        torch.testing.assert_close(given, wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["wan", "hunyuan, two streams", "cogvideox"])
def test_autocast(name: str, switch: Any, device: str) -> None:
    layer = Layer(name, device, torch.float32)
    with torch.autocast(device, torch.bfloat16):
        switch(False)
        near = layer.project()
        switch(True)
        with Watch() as watch:
            found = layer.project()
    assert watch.norms == ["layer" if name == "cogvideox" else "rms"]
    assert {x.dtype for x in (*near, *found)} == {torch.bfloat16}
    layer.assert_right(found, near)


@pytest.mark.parametrize("name", ["wan", "hunyuan, two streams", "cogvideox"])
def test_compiled_whole(name: str, switch: Any, device: str) -> None:
    layer = Layer(name, device)
    switch(True)
    with torch.no_grad():
        expected = layer.project()
        backend = "eager" if device == "cpu" else "inductor"
        project = torch.compile(layer.project, fullgraph=True, backend=backend)
        for given, wanted in zip(project(), expected, strict=True):
            torch.testing.assert_close(given, wanted, rtol=0.02, atol=0.02)
