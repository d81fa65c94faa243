"""`run.report(frames, against=...)`: what was lost stands beside what was gained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vidaccel
from vidaccel.errors import VideoError
from vidaccel.patterns import Radial


def test_quality_in_json_markdown_and_html(wan: Any, render: Any, tmp_path: Path) -> None:
    with vidaccel.accelerate(wan, Radial(block=16), density=0.4, schedule=vidaccel.Schedule()) as run:
        render(wan)
    reference = np.random.default_rng(0).random((5, 16, 16, 3))
    video = np.clip(reference + 0.02, 0, 1)
    report = run.report(video, against=reference)
    report.save(tmp_path)
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["quality"]["mean"]["psnr_db"] == pytest.approx(-20 * np.log10(0.02), abs=0.5)
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "Quality against the reference" in text
        assert "psnr db" in text
    assert (tmp_path / "report.html").read_text().count('data-per="step"') == 2  # No cache, so no gate.
    assert "Quality" not in run.report().to_markdown()


def test_both_or_none(wan: Any) -> None:
    run = vidaccel.accelerate(wan, "radial", density=0.4)
    run.remove()
    with pytest.raises(VideoError, match="shape"):
        run.report(np.zeros((5, 16, 16, 3)))
