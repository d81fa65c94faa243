"""What the kinds of trouble do not show: unwritten results, leaks, every length, repeats, and the real sizes."""

from __future__ import annotations

import dataclasses
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from vidaccel.blocks import BlockMask
from vidaccel.grid import Site, TokenLayout, VideoGrid
from vidaccel.kernels import attention, bench, canary, gluon, merge
from vidaccel.kernels.problem import Rows
from vidaccel.lab.kernel_cases import SHAPES
from vidaccel.patterns import Neighborhood

Cases = Callable[..., Any]
ROOT = Path(__file__).parents[2]


class Form(NamedTuple):
    """A head dim and block that a backend has, how many words the problem's windows take, and whether it has a bias."""

    d: int
    block: int
    window: int = 0
    bias: bool = False

    @property
    def label(self) -> str:
        return f"{self.d}-{self.block}" + f"-window{self.window}" * (self.window > 0) + "-bias" * self.bias


# What `gluon.CONFIGS` has. Windows and biases change how `gluon` is launched, so there they are forms of their own.
EVERY = [Form(*form) for form in runpy.run_path(str(ROOT / "kernels/bench/sanitize.py"))["FORMS"]]
PLAIN = [form for form in EVERY if not form.window and not form.bias]
FORMS = {"gluon": EVERY, "tma": PLAIN, "portable": PLAIN}


class Kernel(NamedTuple):
    """A backend, the device it is tried on, and a form that it has."""

    name: str
    device: str
    form: Form

    def case(self, make_case: Cases, **kwargs: Any) -> Any:
        """A problem of random blocks that this kernel can run."""
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float16
        form = self.form._asdict() | {"bias": (1, 1) if self.form.bias else None}
        return make_case(**form | {"dtype": dtype, "device": self.device} | kwargs)

    def run(self, case: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Its result."""
        return attention(case.q, case.k, case.v, **case.kwargs(self.name))


def _kernels() -> Iterator[Any]:
    # Without a GPU Triton's kernels run in its interpreter, where a tile takes milliseconds. Gluon has none.
    for name, block in (("cpu", 32), ("portable", 32), ("tma", 64)):
        yield pytest.param(Kernel(name, "cpu", Form(64, block)), id=f"{name}-interpreted" if name != "cpu" else name)
    yield pytest.param(Kernel("cpu", "cpu", Form(64, 32, window=1, bias=True)), id="cpu-window-bias")
    for name, forms in FORMS.items():
        for form in forms:
            yield pytest.param(Kernel(name, "cuda", form), id=f"{name}-{form.label}", marks=pytest.mark.gpu)


@pytest.fixture(params=_kernels())
def kernel(request: pytest.FixtureRequest) -> Kernel:
    kernel: Kernel = request.param
    if kernel.name != "cpu":
        pytest.importorskip("triton")
    if kernel.device == "cpu" and torch.cuda.is_available() and kernel.name != "cpu":
        pytest.skip("with a GPU the kernel is compiled")
    if kernel.name in ("gluon", "tma") and kernel.device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    return kernel


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch gives out without a value holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def only(keep: torch.Tensor, mask: BlockMask) -> BlockMask:
    """The mask, but of its blocks only those in `keep`."""
    kind = mask.block_map()
    return BlockMask.of(keep & (kind > 0), mask.layout, partial=kind == 1, window=mask.window)


@pytest.mark.parametrize("trouble", ["text", "lengths", "nothing"])
def test_every_result_is_written(make_case: Cases, kernel: Kernel, poisoned: None, trouble: str) -> None:
    kinds = {"text": {"text": 20}, "lengths": {"lengths": True}, "nothing": {"density": 0.0}}
    case = kernel.case(make_case, grid=(2, 9, 13), **kinds[trouble])
    assert torch.empty_like(case.q).isnan().all()
    case.assert_right(kernel.run(case))


def test_what_a_row_drops_cannot_reach_it(make_case: Cases, kernel: Kernel) -> None:
    """Infinity and NaN in blocks that neighbouring rows keep: kernels may load them for both."""
    case = kernel.case(make_case, grid=(2, 16, 28), heads=2, one_block=True)
    clean = kernel.run(case)
    blocks, block = case.mask.layout.blocks, case.rows.block
    bad = 1
    k, v = case.k.clone(), case.v.clone()
    k[:, bad * block : (bad + 1) * block] = torch.inf
    v[:, bad * block : (bad + 1) * block : 2] = torch.nan
    v[:, bad * block + 1 : (bad + 1) * block : 2] = torch.inf
    out, lse = kernel.run(dataclasses.replace(case, k=k, v=v))
    drops = (case.mask.block_map()[..., bad] == 0).repeat_interleave(block, 1)[:, : case.q.shape[1]]
    assert 0 < int((~drops).sum()) <= 2 * block < blocks * block
    for found, true in ((out[0].transpose(0, 1), clean[0][0].transpose(0, 1)), (lse[0], clean[1][0])):
        assert torch.equal(found[drops], true[drops])


def test_blocks_of_every_length(make_case: Cases, kernel: Kernel) -> None:
    """Blocks of 1, 2, ... tokens, in one order for queries and in another for keys."""
    block = kernel.form.block
    # The interpreter has time for some of them.
    n = 16 if kernel.name != "cpu" and kernel.device == "cpu" else block
    case = kernel.case(make_case, grid=(1, n, block), heads=1, density=2 / n)
    generator = torch.Generator().manual_seed(1)
    every = torch.linspace(1, block, n).round().int()
    lengths = [every[torch.randperm(n, generator=generator)].to(kernel.device) for _ in range(2)]
    layout = dataclasses.replace(case.mask.layout, q_len=lengths[0], k_len=lengths[1])
    hole = torch.arange(block, device=kernel.device).repeat(n) >= layout.k_len.repeat_interleave(block)
    k, v = (torch.nan_to_num(x, 0, 0, 0).masked_fill(hole[:, None, None], torch.nan) for x in (case.k, case.v))
    mask = dataclasses.replace(case.mask, layout=layout)
    case = dataclasses.replace(case, q=torch.nan_to_num(case.q, 0, 0, 0), k=k, v=v, mask=mask)
    case.assert_right(kernel.run(case))


def test_a_head_that_keeps_nothing(make_case: Cases, kernel: Kernel) -> None:
    case = kernel.case(make_case, grid=(2, 9, 13), heads=3, density=0.7)
    keep = case.mask.block_map() > 0
    keep[1] = False
    case = dataclasses.replace(case, mask=only(keep, case.mask))
    case.assert_right(kernel.run(case))


def test_large_logits(make_case: Cases, kernel: Kernel) -> None:
    case = kernel.case(make_case, grid=(2, 9, 13), text=20)
    case = dataclasses.replace(case, q=case.q * 50)
    case.assert_right(kernel.run(case))


def test_halves_of_a_mask_merge_into_the_whole(make_case: Cases, kernel: Kernel) -> None:
    case = kernel.case(make_case, grid=(2, 9, 26), heads=2, density=0.8)
    kind = case.mask.block_map()
    half = (torch.rand(kind.shape, generator=torch.Generator().manual_seed(1)) < 0.5).to(kind.device)
    masks = [only(part, case.mask) for part in (half, ~half)]
    parts = [kernel.run(dataclasses.replace(case, mask=mask)) for mask in masks]
    case.assert_right(merge(*parts[0], *parts[1]))


def test_every_run_gives_the_same_bits(make_case: Cases, kernel: Kernel) -> None:
    on_gpu = kernel.device == "cuda"
    case = kernel.case(make_case, grid=(12, 16, 30) if on_gpu else (2, 9, 13), heads=5 if on_gpu else 1, text=20)
    first = kernel.run(case)
    for _ in range(20 if on_gpu else 2):
        assert all(torch.equal(a, b) for a, b in zip(first, kernel.run(case), strict=True))


def _real_sizes() -> Iterator[Any]:
    for name, forms in FORMS.items():
        for form in forms:
            for shape in SHAPES:
                if shape[-1] == form.d:
                    yield pytest.param(name, form, shape, id=f"{name}-{form.label}-{shape[0]}")


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "form", "shape"), list(_real_sizes()))
def test_sampled_rows_at_real_sizes(name: str, form: Form, shape: Any) -> None:
    if torch.cuda.get_device_capability() != (9, 0) and name != "portable":
        pytest.skip("needs compute capability 9.0")
    q, k, v, mask, bias = real_problem(form, shape, "cuda")
    out, lse = attention(q, k, v, mask, key_bias=bias, backend=name)
    found = canary.compare(out, lse, q, k, v, Rows.of(mask), form.d**-0.5, bias)
    assert all(x.ok for x in found), found


def real_problem(form: Form, shape: Any, device: str) -> tuple[Any, ...]:
    """q, k, v, mask and bias of two heads; windows are those of neighborhood attention."""
    label, grid, text, _, d = shape
    mask = None
    if form.window:
        layout = TokenLayout.of(VideoGrid(*grid), text, form.block)
        # Causal ones of every second token are cut off where the others begin.
        apart: Any = {"dilation": (1, 1, 2), "causal": (False, False, True)} if form.window == 2 else {}
        mask = Neighborhood(block=form.block, **apart).plan(layout, 0.1, Site("attn1", 0, "self", "wan")).mask
        assert mask is not None
        assert (mask.block_map() == 1).any()
    q, k, v, mask = bench.Case(label, grid, text, 2, d, form.block, 0.1, "bfloat16").tensors(device, mask)
    generator = torch.Generator(device).manual_seed(1)
    bias = torch.randn(1, 2, k.shape[1], generator=generator, device=device) if form.bias else None
    return q, k, v, mask, bias


@pytest.mark.gpu
@pytest.mark.parametrize(("d", "block"), gluon.CONFIGS)
@pytest.mark.parametrize("name", FORMS)
def test_compute_sanitizer_finds_nothing(name: str, d: int, block: int) -> None:
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not on the path; it comes with CUDA")
    if torch.cuda.get_device_capability() != (9, 0) and name != "portable":
        pytest.skip("needs compute capability 9.0")
    command = [sys.executable, "kernels/bench/sanitize.py", "--tools", "memcheck", "--backends", name]
    command += ["--dims", str(d), "--blocks", str(block)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
