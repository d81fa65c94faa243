"""`vidaccel calibrate`, and what it is for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VIDACCEL_HOME", str(tmp_path / "home"))


def test_goals_work_after_a_calibration(invoke: Callable[..., Result], wan: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    options = ("--prompts", "prompts.txt", "--steps", 12, "--thresholds", "5,0.0001", "--format", "json")
    result = invoke("calibrate", "-m", wan, *options)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [point["threshold"] for point in found["points"]] == [0, 0.0001, 5]
    assert found["points"][-1]["speedup"] > 1.3
    assert Path(found["file"]).is_file()
    video = invoke("render", "-m", wan, "-p", "a cat", "--steps", 12, "--cache", "auto:1.2x", "--dry-run")
    assert video.exit_code == 0, video.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("calibrate", "--cache", "taylorseer"), "cg-taylor"),
        (("calibrate", "--thresholds", "x"), "0.1,0.2,0.4"),
        (("calibrate", "--thresholds", "0"), "above 0"),
        (("render", "-p", "x", "--cache", "auto:2x", "--dry-run"), "vidaccel calibrate"),
    ],
)
def test_bad_usage(
    invoke: Callable[..., Result], failed: Callable[..., None], wan: Path, arguments: tuple[str, ...], words: str
) -> None:
    failed(invoke(*arguments, "-m", wan), 2, words)
