"""Reports: counts that add up, three pages, nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import vidaccel
from vidaccel.patterns import Radial, TopK
from vidaccel.schedule import Schedule

ROOT = Path(__file__).parents[2]


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
    assert report.data["sites"] == [f"blocks.{n}.attn1.processor" for n in range(3)]
    layers = [call["layer_density"] for call in report.data["calls"]]
    assert layers == [[1.0] * 3] * 4 + [[1.0, round(delivered, 4), round(delivered, 4)]] * 4
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


def test_reports_fit_their_schema(report: Any, wan: Any, render: Any) -> None:
    schema = json.loads((ROOT / "vidaccel" / "report" / "report.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    cached = vidaccel.accelerate(wan, TopK(block=16), density=0.5, cache="taylorseer", schedule=Schedule())
    with cached:
        render(wan, steps=12)
    video = np.zeros((5, 16, 16, 3))
    reports = [
        report,
        report.with_seconds({"denoise": 2.0, "decode": 1.0, "total": 4.0}),
        cached.report(video, against=video),
    ]
    for each in reports:
        jsonschema.validate(json.loads(each.to_json()), schema)
    assert any(None in call["layer_density"] for call in reports[2].data["calls"] if call["forecast"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**report.data, "schema": 2}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**report.data, "unheard_of": 0}, schema)


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
