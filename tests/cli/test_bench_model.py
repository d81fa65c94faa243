"""`vidaccel bench model`, in this process, on a model small enough for a CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

SMALL = ("bench", "model", "-m", "wan-tiny", "--height", 64, "--width", 64, "--frames", 17, "--layers", 1)
QUICK = (*SMALL, "--repeats", 1, "--device", "cpu")


def test_one_row_each(invoke: Callable[..., Result], tmp_path: Path) -> None:
    result = invoke(*QUICK, "-a", "radial,dense", "-d", "0.5", "--whole", "--steps", 4, "-o", "rows.json")
    assert result.exit_code == 0, result.output
    assert "trajectory 1 of 4 steps: how eager, x dense" in result.stderr
    assert "video s" in result.stderr
    record = json.loads((tmp_path / "rows.json").read_text())
    assert (record["schema"], record["what"]) == (1, "model")
    assert record["device"]["cpu"]
    kinds = [(row["kind"], row["variant"]) for row in record["rows"]]
    assert kinds[:3] == [("dense", "torch's choice"), ("sparse", "radial 0.5"), ("sparse", "dense 0.5")]
    assert [kind for kind, _ in kinds[3:]] == ["trajectory"] * 3
    assert "radial 0.5" in result.stdout
    again = invoke(*QUICK, "-a", "radial,dense", "-d", "0.5", "--whole", "--steps", 4, "-o", "rows.json")
    assert again.stderr == ""
    assert json.loads((tmp_path / "rows.json").read_text()) == record


def test_peers_have_rows_too(invoke: Callable[..., Result]) -> None:
    result = invoke(*QUICK, "--peers", "cache-dit,sparsevideo,fastvideo-sta", "--format", "json")
    rows = [row for row in json.loads(result.stdout)["rows"] if row["kind"] == "peer"]
    assert [row["ok"] for row in rows] == [False] * 3
    for row, words in zip(rows, ("bench render", "bench render", "fastvideo_kernel"), strict=True):
        assert words in row["reason"]


def test_json_on_stdout(invoke: Callable[..., Result]) -> None:
    result = invoke(*QUICK, "--format", "json")
    assert json.loads(result.stdout)["rows"][0]["kind"] == "dense"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-m", "sora"), ("sora", "wan2.1-14b")),
        ((*QUICK[2:], "-d", "1.5"), ("1.5", "(0, 1]")),
        ((*QUICK[2:], "-d", "x"), ("'x'", "0.25")),
        ((*QUICK[2:], "-a", "nosuch"), ("nosuch", "radial")),
        ((*QUICK[2:], "--frames", 0), ("--frames",)),
        ((*QUICK[2:], "--computed", 3), ("--computed 3", "--steps")),
        ((*QUICK[2:], "--steps", 4, "--computed", 5), ("--computed 5", "1 to 4")),
        ((*QUICK[2:], "--height", 65), ("65", "multiples of 16")),
        (("-m", "hunyuan-video", "--no-guidance"), ("hunyuan-video", "one call a step")),
        ((*QUICK[2:], "-o", "no/such/rows.json"), ("no/such",)),
        ((*QUICK[2:], "--dtype", "int8"), ("int8", "bfloat16")),
        ((*QUICK[2:], "--dense", "flash9"), ("flash9", "torch's choice")),
    ],
)
def test_bad_usage(
    invoke: Callable[..., Result], failed: Callable[..., None], arguments: tuple[object, ...], words: tuple[str, ...]
) -> None:
    failed(invoke("bench", "model", *arguments), 2, *words)
