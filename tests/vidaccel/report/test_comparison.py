"""The compare page as text: everything in it, nothing from outside, nobody's script."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from vidaccel.errors import VideoError
from vidaccel.report import comparison, plots

CALLS = [
    {"step": 0, "sparse_layers": 0, "dense_layers": 4, "ms": 10.0, "gate_error": None},
    {"step": 0, "sparse_layers": 0, "dense_layers": 4, "ms": 12.0},
    {"step": 2, "sparse_layers": 3, "dense_layers": 1, "ms": 5.0, "gate_error": 0.25},
]


def test_quality_of_every_video_against_the_first(entry: Any) -> None:
    data = comparison.compare([entry("dense"), entry("same"), entry("shifted", shift=4)])
    assert data["reference"] == "dense"
    assert data["videos"]["same"]["mean"]["psnr_db"] == 100
    assert data["videos"]["shifted"]["mean"]["psnr_db"] < 30
    assert data["videos"]["shifted"]["mean"]["motion_ratio"] == pytest.approx(1, abs=0.01)
    assert json.loads(json.dumps(data)) == data


def test_the_page_holds_everything_and_asks_nobody(entry: Any) -> None:
    record = {"job": {"prompt": "p"}, "recipe": {"density": 0.25}, "versions": {"torch": "2"}}
    entries = [entry("dense"), entry("sparse", record=record, command="vidaccel rerun s.mp4", report={"calls": CALLS})]
    page = comparison.html(entries, comparison.compare(entries), "vidaccel compare a b")
    assert page.count("data:video/mp4;base64,") == 2
    assert not re.findall(r"(?:src|href)=\"?http|@import|url\(", page)
    for word in ("vidaccel rerun s.mp4", "vidaccel compare a b", "&#34;density&#34;: 0.25", "&#34;torch&#34;"):
        assert word in page
    assert page.count('data-per="step"') == 3


def test_names_cannot_become_scripts(entry: Any) -> None:
    bad = "</script><img src=x onerror=alert(1)>"
    entries = [entry("dense"), entry(bad, record={"job": {"prompt": bad}})]
    page = comparison.html(entries, comparison.compare(entries), bad)
    assert bad not in page
    assert page.count("</script>") == 2


@pytest.mark.parametrize(
    ("second", "words"),
    [(None, "two or more"), ({"label": "dense"}, "same name"), ({"label": "b", "frames": 5}, "must agree")],
)
def test_what_cannot_be_compared(entry: Any, second: dict[str, Any] | None, words: str) -> None:
    entries = [entry("dense")] + ([] if second is None else [entry(**second)])
    with pytest.raises(VideoError, match=words):
        comparison.compare(entries)


def test_plots_over_steps_add_up_calls_and_leave_gaps() -> None:
    time, sparse, gate = plots.steps({"run": CALLS})
    # Steps 0 and 2 have values, step 1 none: two dots, no line.
    assert time.count("<circle") == 2
    assert "<polyline" not in time
    assert ">22<" in time
    assert ">0.75<" in sparse
    assert gate.count("<circle") == 1
    assert plots.steps({}) == ["", "", ""]


def test_plots_survive_flat_and_infinite_values() -> None:
    assert "<polyline" in plots.lines("flat", {"a": [1.0, 1.0, 1.0]})
    assert plots.lines("nothing", {"a": [None, float("inf")]}) == ""
    assert "<b>" not in plots.lines("<b>", {"<b>": [1.0, 2.0]})
