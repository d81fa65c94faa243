"""Model cards say what the reports say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from samples.models import path
from samples.train import card, cells, curves
from samples.train.record import Record


def test_a_card_holds_the_numbers_of_training_and_reports(tmp_path: Path) -> None:
    folder = tmp_path / "hunyuan-tiny"
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "weights").write_bytes(bytes(2**20))
    (folder / "defaults.json").write_text(json.dumps({"height": 256, "fps": 16}))
    record = Record(folder / "reports" / "attention.json", {"prompts": 4, "seed": 0, "num_inference_steps": 20})
    seen = {"colour": 4, "shape": 3, "direction": 4, "speed": 2, "texture": 1, "camera": 1, "camera_of": 3}
    answer = seen | {"clips": 4, "computed": 1.0, "right": 3, "right_interval": [0.3, 0.95]}
    record.add(cells.DENSE.name, answer)
    record.add(
        "radial 0.35", answer | {"right_to_dense": [-0.25, -0.5, 0.0], "psnr_to_dense": 24.5, "ssim_to_dense": 0.9}
    )
    record.add("broken 0.35", {"failed": "ValueError: no"})
    (folder / "reports" / "repeat.json").write_text("not a table of the card")
    training = tmp_path / "training.json"
    training.write_text(json.dumps({"steps": 1200, "seconds": 60, "batch": 64, "device": "a card"}))
    card.main(["--model", str(folder), "--training", str(training)])
    text = " ".join((folder / "README.md").read_text().split())
    assert "1,200 steps of batch 64 in 60 s" in text
    assert "| radial 0.35 | 1.00 | 0.75 (0.30 to 0.95) | -0.25 (-0.50 to +0.00) | 24.5 | 0.900 |" in text
    assert "Did not run: broken 0.35 (ValueError: no)" in text
    assert "Dense: colour 4 of 4, shape 3 of 4, direction 4 of 4, speed 2 of 4, texture 1 of 4, camera 1 of 3." in text
    assert "height=256" in text
    assert "from_pretrained(folder, **shared_parts(folder), dtype=torch.float32)" in text
    assert "fps=" not in text
    assert "64 of 384" in text


def test_a_swept_model_no_longer_lists_its_sweeps_as_missing() -> None:
    dense = {"cells": {"dense": {}}}
    assert "--sweep caches" in card.limits("hunyuan-tiny", [dense])
    assert "--sweep caches" not in card.limits("hunyuan-tiny", [dense, {"cells": {"dense": {}, "radial 0.35": {}}}])
    assert not card.limits("wan-causal-tiny", [dense])


@pytest.mark.parametrize("name", ["wan-tiny", "hunyuan-tiny", "cogvideox-tiny"])
def test_the_tables_of_a_card_are_those_of_its_reports(name: str) -> None:
    readme = path(name) / "README.md"
    assert curves.filled(readme) == readme.read_text()


def test_the_causal_card_says_what_its_report_says() -> None:
    folder = path("wan-causal-tiny")
    text, report = (folder / "README.md").read_text(), json.loads((folder / "reports" / "causal-h200.json").read_text())
    assert card.section(report) + card.found("wan-causal-tiny", "causal-h200") in text
    assert "| light-forcing 0.5, random blocks | 0.54 | 25 | 7 | 3 | 3 | 2 | 2 | -0.75 (-0.87 to -0.54) |" in text


def test_the_tables_of_wan_tiny_hold_every_kind_of_row() -> None:
    text = (path("wan-tiny") / "README.md").read_text()
    assert "| light-forcing | 117, 26.0 dB | 112, 23.6 dB | 90, 21.5 dB | 38, 19.6 dB |" in text
    assert "| rival: cache-dit |  | 119, 31.9 dB, 2.5x |" in text
    assert "| control: reuse |" in text


def test_a_pattern_has_to_be_ahead_of_each_control_in_clips_or_in_decibels() -> None:
    def cell(name: str, right: int, psnr: float) -> dict[str, object]:
        return {"attention": name, "density": 0.5, "right": right, "psnr_to_dense": psnr, "clips": 100}

    found = cell("topk", 60, 25.0), cell("radial", 55, 24.0), cell("random", 50, 21.5), cell("first-frame", 45, 20.0)
    broken = {"attention": "ann", "density": 0.5, "failed": "ValueError: no"}
    text = curves.leads({str(cell["attention"]): cell for cell in (*found, broken)})
    assert "| 0.5 | topk | +10 points, +3.5 dB | +15 points, +5.0 dB |" in text
    assert "| 0.5 | radial | +5 points, +2.5 dB: too little | +10 points, +4.0 dB |" in text


def test_what_computed_more_than_asked_for_says_so_and_leads_nothing() -> None:
    cell = {"attention": "flashblock", "density": 0.25, "right": 99, "psnr_to_dense": 42.0, "clips": 100}
    beside = cell | {"attention": "topk", "right": 60, "delivered_density": 0.26}
    swept = {"flashblock 0.25": cell | {"delivered_density": 0.83}, "topk 0.25": beside}
    assert "| flashblock | 99, 42.0 dB (0.83) |" in curves.attention(swept)
    assert "| topk | 60, 42.0 dB |" in curves.attention(swept)
    assert "flashblock" not in curves.leads(swept)
    assert "| 0.25 | topk |" in curves.leads(swept)


def test_a_mark_may_ask_for_every_row_with_its_intervals(tmp_path: Path) -> None:
    cell = {"computed": 0.24, "clips": 10, "right": 9, "right_interval": [0.6, 0.98], "cache": "reuse"}
    lost = {"right_to_dense": [-0.1, -0.3, 0.1], "psnr_to_dense": 33.0, "ssim_to_dense": 0.97}
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "again.json").write_text(json.dumps({"cells": {"dense": cell, "reuse 12": cell | lost}}))
    readme = tmp_path / "README.md"
    readme.write_text("<!-- again rows -->\n<!-- end -->\n")
    text = curves.filled(readme)
    assert text.startswith("<!-- again rows -->\n")
    assert "| dense | 0.24 | 0.90 (0.60 to 0.98) |  |  |  |" in text
    assert "| reuse 12 | 0.24 | 0.90 (0.60 to 0.98) | -0.10 (-0.30 to +0.10) | 33.0 | 0.970 |" in text


@pytest.mark.parametrize("name", ["hunyuan-tiny", "cogvideox-tiny"])
def test_the_controls_fail_against_the_best_pattern_at_every_density(name: str) -> None:
    """Or the sample would have to be made harder."""
    cells = json.loads((path(name) / "reports" / "attention-h200.json").read_text())["cells"]
    best = [line for line in curves.leads(cells).splitlines()[2:] if "radial" not in line]
    assert len(best) == 4
    assert not any("too little" in line for line in best)


def cached(name: str, computed: float, right: int, psnr: float) -> dict[str, object]:
    seconds = {"transformer_seconds": 10 * computed}
    return {"cache": name, "computed": computed, "right": right, "psnr_to_dense": psnr, "clips": 100} | seconds


def test_a_table_of_caches_shows_the_best_threshold_of_each_method_in_each_column() -> None:
    rows = [
        cached("cg-taylor", 0.2, 80, 30.0),
        cached("cg-taylor", 0.24, 90, 31.0),
        cached("cg-taylor", 0.5, 99, 45.0),
        cached("cg-taylor, in sigma", 0.5, 98, 46.0),
        cached("cache-dit", 0.34, 95, 33.0),
        cached("reuse", 0.24, 70, 25.0),
        cached("teacache", 1.0, 100, 100.0),
        {"cache": "easycache", "failed": "ValueError: no"},
    ]
    cells = {"dense": {"transformer_seconds": 10.0}} | {str(n): row for n, row in enumerate(rows)}
    lines = curves.caches(cells).splitlines()[2:]
    assert lines[0] == "| cg-taylor |  | 90, 31.0 dB, 4.2x |  |  |  | 99, 45.0 dB, 2.0x |  |"
    assert [line.split("|")[1].strip() for line in lines[1:]] == [
        "cg-taylor, other forms",
        "control: reuse",
        "rival: cache-dit",
    ]


def test_caches_have_to_be_ahead_of_controls_at_as_many_computed_steps() -> None:
    rows = [
        cached("placed", 0.24, 79, 33.0),
        cached("cg-taylor", 0.24, 90, 31.0),
        cached("cache-dit", 0.25, 60, 20.0),
        cached("reuse", 0.24, 70, 30.5),
        cached("random steps", 0.24, 20, 10.0),
        cached("cg-taylor", 0.26, 99, 45.0),
    ]
    text = curves.cache_leads({str(n): row for n, row in enumerate(rows)})
    assert text.splitlines()[2] == (
        "| 0.24 | placed: 79, 33.0 dB | cg-taylor: 90, 31.0 dB | cache-dit: 60, 20.0 dB "
        "| +9 points, +2.5 dB: too little | +59 points, +23.0 dB |"
    )
