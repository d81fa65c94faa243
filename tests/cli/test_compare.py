"""`vidaccel compare`: a page from videos, whoever made them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import Result

from vidaccel.render import video


@pytest.fixture
def clips(tmp_path: Path) -> Any:
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
    for name, clip in (("dense", frames), ("sparse", frames), ("short", frames[:3])):
        video.write(tmp_path / f"{name}.mp4", clip, 8, {"vidaccel": 1, "job": {"prompt": name}})
    folder = tmp_path / "sparse-report"
    folder.mkdir()
    call = {"step": 0, "sparse_layers": 1, "dense_layers": 1, "ms": 1.0}
    (folder / "report.json").write_text(json.dumps({"schema": 1, "calls": [call]}))


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
    assert (found["fps"], found["frames"]) == (8, 5)


@pytest.mark.usefixtures("clips")
def test_what_cannot_be_compared(invoke: Callable[..., Result], failed: Callable[..., None]) -> None:
    failed(invoke("compare", "dense.mp4"), 2, "two or more")
    failed(invoke("compare", "dense.mp4", "short.mp4"), 1, "must agree")
    failed(invoke("compare", "dense.mp4", "none.mp4"), 1, "none.mp4")
    failed(invoke("compare", "dense.mp4", "dense.mp4"), 1, "same name")
