"""`run.report(frames, against=...)`: what was lost stands beside what was gained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vidaccel
from vidaccel.errors import VideoError
from vidaccel.patterns import Radial, TopK


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
        assert "PSNR, dB" in text
        assert "radial 0.4 on WanPipeline" in text
    page = (tmp_path / "report.html").read_text()
    assert page.count('data-per="step"') == 2  # No cache, so no gate.
    assert page.count("data:video/mp4;base64,") == 2
    assert "layer 2, step 0 to 3: 0." in page
    assert "Quality" not in run.report().to_markdown()


def test_orders_are_told_in_words(wan: Any, render: Any) -> None:
    with vidaccel.accelerate(wan, TopK(block=16), density=0.4, schedule=vidaccel.Schedule(even_if_slower=True)) as run:
        render(wan, "ragged", steps=1)
    report = run.report()
    assert [tuple(plan["tile"]) for plan in report.data["plans"]] == [(1, 4, 0)]
    assert "rods (1, 4)" in report.to_markdown()
    assert "(1, 4, 0)" not in report.to_markdown()


def test_both_or_none(wan: Any) -> None:
    run = vidaccel.accelerate(wan, "radial", density=0.4)
    run.remove()
    with pytest.raises(VideoError, match="no reference was given"):
        run.report(np.zeros((5, 16, 16, 3)))
    with pytest.raises(VideoError, match="no video was given"):
        run.report(against=np.zeros((5, 16, 16, 3)))


def test_what_the_page_says_makes_the_same_recipe(wan: Any) -> None:
    run = vidaccel.accelerate(wan, Radial(block=16), density=0.4, schedule=vidaccel.Schedule(branch={"uncond": 0.3}))
    run.remove()
    text = run.report().to_markdown().partition("```python\n")[2].partition("\n```")[0]
    recipe = eval(text.removeprefix("vidaccel.accelerate(pipe, recipe=").removesuffix(")"), {"vidaccel": vidaccel})
    assert recipe == run.recipe
