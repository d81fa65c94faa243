"""The kernels around attention as a whole: compiled for a GPU that is not here, and their benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")

from vidaccel.cli.bench import app
from vidaccel.kernels import bench_around, elementwise
from vidaccel.kernels.bench_around import Shape

ROOT = Path(__file__).parents[2]
TINY = (Shape("tiny", (1, 4, 8), 2, 16, "rms", text=5, text_first=True, block=16),)


@pytest.mark.slow
def test_sm_90() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "kernels/bench/compile_around.py", "sm_90"],
        cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kernel"] for row in rows} >= {
        "count_digits", "count_rows", "error_sums", "keep_best", "mean_of_block", "to_kernel", "to_model",
        "weighted_sum", "with_means",
    }  # fmt: skip
    for row in rows:
        assert row["stack"] == 0, row
        assert "STL" not in row, row
        assert row["shared"] <= 8192, row
        # A quarter of a multiprocessor at most: four programs hide each other's waits.
        assert row["registers"] * 32 * row["warps"] <= 65536 // 4, row
        if row.get("shape") == "one block":
            continue
        if row["kernel"] in ("to_kernel", "to_model", "mean_of_block", "weighted_sum", "error_sums", "with_means"):
            # What only moves memory moves 16 bytes a thread and instruction.
            assert row["LDG.E.128"] >= 1, row
        if row["kernel"] in ("to_kernel", "to_model", "weighted_sum", "with_means"):
            assert row["STG.E.128"] >= 1, row


def assert_all_right(rows: list[dict[str, object]]) -> None:
    assert {row["work"] for row in rows} >= {
        "best blocks", "block means of q", "error of order 3", "forecast of order 1", "likeliest blocks",
        "mask from q and k", "norm, RoPE, to kernel order", "to model order",
    }  # fmt: skip
    for row in rows:
        assert row["ok"], row
        assert isinstance(row["ms"], float)
        assert row["ratio"] > 0
        json.dumps(row)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the test marked gpu runs compiled kernels")
def test_benchmark() -> None:
    rows = list(bench_around.run("cpu", TINY, repeats=1))
    assert_all_right(rows)


@pytest.mark.gpu
def test_benchmark_on_gpu() -> None:
    assert_all_right(list(bench_around.run("cuda", TINY, repeats=3)))
    rows = list(bench_around.run("cuda", bench_around.SHAPES[2:], repeats=3))
    assert all(row["ok"] for row in rows), rows


def test_no_figure_for_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    right = elementwise.to_kernel

    def wrong(*args: object) -> elementwise.Heads:
        q, k, v = right(*args)  # type: ignore[arg-type]
        return q * 1.5, k, v

    monkeypatch.setattr(elementwise, "to_kernel", wrong)
    rows = {row["work"]: row for row in bench_around.run(device, TINY, repeats=1)}
    assert not rows["norm, RoPE, to kernel order"]["ok"]
    assert "ms" not in rows["norm, RoPE, to kernel order"]
    assert rows["to model order"]["ok"]


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU it says so; what is measured is written, and not measured again."""
    if torch.cuda.is_available():
        pytest.skip("here it would measure")
    path = tmp_path / "around.json"
    refused = CliRunner().invoke(app, ["around", "-o", str(path)])
    assert refused.exit_code != 0
    monkeypatch.setattr("vidaccel.cli.bench._place", lambda *_: "cpu")
    monkeypatch.setattr(bench_around, "SHAPES", TINY)
    done = CliRunner().invoke(app, ["around", "-o", str(path)])
    assert done.exit_code == 0, done.output
    rows = json.loads(path.read_text())["rows"]
    assert_all_right([row | {"ratio": row["ratio"] or 1} for row in rows])
    monkeypatch.setattr(bench_around, "run", lambda place, shapes: iter(()) if not shapes else pytest.fail("again"))
    again = CliRunner().invoke(app, ["around", "-o", str(path), "--format", "json"])
    assert json.loads(again.stdout)["rows"] == rows
