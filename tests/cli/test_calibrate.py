"""`vidaccel calibrate`, and what it is for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from vidaccel.cli import batch


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VIDACCEL_HOME", str(tmp_path / "home"))


def test_goals_work_after_a_calibration(invoke: Callable[..., Result], wan: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    options = ("--prompts", "prompts.txt", "--steps", 12, "--thresholds", "5,0.0001", "--format", "json")
    result = invoke("calibrate", "-m", wan, *options)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    made = [(point["cache"], point["knob"], point["value"]) for point in found["points"]]
    assert made[:3] == [("cg-taylor", "threshold", value) for value in (0, 0.0001, 5)]
    assert made[3:] == [("placed", "share", value) for value in (0.67, 0.5, 0.34, 0.25, 0.17)]
    speeds = [point["speedup"] for point in found["points"]]
    assert speeds[2] > 1.3
    assert speeds[3:] == [12 / computed for computed in (8, 6, 4, 3, 2)]
    assert Path(found["file"]).is_file()
    video = invoke("render", "-m", wan, "-p", "a cat", "--steps", 12, "--cache", "auto:1.2x", "--dry-run")
    assert video.exit_code == 0, video.output


def test_what_forecasts_nothing_is_left_out(invoke: Callable[..., Result], wan: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    options = ("--prompts", "prompts.txt", "--steps", 6, "--thresholds", "1e-9", "--format", "json")
    result = invoke("calibrate", "-m", wan, "--cache", "placed,cg-taylor", *options)
    assert result.exit_code == 0, result.output
    assert {point["cache"] for point in json.loads(result.stdout)["points"]} == {"placed"}
    assert "cg-taylor forecast none of 6 steps up to threshold 1e-09, so it is left out" in result.stderr
    alone = invoke("calibrate", "-m", wan, "--cache", "cg-taylor", *options)
    assert alone.exit_code == 2
    assert "forecast none of 6 steps up to threshold 1e-09; try bolder ones" in alone.stderr


def test_an_interruption_keeps_whole_curves(
    invoke: Callable[..., Result], wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    render = batch.render_with_progress

    def stopped(screen: Any, pipe: Any, job: Any, about: str) -> Any:
        if about == "cg-taylor, threshold 5":
            raise KeyboardInterrupt
        return render(screen, pipe, job, about)

    monkeypatch.setattr(batch, "render_with_progress", stopped)
    options = ("--prompts", "prompts.txt", "--steps", 6, "--thresholds", "0.1,5", "--cache", "placed,cg-taylor")
    assert invoke("calibrate", "-m", wan, *options).exit_code != 0
    monkeypatch.undo()
    monkeypatch.setenv("VIDACCEL_HOME", str(tmp_path / "home"))
    kept = json.loads(next((tmp_path / "home").rglob("*.json")).read_text())
    assert [(curve["cache"], len(curve["points"])) for curve in kept["curves"]] == [("placed", 5)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("calibrate", "--cache", "placed,taylorseer"), "'taylorseer' has nothing to calibrate"),
        (("calibrate", "--thresholds", "x"), "0.1,0.2,0.4"),
        (("calibrate", "--thresholds", "0"), "above 0"),
        (("calibrate", "--cache", "placed", "--thresholds", "0.1"), "placed computes a share"),
        (("render", "-p", "x", "--cache", "auto:2x", "--dry-run"), "vidaccel calibrate"),
    ],
)
def test_bad_usage(
    invoke: Callable[..., Result], failed: Callable[..., None], wan: Path, arguments: tuple[str, ...], words: str
) -> None:
    failed(invoke(*arguments, "-m", wan), 2, words)
