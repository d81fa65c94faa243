"""Reports: counts that add up, three pages, nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import vidaccel
from vidaccel.patterns import Radial
from vidaccel.schedule import Schedule


@pytest.fixture
def report(wan: Any, render: Any) -> Any:
    with vidaccel.accelerate(
        wan, Radial(block=16), density=0.4, schedule=Schedule(dense_steps=2, dense_layers=1)
    ) as run:
        render(wan)
    return run.report()


def test_summary_adds_up(report: Any) -> None:
    summary = report.summary
    assert (summary["calls"], summary["steps"]) == (8, 4)
    assert summary["sparse_layer_calls"] == 2 * 2 * 2
    assert summary["dense_layer_calls"] == 8 * 3 - 8
    assert sum(summary["kernels"].values()) == 8
    delivered = report.data["plans"][0]["delivered"]
    assert summary["delivered_density"] == pytest.approx(delivered)
    assert summary["effective_density"] == pytest.approx((8 * delivered + 16) / 24)
    assert summary["transformer_ms"] == pytest.approx(sum(call["ms"] for call in report.data["calls"]))


def test_pages_hold_the_same(report: Any, tmp_path: Path) -> None:
    report.save(tmp_path / "new")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["report.html", "report.json", "report.md"]
    data = json.loads((tmp_path / "new" / "report.json").read_text())
    assert data == json.loads(json.dumps(report.data))
    assert data["schema"] == 1
    markdown = (tmp_path / "new" / "report.md").read_text()
    page = (tmp_path / "new" / "report.html").read_text()
    for text in (markdown, page):
        assert data["recipe_hash"] in text
        assert "7x8x8" in text
        assert data["plans"][0]["rule"] in text


def test_html_escapes(report: Any) -> None:
    report.data["notes"].append("<script>alert(1)</script>")
    assert "<script>alert" not in report.to_html()


def test_a_failed_save_leaves_nothing(report: Any, tmp_path: Path) -> None:
    (tmp_path / "report.md").mkdir()
    with pytest.raises(OSError, match=r"report\.md"):
        report.save(tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


def test_an_unused_acceleration_reports_nothing(wan: Any) -> None:
    run = vidaccel.accelerate(wan, "radial", density=0.4)
    run.remove()
    assert run.report().summary["calls"] == 0
    assert "Summary" in run.report().to_markdown()
