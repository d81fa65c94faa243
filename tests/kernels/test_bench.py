"""The benchmark: no figure without a green check."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from vidaccel.cli.bench import app
from vidaccel.kernels import bench, bench_rivals
from vidaccel.lab import kernel_cases

SMALL = bench.Case("small", (3, 5, 7), 9, 2, 16, 16, 0.5, "float32")


def test_rows() -> None:
    dense, sparse = bench.run("cpu", [(SMALL, None)], repeats=2)
    assert (dense["kernel"], sparse["kernel"]) == ("dense", "cpu")
    assert dense["tokens"] == sparse["tokens"] == 114
    assert dense["ratio"] == 1.0
    assert sparse["ms"] >= sparse["ms_best"] > 0
    assert sparse["error"] <= sparse["budget"]


def test_a_wrong_kernel_gets_no_figure() -> None:
    q, k, v, mask = SMALL.tensors("cpu")
    _, sparse = bench_rivals.rivals(q, k, v, mask)
    out, lse = sparse.call()
    row = bench._check(bench_rivals.Rival("wrong", lambda: (out * 1.5, lse), sparse.problem))
    assert not row["ok"]
    assert row["reason"] == "out is wrong"

    def broken() -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("no kernel for this\nand a long trace")

    row = bench._check(bench_rivals.Rival("broken", broken, sparse.problem))
    assert (row["ok"], row["reason"]) == (False, "no kernel for this")

    def foreign() -> tuple[torch.Tensor, torch.Tensor]:
        raise ImportError

    # Whatever another project raises is a row, and not the end of the run.
    assert bench._check(bench_rivals.Rival("foreign", foreign, sparse.problem))["reason"] == "ImportError"


def test_rivals_that_are_not_installed_are_named() -> None:
    here = {found.metadata["Name"] for found in distributions()}
    absent = bench_rivals.absent()
    assert set(absent) == {name for name, package in bench_rivals.PACKAGES.items() if package not in here}
    assert all(f"pip install {bench_rivals.PACKAGES[name]}" in reason for name, reason in absent.items())


def test_cases_are_the_ones_that_the_readme_names() -> None:
    cpu, cuda = kernel_cases.cases("cpu"), kernel_cases.cases("cuda")
    assert [(c.heads, c.d, c.block, c.density) for c in cpu[:3]] == [(8, 64, 128, x) for x in (0.25, 0.5, 1.0)]
    tokens = {t * y * x + c.text for c in cuda for t, y, x in [c.grid]}
    assert tokens == {32_760, 75_600, 119_056, 17_776}
    assert {c.pattern for c in cuda} == {"random", "radial", "neighborhood", "sliding-window"}


@pytest.mark.parametrize("pattern", kernel_cases.NAMES)
def test_masks_of_patterns(pattern: str) -> None:
    case = dataclasses.replace(SMALL, grid=(4, 12, 20), block=64, density=0.4, pattern=pattern)
    ((_, mask),) = kernel_cases.problems([case])
    assert mask is not None
    _, sparse = bench.run("cpu", [(case, mask)], repeats=1)
    assert sparse["ok"]
    assert sparse["touched"] < 1
    # Tiles of 240 tokens a frame have holes here; without them both are one.
    assert sparse["touched"] <= sparse["visited"]
    assert sparse["visited"] == pytest.approx(int(mask.ptr[-1]) * 64**2 / mask.heads / sparse["tokens"] ** 2)
    assert abs(mask.density - 0.4) < 0.15


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cases, "cases", lambda device: [SMALL])
    path = tmp_path / "out.json"
    done = CliRunner().invoke(app, ["kernels", "--repeats", "1", "--format", "json", "-o", str(path)])
    assert done.exit_code == 0, done.output
    record: dict[str, Any] = json.loads(path.read_text())
    assert record == json.loads(done.stdout)
    assert {"versions", "device", "absent", "rows"} <= set(record)
    assert [row["kernel"] for row in record["rows"]] == ["dense", "cpu"]
    # What is there is not measured again, and more can be added to it.
    other = dataclasses.replace(SMALL, density=0.25)
    monkeypatch.setattr(kernel_cases, "cases", lambda device: [SMALL, other])
    more = CliRunner().invoke(app, ["kernels", "--repeats", "1", "-o", str(path)])
    assert more.exit_code == 0, more.output
    grown = json.loads(path.read_text())["rows"]
    assert grown[:2] == record["rows"]
    assert [row["key"] for row in grown] == [f"{x.title}, {name}" for x in (SMALL, other) for name in ("dense", "cpu")]
    one = CliRunner().invoke(app, ["kernels", "--repeats", "1", "--only", "random 0.25", "--format", "json"])
    assert {row["density"] for row in json.loads(one.stdout)["rows"]} == {other.density}
    none = CliRunner().invoke(app, ["kernels", "--only", "Wan 8k"])
    assert none.exit_code != 0
    human = CliRunner().invoke(app, ["kernels", "--repeats", "1"])
    assert "x dense" in human.stdout


@pytest.mark.gpu
@pytest.mark.parametrize(("d", "block"), [(128, 128), (128, 64), (64, 128), (64, 64)])
@pytest.mark.parametrize("name", ["flex", *bench_rivals.PACKAGES])
def test_gpu_what_rivals_give_is_right(name: str, d: int, block: int) -> None:
    if name in (absent := bench_rivals.absent()):
        pytest.skip(absent[name])
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    torch.compiler.reset()
    # A short block of video before the text, and another at the end.
    case = bench.Case("small", (5, 16, 26), 100, 3, d, block, 0.4, "bfloat16")
    found = {rival.name: rival for rival in bench_rivals.rivals(*case.tensors("cuda"))}
    if name == "fastvideo" and block == 128:
        assert name not in found
        return
    row = bench._check(found[name])
    assert row["ok"], row["reason"]
