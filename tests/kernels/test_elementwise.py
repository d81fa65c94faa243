"""QK-norm, RoPE and the way into kernel order, against the same formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vidaccel.grid import TokenLayout
from vidaccel.kernels import canary, elementwise
from vidaccel.kernels.elementwise import Norm, Stream

pytest.importorskip("triton")

# What the families ask for, and what else there is: (grid, text, tile, text first), heads, d, norm, across heads, RoPE
CASES: dict[str, dict[str, Any]] = {
    "wan": {"tile": (1, 3, 5), "norm": "rms", "across": True},
    "hunyuan": {"text": 20, "tile": (1, 3, 5), "norm": "rms"},
    "cogvideox": {"text": 20, "text_first": True, "norm": "layer"},
    "cogvideox-2b": {"text": 5, "text_first": True, "norm": "layer", "rope": False},
    "no norm": {"grid": (2, 3, 3), "tile": (2, 2, 3), "text": 3},
    "model order": {"grid": (1, 4, 4), "norm": "rms"},
    "odd heads": {"heads": 3, "d": 32, "norm": "rms", "across": True},
    "one head": {"heads": 1, "norm": "rms"},
    "packed": {"packed": True, "norm": "rms", "across": True, "batch": 2},
    "other strides": {"packed": None, "text": 3, "norm": "layer", "batch": 2},
}


def problem(
    *, grid: tuple[int, int, int] = (1, 3, 7), text: int = 0, tile: tuple[int, int, int] | None = None,
    text_first: bool = False, heads: int = 2, d: int = 16, norm: str | None = None, across: bool = False,
    rope: bool = True, batch: int = 1, packed: bool | None = False, dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[TokenLayout, Stream, Stream | None, elementwise.Tables | None]:  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, kind)

    def stream(tokens: int) -> Stream:
        if packed:
            q, k, v = noise(batch, tokens, 3 * heads * d).unflatten(2, (3 * heads, d)).chunk(3, 2)
        else:
            q, k, v = (3 * noise(batch, tokens, heads, d) + 1 for _ in range(3))
        if packed is None:
            k = k.transpose(1, 2).contiguous().transpose(1, 2)
        if norm is None:
            return Stream(q, k, v)
        size = heads * d if across else d
        biases = (noise(size), noise(size)) if norm == "layer" else None
        return Stream(q, k, v, Norm(norm, 1e-6, (noise(size), noise(size)), biases))

    layout = TokenLayout.of(grid, text, 16, tile, text_first=text_first).to(device)
    angles = noise(layout.grid.tokens, d // 2, kind=torch.float32).repeat_interleave(2, -1)
    tables = (angles.cos(), angles.sin()) if rope else None
    return layout, stream(layout.grid.tokens), stream(text) if text else None, tables


def by_formula(
    layout: TokenLayout, video: Stream, text: Stream | None, rope: elementwise.Tables | None, dtype: torch.dtype
) -> list[torch.Tensor]:
    """q, k, v in kernel order with every step in `dtype`."""
    found = []
    for which in range(3):
        parts = [elementwise.by_formula(video, which, rope, dtype)]
        if text is not None:
            parts.append(elementwise.by_formula(text, which, None, dtype))
        moved = layout.to_kernel(torch.cat(parts[::-1] if layout.text_first else parts, 1))
        found.append(torch.where(layout.filled[:, None, None], moved, 0))
    return found


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels are compiled here, not interpreted")
    return str(request.param)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.bfloat16) for case in CASES), ("cogvideox", torch.float32), ("wan", torch.float16)],
    ids=str,
)
def test_as_exact_as_the_models_own_steps(case: str, dtype: torch.dtype, device: str) -> None:
    args = problem(**CASES[case], dtype=dtype, device=device)
    found = elementwise.to_kernel(*args)
    for given, exact, near in zip(found, by_formula(*args, torch.float64), by_formula(*args, dtype), strict=True):
        assert given.dtype == dtype
        assert given.transpose(0, 1).is_contiguous()
        error = canary.largest_error(given, exact)
        assert error <= canary.error_budget(exact, near, dtype, 0.0)
    assert torch.equal(found[2], by_formula(*args, dtype)[2])


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("case", ["wan", "hunyuan", "cogvideox", "no norm", "odd heads", "packed", "other strides"])
def test_what_goes_to_each_rank(case: str, which: int, device: str) -> None:
    _, video, text, rope = problem(**CASES[case], dtype=torch.bfloat16, device=device)
    streams = [video] if text is None else [video, text]
    heads = video.q.shape[2]
    each = -(-heads // 2)
    norms = [elementwise.OneNorm.of(stream.norm, which) for stream in streams]
    sent = elementwise.to_ranks([stream[which] for stream in streams], norms, rope if which < 2 else None, 2, each)

    def packed(dtype: torch.dtype) -> torch.Tensor:
        parts = [elementwise.by_formula(s, which, None if n else rope, dtype) for n, s in enumerate(streams)]
        whole = torch.nn.functional.pad(torch.cat(parts, 1), (0, 0, 0, 2 * each - heads))
        return torch.stack(whole.chunk(2, 2))

    assert sent.shape == packed(torch.bfloat16).shape
    # Of an odd number of heads the last rank has one less.
    for own, *given in zip((each, heads - each), sent, packed(torch.float64), packed(torch.bfloat16), strict=True):
        found, exact, near = (x[:, :, :own] for x in given)
        assert canary.largest_error(found, exact) <= canary.error_budget(exact, near, torch.bfloat16, 0.0)


@pytest.mark.parametrize("case", ["wan", "hunyuan", "cogvideox", "other strides"])
def test_there_and_back(case: str, device: str) -> None:
    kind = {**CASES[case], "norm": None, "rope": False}
    layout, video, text, _ = problem(**kind, dtype=torch.bfloat16, device=device)
    moved = elementwise.to_kernel(layout, video, text)
    for x, *streams in zip(moved, video[:3], (text or ((),) * 3)[:3], strict=False):
        back = torch.ops.vidaccel.to_model(x, layout.slot_of)
        parts = [s for s in streams if len(s)]
        assert torch.equal(back, torch.cat(parts[::-1] if layout.text_first else parts, 1))


def test_back_from_heads_first(device: str) -> None:
    layout, video, *_ = problem(tile=(1, 3, 5), device=device)
    x = layout.to_kernel(video.q).transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(torch.ops.vidaccel.to_model(x, layout.slot_of), video.q)


def test_rotary_tables_of_any_shape_and_type(device: str) -> None:
    layout, video, _, (cos, sin) = problem(device=device)
    plain = elementwise.to_kernel(layout, video, rope=(cos, sin))
    for kind in (torch.float64, torch.float32):
        found = elementwise.to_kernel(layout, video, rope=(cos[None, :, None].to(kind), sin[None, :, None].to(kind)))
        assert torch.equal(found[0], plain[0])


def test_shapes_without_running(device: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    layout, video, text, rope = problem(**CASES["hunyuan"], device=device)
    expected = elementwise.to_kernel(layout, video, text, rope)
    torch.library.opcheck(
        torch.ops.vidaccel.to_model, (expected[0], layout.slot_of), test_utils=("test_schema", "test_faketensor")
    )

    def sent() -> torch.Tensor:
        return elementwise.to_ranks([video.v, text.v], [elementwise.NO_NORM] * 2, None, 2, 1)

    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = *elementwise.to_kernel(layout, video, text, rope), sent()
    assert [x.shape for x in fake] == [x.shape for x in (*expected, sent())]


@pytest.mark.parametrize(("h", "d"), [(40, 128), (24, 128), (12, 128), (16, 128), (48, 64), (30, 64), (3, 64), (1, 16)])
def test_tiles_waste_little(h: int, d: int) -> None:
    tile = elementwise._tile(h, d)
    places = -(-h // tile["GROUP"]) * tile["GROUP"]
    assert places <= 1.125 * h
    assert tile["GROUP"] * d <= 1024
    assert h < 8 or tile["GROUP"] * d >= 512
