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
from vidaccel.errors import UsageError
from vidaccel.kernels import bench, bench_rivals
from vidaccel.lab import kernel_cases, tables
from vidaccel.lab.kernel_figures import by_kernel

SMALL = bench.Case("small", (3, 5, 7), 9, 2, 16, 16, 0.5, "float32")
MEASURED = {"error", "ms"}


def test_a_row_is_a_case_with_what_was_measured_of_each_kernel() -> None:
    (row,) = bench.run("cpu", [(SMALL, None)], repeats=2)
    fields = {field.name for field in dataclasses.fields(SMALL)}
    assert set(row) == {"key", "tokens", "visited", "touched", "kernels"} | fields
    assert (row["key"], row["tokens"]) == (SMALL.title, 114)
    assert list(row["kernels"]) == ["dense", "cpu"]
    for found in row["kernels"].values():
        assert set(found) == MEASURED
        assert found["ms"] > 0
        assert found["error"] <= 1


def test_what_follows_is_computed_from_a_row() -> None:
    right = {"error": 0.1}
    kernels = {
        "dense a": {**right, "ms": 8.0},
        "dense b": {**right, "ms": 4.0},
        "dense c": {"reason": "out is wrong", **right},
        "ours": {**right, "ms": 2.0},
        "theirs": {"reason": "no kernel for this"},
    }
    case = {"key": "k", "heads": 3, "d": 64, "tokens": 1000, "touched": 0.25, "commit": "abc", "kernels": kernels}
    rows = {row["kernel"]: row for row in by_kernel([case])}
    assert list(rows) == list(kernels)
    # Two products of a multiplication and an addition for each channel of each of 3 x 1000 x 1000 pairs.
    assert rows["dense b"]["tflops"] == pytest.approx(2 * 2 * 64 * 3e6 / 4e-3 / 1e12)
    assert rows["ours"]["tflops"] == pytest.approx(rows["dense b"]["tflops"] / 2)
    assert {name: (row.get("ratio"), row.get("of_dense")) for name, row in rows.items()} == {
        "dense a": (0.5, 0.5),
        "dense b": (1.0, 1.0),
        "dense c": (None, None),
        "ours": (2.0, 0.5),
        "theirs": (None, None),
    }
    assert {name for name, row in rows.items() if not row["ok"]} == {"dense c", "theirs"}
    assert rows["ours"]["commit"] == "abc"
    assert rows["theirs"]["key"] == "k, theirs"
    # Without a dense kernel that is right there is nothing to compare with.
    (alone,) = by_kernel([case | {"kernels": {"ours": kernels["ours"]}}])
    assert alone["tflops"] == rows["ours"]["tflops"]
    assert not {"ratio", "of_dense"} & set(alone)


def test_the_dense_ones_are_named_so() -> None:
    assert {rival.name: rival.problem[3] is None for rival in bench_rivals.rivals(*SMALL.tensors("cpu"))} == {
        "dense": True,
        "cpu": False,
    }


def test_a_wrong_kernel_gets_no_figure() -> None:
    q, k, v, mask = SMALL.tensors("cpu")
    _, sparse = bench_rivals.rivals(q, k, v, mask)
    out, lse = sparse.call()
    found = bench._check(bench_rivals.Rival("wrong", lambda: (out * 1.5, lse), sparse.problem))
    assert found["reason"] == "out is wrong"
    assert found["error"] > 1

    def broken() -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("no kernel for this\nand a long trace")

    assert bench._check(bench_rivals.Rival("broken", broken, sparse.problem)) == {"reason": "no kernel for this"}

    def foreign() -> tuple[torch.Tensor, torch.Tensor]:
        raise ImportError

    # Whatever another project raises is written down, and not the end of the run.
    assert bench._check(bench_rivals.Rival("foreign", foreign, sparse.problem)) == {"reason": "ImportError"}


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
    (row,) = bench.run("cpu", [(case, mask)], repeats=1)
    assert set(row["kernels"]["cpu"]) == MEASURED
    assert row["touched"] < 1
    # Tiles of 240 tokens a frame have holes here; without them both are one.
    assert row["touched"] <= row["visited"]
    assert row["visited"] == pytest.approx(int(mask.ptr[-1]) * 64**2 / mask.heads / row["tokens"] ** 2)
    assert abs(mask.density - 0.4) < 0.15


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cases, "cases", lambda device: [SMALL])
    path = tmp_path / "out.json"
    done = CliRunner().invoke(app, ["kernels", "--repeats", "1", "--format", "json", "-o", str(path)])
    assert done.exit_code == 0, done.output
    record: dict[str, Any] = json.loads(path.read_text())
    assert record == json.loads(done.stdout)
    assert {"versions", "device", "absent", "rows"} <= set(record)
    assert record["schema"] == 2
    assert [(row["key"], list(row["kernels"])) for row in record["rows"]] == [(SMALL.title, ["dense", "cpu"])]
    # What is there is not measured again, and more can be added to it.
    other = dataclasses.replace(SMALL, density=0.25)
    monkeypatch.setattr(kernel_cases, "cases", lambda device: [SMALL, other])
    more = CliRunner().invoke(app, ["kernels", "--repeats", "1", "-o", str(path)])
    assert more.exit_code == 0, more.output
    grown = json.loads(path.read_text())["rows"]
    assert grown[:1] == record["rows"]
    assert [row["key"] for row in grown] == [SMALL.title, other.title]
    one = CliRunner().invoke(app, ["kernels", "--repeats", "1", "--only", "random 0.25", "--format", "json"])
    assert {row["density"] for row in json.loads(one.stdout)["rows"]} == {other.density}
    none = CliRunner().invoke(app, ["kernels", "--only", "Wan 8k"])
    assert none.exit_code != 0
    human = CliRunner().invoke(app, ["kernels", "--repeats", "1"])
    assert "x dense" in human.stdout
    quiet = CliRunner().invoke(app, ["kernels", "-o", str(path), "--format", "quiet"])
    assert (quiet.stdout.split(), quiet.stderr) == (["dense", "cpu"] * 2, "")


def test_a_record_of_the_earlier_form_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    row = {"key": f"{SMALL.title}, cpu", "kernel": "cpu", "ok": True, "ms": 1.0, "commit": None}
    path.write_text(json.dumps({**bench.about(), "schema": 1, "what": "kernels", "absent": {}, "rows": [row]}))
    refused = CliRunner().invoke(app, ["kernels", "--device", "cpu", "-o", str(path)])
    assert isinstance(refused.exception, UsageError)
    assert "another schema (1), this is 2" in str(refused.exception)
    with pytest.raises(UsageError, match="is no record"):
        tables.table("out.json rates", tmp_path)


def test_an_interrupted_run_goes_on_with_the_case_it_was_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [dataclasses.replace(SMALL, density=density) for density in (0.5, 0.25, 0.1)]
    monkeypatch.setattr(kernel_cases, "cases", lambda device: cases)
    path, measured, honest = tmp_path / "out.json", [], bench.interleaved

    def interrupted(*given: Any) -> dict[str, list[float]]:
        measured.append(given)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return honest(*given)

    monkeypatch.setattr(bench, "interleaved", interrupted)
    command = ["kernels", "--device", "cpu", "--repeats", "1", "-o", str(path)]
    assert CliRunner().invoke(app, command).exit_code != 0
    first = json.loads(path.read_text())["rows"]
    assert [row["key"] for row in first] == [cases[0].title]
    assert CliRunner().invoke(app, command).exit_code == 0
    rows = json.loads(path.read_text())["rows"]
    assert rows[:1] == first
    assert [row["key"] for row in rows] == [case.title for case in cases]
    assert all(set(found) == MEASURED for row in rows for found in row["kernels"].values())
    # One before the interruption, one in it, and the two that were left.
    assert len(measured) == 4
    assert CliRunner().invoke(app, command).exit_code == 0
    assert len(measured) == 4


@pytest.mark.parametrize(("red", "status"), [("theirs", 0), ("cpu", 1)])
def test_a_red_kernel_shows_its_reason_and_no_figure(
    red: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the record, on the screen and in tables; the others of its case have theirs. Ours is a failure of the run."""

    def with_a_wrong_one(*given: Any) -> list[bench_rivals.Rival]:
        dense, sparse = bench_rivals.rivals(*given)
        out, lse = sparse.call()
        wrong = bench_rivals.Rival(red, lambda: (out * 1.5, lse), sparse.problem)
        return [dense, *([sparse] if red != sparse.name else []), wrong]

    monkeypatch.setattr(kernel_cases, "cases", lambda device: [SMALL])
    monkeypatch.setattr(bench, "rivals", with_a_wrong_one)
    path = tmp_path / "out.json"
    done = CliRunner().invoke(app, ["kernels", "--device", "cpu", "--repeats", "1", "-o", str(path)])
    assert done.exit_code == status, done.output
    (row,) = json.loads(path.read_text())["rows"]
    assert set(row["kernels"][red]) == {"error", "reason"}
    assert all(set(found) == MEASURED for name, found in row["kernels"].items() if name != red)
    assert f"{SMALL.title}, {red}: no figure: out is wrong" in done.stderr
    assert "out is wrong" in done.stdout
    (line,) = (line for line in tables.table("out.json kernels", tmp_path).splitlines() if f"| {red} |" in line)
    assert line.endswith(f"| {red} |  |  | no figure: out is wrong |")
    assert "| dense |" in tables.table("out.json kernels kernel=dense", tmp_path)
    quiet = CliRunner().invoke(app, ["kernels", "--device", "cpu", "-o", str(path), "--format", "quiet"])
    assert quiet.exit_code == status
    assert quiet.stdout.split() == [name for name in row["kernels"] if name != red]


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
    said = bench._check(found[name])
    assert "reason" not in said, said["reason"]
