"""Sign hashing: the Triton kernels against what torch makes of the same tokens."""

from __future__ import annotations

import pytest
import torch

from vidaccel.kernels import hashing, select
from vidaccel.patterns.hashing import HashPlanes

pytest.importorskip("triton")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels are compiled here, not interpreted")
    return str(request.param)


@pytest.mark.parametrize("tokens", [1, 63, 130, pytest.param(17_550, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("bits", [1, 5, 8])
@pytest.mark.parametrize("d", [16, 48, 128])
def test_codes(tokens: int, bits: int, d: int, device: str) -> None:
    """Every token is on the side that float64 finds, but where that is on the plane as far as fp32 can tell."""
    planes, generator = HashPlanes.of(bits), torch.Generator().manual_seed(tokens)
    packed = torch.randn(1, tokens, 3, 2 * d, generator=generator).bfloat16()
    x, mean = packed[..., d:], torch.randn(3, d, generator=generator)
    found = hashing.sign_codes(packed.to(device)[..., d:], mean.to(device), planes.planes.to(device)).cpu()
    assert found.dtype == torch.int64
    code = found ^ (found >> 1)
    products = (x[0].double() - mean.double()) @ planes.planes[:d].double()
    sides = (code.T[..., None] >> torch.arange(bits)) & 1 == 1
    assert code.shape == (3, tokens)
    assert code.max() < 2**bits
    sure = products.abs() > 1e-4
    assert sure.float().mean() > 0.9
    assert torch.equal(sides[sure], (products > 0)[sure])
    # A tensor whose channels lie apart.
    apart = x.transpose(2, 3).contiguous().transpose(2, 3).to(device)
    assert torch.equal(hashing.sign_codes(apart, mean.to(device), planes.planes.to(device)).cpu(), found)


@pytest.mark.parametrize("tokens", [1, 128, 300, pytest.param(75_600, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kinds", [1, 18, 258])
def test_order(tokens: int, kinds: int, device: str) -> None:
    codes = torch.randint(kinds, (3, tokens), generator=torch.Generator().manual_seed(tokens))
    codes[1] = kinds - 1
    order, start = hashing.in_order(codes.to(device), kinds)
    assert order.dtype == torch.int64
    assert torch.equal(order.cpu(), codes.argsort(dim=1, stable=True))
    expected = [[int((row < kind).sum()) for kind in range(kinds)] for row in codes]
    assert start.tolist() == expected


def test_what_is_sorted_is_the_same_on_a_gpu(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pattern's own sort, by torch and by the kernels."""
    planes, generator = HashPlanes.of(4), torch.Generator().manual_seed(0)
    codes = torch.randint(16, (2, 200), generator=generator)
    first, last = torch.arange(200) < 20, torch.rand(2, 200, generator=generator) > 0.8
    order, counts = planes.sort(codes, 32, first, last & ~first)
    monkeypatch.setattr("vidaccel.patterns.hashing.in_order", hashing.in_order)
    found = planes.to(device).sort(codes.to(device), 32, first.to(device), (last & ~first).to(device))
    assert torch.equal(found[0].cpu(), order)
    assert torch.equal(found[1].cpu(), counts)
    apart = first | last
    for head in range(2):
        assert order[head, :20].tolist() == list(range(20))
        for block in range(7):
            inside = [n for n in order[head, 32 * block : 32 * block + 32].tolist() if not apart[head, n]]
            assert counts[head, block].tolist() == [int((codes[head, inside] == code).sum()) for code in range(16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "d"), [(1, 16), (100, 48), pytest.param(17_776, 64, marks=pytest.mark.gpu)])
def test_moved_and_back(tokens: int, d: int, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(1, tokens, 3, d, generator=generator).to(dtype)
    # As `HashPlanes.sort` gives it, and as it lies in memory after text was put behind it.
    order = torch.rand(3, tokens, generator=generator).argsort(1)
    for places in (order.T[None], order.T.contiguous()[None]):
        found = hashing.moved(x.to(device), places.to(device), back=False)
        assert torch.equal(found.cpu(), select.taken(x, places))
        assert torch.equal(found[0, :, 1].cpu(), x[0, order[1], 1])
        assert torch.equal(hashing.moved(found, places.to(device), back=True).cpu(), x)
        assert torch.equal(select.put_back(found.cpu(), places), x)
    apart = torch.cat([x, x], -1).to(device)[..., d:]
    few = order.T[None, : tokens // 2 + 1]
    assert torch.equal(hashing.moved(apart, few.to(device), back=False).cpu(), select.taken(x, few))
