"""`vidaccel compare`: a page from videos, whoever made them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import Result

from vidaccel.render import video

CALL = {"step": 0, "sparse_layers": 1, "dense_layers": 1, "ms": 1.0}
REPORT = {"schema": 1, "calls": [CALL], "summary": {"transformer_ms": 1.0}}


@pytest.fixture
def clips(tmp_path: Path) -> Any:
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
    for name, clip in (("dense", frames), ("sparse", frames), ("short", frames[:3])):
        video.write(tmp_path / f"{name}.mp4", clip, 8, {"vidaccel": 1, "job": {"prompt": name}})
    folder = tmp_path / "sparse-report"
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(REPORT))


@pytest.fixture
def runs(tmp_path: Path) -> Any:
    """Two runs of three prompts, one of which the second lacks; one prompt is of the sample world."""
    for n, prompt in enumerate(("a red circle moves right", "two", "three")):
        frames = np.random.default_rng(n).integers(0, 256, (5, 256, 256, 3), dtype=np.uint8)
        for name, clip in (("dense", frames), ("sparse", frames // 2)):
            if (name, n) != ("sparse", 2):
                (tmp_path / name).mkdir(exist_ok=True)
                # Names differ: prompts and seeds say what belongs together.
                record = {"vidaccel": 1, "job": {"prompt": prompt, "seed": 7}}
                video.write(tmp_path / name / f"{name}-{n}.mp4", clip, 8, record)


@pytest.mark.usefixtures("clips")
def test_a_page(invoke: Callable[..., Result], tmp_path: Path) -> None:
    result = invoke("compare", "dense.mp4", "sparse.mp4", "-o", "new/page.html")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "new" / "page.html").read_text()
    assert "vidaccel rerun sparse.mp4" in page
    assert "vidaccel compare dense.mp4 sparse.mp4 -o new/page.html" in page
    assert 'data-per="step"' in page
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["page.html"]


@pytest.mark.usefixtures("clips")
def test_json(invoke: Callable[..., Result]) -> None:
    found = json.loads(invoke("compare", "dense.mp4", "sparse.mp4", "--format", "json").stdout)
    assert found["videos"]["sparse"]["mean"]["psnr_db"] == 100
    assert (found["scenes"][0]["fps"], found["scenes"][0]["frames"]) == (8, 5)
    assert found["runs"]["sparse"]["ms"] == 1


@pytest.mark.usefixtures("runs")
def test_folders_are_paired_by_prompt_and_seed(invoke: Callable[..., Result], tmp_path: Path) -> None:
    result = invoke("compare", "dense", "sparse", "--format", "json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [scene["name"] for scene in found["scenes"]] == ["a red circle moves right, seed 7", "two, seed 7"]
    assert found["videos"]["sparse"]["scenes"] == 2
    low, high = found["videos"]["sparse"]["interval"]["psnr_db"]
    assert low < found["videos"]["sparse"]["mean"]["psnr_db"] < high
    # Noise shows no red circle; nobody can tell whether it shows "two".
    assert found["runs"]["sparse"]["right"]["right"] == 0
    assert found["runs"]["sparse"]["right"]["of"] == 1
    assert "not in every folder: 1 of 3" in result.stderr
    assert (tmp_path / "compare.html").read_text().count("data:video/mp4;base64,") == 4


@pytest.mark.usefixtures("runs", "clips")
@pytest.mark.parametrize(
    ("given", "status", "words"),
    [(("dense", "dense.mp4"), 2, "and dense.mp4 is not"), (("dense", "empty"), 1, "empty holds no .mp4")],
)
def test_folders_that_cannot_be_compared(
    invoke: Callable[..., Result], failed: Callable[..., None], tmp_path: Path, given: Any, status: int, words: str
) -> None:
    (tmp_path / "empty").mkdir()
    failed(invoke("compare", *given), status, words)


@pytest.mark.usefixtures("runs")
def test_a_run_has_one_video_of_a_prompt(
    invoke: Callable[..., Result], failed: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "sparse" / "again.mp4").write_bytes((tmp_path / "sparse" / "sparse-1.mp4").read_bytes())
    failed(invoke("compare", "dense", "sparse"), 1, "holds 2 videos of 'two, seed 7'")


@pytest.mark.usefixtures("clips")
@pytest.mark.parametrize("report", ["{", "[]", '{"schema": 9}', json.dumps({**REPORT, "calls": [{}]})])
def test_reports_of_anybody_are_left_out(invoke: Callable[..., Result], tmp_path: Path, report: str) -> None:
    (tmp_path / "sparse-report" / "report.json").write_text(report)
    assert invoke("compare", "dense.mp4", "sparse.mp4").exit_code == 0
    assert 'data-per="step"' not in (tmp_path / "compare.html").read_text()


@pytest.mark.usefixtures("clips")
def test_what_cannot_be_compared(invoke: Callable[..., Result], failed: Callable[..., None]) -> None:
    failed(invoke("compare", "dense.mp4"), 2, "two or more")
    failed(invoke("compare", "dense.mp4", "short.mp4"), 1, "must agree")
    failed(invoke("compare", "dense.mp4", "none.mp4"), 2, "none.mp4", "no such file")
    failed(invoke("compare", "dense.mp4", "dense.mp4"), 1, "same name")
    failed(invoke("compare", "dense.mp4", "sparse.mp4", "-o", "sparse-report"), 1, "sparse-report", "is a folder")


@pytest.mark.usefixtures("runs")
def test_folders_of_one_name_are_told_apart(
    invoke: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "dense")
    result = invoke("compare", ".", "../dense", "--format", "json")
    assert result.exit_code == 0, result.output
    assert list(json.loads(result.stdout)["runs"]) == [".", "../dense"]


@pytest.mark.skipif(sys.platform != "linux", reason="names elsewhere are always text")
@pytest.mark.usefixtures("clips")
def test_names_that_are_no_text(invoke: Callable[..., Result], tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.mp4")
    (tmp_path / name).write_bytes((tmp_path / "sparse.mp4").read_bytes())
    result = invoke("compare", "dense.mp4", name)
    assert result.exit_code == 0, result.output
    assert "vidaccel compare dense.mp4" in (tmp_path / "compare.html").read_text(encoding="utf-8")


def test_one_report_among_several_videos_is_not_every_ones(invoke: Callable[..., Result], tmp_path: Path) -> None:
    for name in ("dense", "sparse"):
        record = {"vidaccel": 1, "job": {"prompt": "a"}, "recipe_hash": name}
        video.write(tmp_path / f"{name}.mp4", np.zeros((5, 32, 48, 3), np.uint8), 8, record)
    (tmp_path / "report.json").write_text(json.dumps({**REPORT, "recipe_hash": "sparse"}))
    found = json.loads(invoke("compare", "dense.mp4", "sparse.mp4", "--format", "json").stdout)
    assert {name: run["ms"] for name, run in found["runs"].items()} == {"dense": None, "sparse": 1}
