"""Choosing blocks: the Triton kernels against what torch makes of the same scores."""

from __future__ import annotations

import pytest
import torch

from vidaccel.blocks import BlockMask
from vidaccel.checked import checked
from vidaccel.grid import TokenLayout
from vidaccel.kernels import compact, pool, select
from vidaccel.reuse.selection import best_of, row_layout

pytest.importorskip("triton")

# Grid, text, tile, block: a short end, clipped tiles, more text blocks than video blocks, one block in all.
LAYOUTS = {
    "short last block": ((3, 4, 5), 0, None, 16),
    "text": ((1, 5, 7), 20, (1, 3, 5), 16),
    "mostly text": ((1, 2, 9), 100, None, 16),
    "one block": ((1, 3, 4), 0, None, 16),
}
# For what an interpreter would take minutes.
LARGE = {
    "blocks of 128": ((13, 30, 45), 226, (3, 5, 8), 128),
    "1,182 blocks": ((21, 45, 80), 20, None, 64),
    "2,048 blocks": ((8, 64, 64), 0, None, 16),
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels are compiled here, not interpreted")
    return str(request.param)


@pytest.fixture(params=[*LAYOUTS, *(pytest.param(name, marks=pytest.mark.gpu) for name in LARGE)])
def layout(request: pytest.FixtureRequest) -> TokenLayout:
    grid, text, tile, block = {**LAYOUTS, **LARGE}[request.param]
    return TokenLayout.of(grid, text, block, tile)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def troubled(n: int) -> torch.Tensor:
    """Scores (2, n, n): many equal ones, signed zeros, infinities, NaN, tiny and huge ones; plain ones."""
    scores = noise(2, n, n)
    scores[0] = scores[0].mul(2).round()
    for seed, value in enumerate((-torch.inf, torch.inf, torch.nan, -torch.nan, 1e-40, -1e-40, 0.0, -0.0, 3e38)):
        scores[0][noise(n, n, seed=seed + 1) > 1.5] = value
    return scores


def assert_same(found: BlockMask, expected: BlockMask) -> None:
    for name in ("ptr", "idx", "n_full"):
        given, wanted = getattr(found, name).cpu(), getattr(expected, name)
        assert given.dtype == wanted.dtype == torch.int32
        assert torch.equal(given, wanted), name


def numbers_of_blocks(n: int) -> list[int]:
    return sorted({n // 3 + 1, n, n + 1})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_means(layout: TokenLayout, dtype: torch.dtype, device: str) -> None:
    for d, packed in ((48, True), (128, False)):
        x = noise(1, layout.slots, 2, d).to(dtype)
        x[:, ~layout.filled] = torch.nan
        n = layout.video_blocks
        given = torch.cat([x, x], -1).to(device)[..., :d] if packed else x.to(device)
        found = compact.block_means(given, layout.q_len[:n].to(device), layout.block)
        assert found.dtype == torch.float32
        expected = torch.where(layout.filled[:, None, None], x, 0).double()[0]
        owner = torch.arange(layout.slots) // layout.block
        sums = torch.zeros(layout.blocks, 2, d, dtype=torch.float64).index_add_(0, owner, expected)[:n]
        exact = (sums / layout.q_len[:n, None, None]).transpose(0, 1)
        torch.testing.assert_close(found.cpu().double(), exact, atol=1e-6, rtol=1e-5)


def test_scores_are_fp32_under_autocast(device: str) -> None:
    layout = TokenLayout.of((2, 4, 8), block=16).to(device)
    q, k = (noise(1, layout.slots, 2, 16).to(device) for _ in range(2))
    plain = select.block_scores(q, k, layout)
    with torch.autocast(device, torch.bfloat16):
        found = select.block_scores(q, k, layout)
    assert found.dtype == torch.float32
    assert torch.equal(found, plain)


@pytest.mark.parametrize("heads", [1, 2])
def test_best_blocks(layout: TokenLayout, device: str, heads: int) -> None:
    n = layout.video_blocks
    own, scores = torch.eye(n, dtype=torch.bool), troubled(n)[:heads]
    for kept in numbers_of_blocks(n):
        found = compact.best_blocks(scores.to(device), own.to(device), kept, layout.to(device))
        assert_same(found, select.best_blocks(scores, own, kept, layout))


@pytest.mark.parametrize("keys", [5, 37, pytest.param(1500, marks=pytest.mark.gpu)])
def test_rows_of_other_keys_keep_what_a_tensor_says(keys: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a stream: more or fewer blocks of keys than of queries, and how many are kept is no plain number."""
    queries = row_layout(9 * 16 - 3, 16)
    scores, k_len = troubled(max(9, keys))[:, :9, :keys], torch.full((keys,), 16, dtype=torch.int32)
    for kept in {1, keys // 2, keys - 1}:
        given = (scores.to(device), torch.tensor(kept, device=device), keys, queries.to(device), k_len.to(device))
        found = best_of(*given)
        with monkeypatch.context() as patch:
            patch.setattr(compact, "can_run", lambda *_: False)
            expected = best_of(scores, torch.tensor(kept), keys, queries, k_len)
        assert torch.equal(found.ptr.cpu(), expected.ptr)
        assert torch.equal(found.n_full.cpu(), expected.n_full)
        end = int(expected.ptr[-1])
        assert end == 2 * 9 * kept
        assert torch.equal(found.idx[:end].cpu(), expected.idx[:end])
        checked(expected)


@pytest.mark.parametrize("heads", [1, 2])
def test_likeliest_blocks(layout: TokenLayout, device: str, heads: int) -> None:
    n = layout.video_blocks
    own, scores = torch.eye(n, dtype=torch.bool), 3 * noise(heads, n, n)
    # Half of the rows have many equals, in themselves and among each other.
    scores[:, ::2] = scores[:, ::2].round().sort(-1).values
    scores[:, ::4] = scores[:, :1].clone()
    likely = scores.softmax(-1)
    for kept in numbers_of_blocks(n):
        found = compact.likeliest_blocks(likely.to(device), own.to(device), kept, layout.to(device))
        assert_same(found, select.likeliest_blocks(scores, own, kept, layout))


@pytest.mark.gpu
def test_patterns_choose_the_same_on_both_devices_and_always() -> None:
    """Through `select`, at the size of a real layer; scores of both devices differ by rounding, few blocks by that."""
    layout = TokenLayout.of((21, 45, 80), tile=(3, 5, 8))
    n, kept = layout.video_blocks, layout.video_blocks // 4
    own = torch.eye(n, dtype=torch.bool)
    q, k = (noise(1, layout.slots, 4, 128, seed=seed).to(torch.bfloat16) for seed in (1, 2))
    there = layout.to("cuda")
    for choose in (select.best_blocks, select.likeliest_blocks):
        expected = choose(select.block_scores(q, k, layout), own, kept, layout).block_map()
        masks = [
            choose(select.block_scores(q.cuda(), k.cuda(), there), own.cuda(), kept, there) for _ in range(20)
        ]  # fmt: skip
        for mask in masks:
            assert torch.equal(mask.idx, masks[0].idx)
            assert torch.equal(mask.ptr, masks[0].ptr)
        different = (masks[0].block_map().cpu() != expected).float().mean()
        assert different < 1e-3


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    layout = TokenLayout.of((5, 12, 20), 20, 64).to("cuda")
    n = layout.video_blocks
    own = torch.eye(n, dtype=torch.bool, device="cuda")
    q, k = (torch.randn(1, layout.slots, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def choose() -> list[torch.Tensor]:
        scores = select.block_scores(q, k, layout)
        masks = [choose(scores, own, n // 3, layout) for choose in (select.best_blocks, select.likeliest_blocks)]
        return [x for mask in masks for x in (mask.ptr, mask.idx, mask.n_full)]

    expected = choose()
    torch.cuda.set_sync_debug_mode("error")
    try:
        eager = choose()
        compiled = torch.compile(choose, fullgraph=True)
        torch.cuda.set_sync_debug_mode("default")
        first = compiled()
        torch.cuda.set_sync_debug_mode("error")
        second = compiled()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for found in (eager, first, second):
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_means_behind_keys(layout: TokenLayout, dtype: torch.dtype, device: str) -> None:
    """Bit for bit what torch makes level by level; the interpreter rounds bf16 otherwise."""
    for d, packed in ((48, True), (128, False)):
        x = noise(1, layout.slots, 2, d).to(dtype)
        x[:, ~layout.filled] = torch.nan
        given = torch.cat([x, x], -1).to(device)[..., :d] if packed else x.to(device)
        expected = select.with_means(x, layout)
        found = pool.means_behind(given, layout.q_len.to(device), layout.block, layout.video_blocks).cpu()
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, atol=0, rtol=0 if device == "cuda" else 2**-7)
        start = layout.blocks * layout.block
        assert torch.equal(found[:, :start][:, : layout.slots][:, layout.filled], x[:, layout.filled])


def test_shapes_without_running(device: str) -> None:
    layout = TokenLayout.of((1, 5, 7), 20, 16).to(device)
    n = layout.video_blocks
    scores, own = noise(2, n, n).to(device), torch.eye(n, dtype=torch.bool, device=device)
    checks = ("test_schema", "test_faketensor")
    x = noise(1, layout.slots, 2, 16).to(device)
    torch.library.opcheck(compact.block_means, (x, layout.q_len[:n], 16), test_utils=checks)
    torch.library.opcheck(pool.means_behind, (x, layout.q_len, 16, n), test_utils=checks)
    torch.library.opcheck(compact.common_cut, (scores, own, 7), test_utils=checks)
    ptr, _ = compact.bounds(torch.full((2, n), 1, device=device), layout)
    length = int(ptr[-1])
    torch.library.opcheck(compact.keep_best, (scores, own, ptr, None, None, length), test_utils=checks)
