"""The compare page as text: everything in it, nothing from outside, nobody's script."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from vidaccel.errors import VideoError
from vidaccel.report import comparison, plots
from vidaccel.report.over_steps import over_steps

CALLS = [
    {"step": 0, "sparse_layers": 0, "dense_layers": 4, "ms": 10.0, "gate_error": None},
    {"step": 0, "sparse_layers": 0, "dense_layers": 4, "ms": 12.0},
    {"step": 2, "sparse_layers": 3, "dense_layers": 1, "ms": 5.0, "gate_error": 0.25},
]
RUN = {"calls": CALLS, "summary": {"transformer_ms": 27.0}}


def test_quality_of_every_video_against_the_first(entry: Any) -> None:
    data = comparison.compare([entry("dense"), entry("same"), entry("shifted", shift=4)])
    assert data["reference"] == "dense"
    assert data["videos"]["same"]["mean"]["psnr_db"] == 100
    assert data["videos"]["shifted"]["mean"]["psnr_db"] < 30
    assert data["videos"]["shifted"]["mean"]["motion_ratio"] == pytest.approx(1, abs=0.01)
    assert json.loads(json.dumps(data)) == data
    assert any("--report" in note for note in data["notes"]), "what times would need is said"
    timed = comparison.compare([entry("dense", report=RUN), entry("same", report=RUN)])
    assert not any("--report" in note for note in timed["notes"])


def test_other_frames_a_second_are_told(entry: Any) -> None:
    one, other = entry("dense"), entry("fast")
    assert not any("players" in note for note in comparison.compare([one, other])["notes"])
    assert any("(8, 24)" in note for note in comparison.compare([one, replace(other, fps=24.0)])["notes"])


def test_figures_over_scenes_have_intervals(entry: Any) -> None:
    entries = [entry(label, shift, scene=scene) for label, shift in (("dense", 0), ("sparse", 4)) for scene in "ab"]
    entries += [entry("dense", scene="c"), entry("sparse", 9, scene="c")]
    data = comparison.compare(entries, judge=lambda prompt, frames: None)
    found = data["videos"]["sparse"]
    each = [scene["videos"]["sparse"]["mean"]["psnr_db"] for scene in data["scenes"]]
    assert each[0] == each[1] > each[2]
    assert found["scenes"] == 3
    assert found["mean"]["psnr_db"] == pytest.approx(sum(each) / 3)
    low, high = found["interval"]["psnr_db"]
    # Two equal values and one that lies d lower scatter by d / sqrt(3); t for two degrees of freedom is 4.3027.
    assert (high - low) / 2 == pytest.approx(4.3027 * (each[0] - each[2]) / 3, rel=1e-4)
    assert data["runs"]["sparse"]["right"] is None
    page = comparison.html(entries, data, "vidaccel compare")
    assert page.count("data:video/mp4;base64,") == 6
    assert " ± " in page


def test_videos_that_show_their_prompt_are_counted(entry: Any) -> None:
    record = {"job": {"prompt": "a ball"}}
    entries = [
        entry(label, shift, scene=scene, record=record)
        for scene in "ab"
        for label, shift in (("dense", 0), ("sparse", 4))
    ]

    def judge(prompt: str, frames: Any) -> bool:
        return prompt == "a ball" and bool(frames[0, 32, 8, 0] > 100)

    data = comparison.compare(entries, judge)
    assert data["runs"]["dense"]["right"] == {"right": 2, "of": 2, "interval": (pytest.approx(0.342, abs=1e-3), 1.0)}
    assert data["runs"]["sparse"]["right"]["right"] == 0
    assert "0 of 2" in comparison.html(entries, data, "x")


def test_the_page_holds_everything_and_asks_nobody(entry: Any) -> None:
    record = {"job": {"prompt": "p"}, "recipe": {"density": 0.25}, "versions": {"torch": "2"}}
    entries = [entry("dense"), entry("sparse", record=record, command="vidaccel rerun s.mp4", report=RUN)]
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
    [
        (None, "two or more"),
        ({"label": "dense"}, "same name"),
        ({"label": "b", "frames": 5}, "must agree"),
        ({"label": "b", "scene": "other"}, "both are needed"),
    ],
)
def test_what_cannot_be_compared(entry: Any, second: dict[str, Any] | None, words: str) -> None:
    entries = [entry("dense")] + ([] if second is None else [entry(**second)])
    with pytest.raises(VideoError, match=words):
        comparison.compare(entries)


def test_plots_over_steps_add_up_calls_and_leave_gaps() -> None:
    split, time, sparse, gate = over_steps({"run": RUN})
    assert "dense steps: 0.022" in split
    assert "sparse steps: 0.005" in split
    # Steps 0 and 2 have values, step 1 none: two dots, no line.
    assert time.count("<circle") == 2
    assert "<polyline" not in time
    assert ">22<" in time
    assert ">0.75<" in sparse
    assert gate.count("<circle") == 1
    assert over_steps({}) == []


def test_layers_and_whole_renders_are_shown_where_they_are_known() -> None:
    layers = [[1.0, 1.0], [1.0, 1.0], [0.5, None]]
    calls = [{**call, "layer_density": each} for call, each in zip(CALLS, layers, strict=True)]
    seconds = {"denoise": 0.03, "decode": 0.01, "total": 0.05}
    split, *_, density = over_steps({"run": {**RUN, "calls": calls, "seconds": seconds}})
    assert "rest of denoising: 0.003" in split
    assert "text and the rest: 0.01<" in split
    assert "layer 0, step 2: 0.5<" in density
    assert "layer 1, step 1 to 2: not run" in density


def test_speed_and_quality_of_runs_that_were_timed(entry: Any) -> None:
    def timed(ms: float) -> dict[str, Any]:
        return {"calls": CALLS, "summary": {"transformer_ms": ms}}

    entries = [
        entry("dense", report=timed(100)), entry("fast", 4, report=timed(40)), entry("slow", 9, report=timed(80)),
    ]  # fmt: skip
    page = comparison.html(entries, comparison.compare(entries), "vidaccel compare")
    plot = page[page.index("Speed and quality;") :]
    plot = plot[: plot.index("</svg>")]
    assert "fast (2.5, " in plot
    assert "slow (1.25, " in plot
    assert comparison.summary(comparison.compare(entries))[1]["times faster"] == "2.50"
    # What is slower and worse is not on the line.
    assert plot.count('class="front" points="') == 1
    assert len(plot.partition('class="front" points="')[2].partition('"')[0].split()) == 1


def test_times_are_of_the_scenes_that_every_run_has_times_of(entry: Any) -> None:
    """Long and short prompts: what is timed on the long one alone is not slower for it."""

    def timed(ms: float) -> dict[str, Any]:
        return {"calls": CALLS, "summary": {"transformer_ms": ms}}

    entries = [
        entry("dense", scene="long", report=timed(100)), entry("fast", 4, scene="long", report=timed(50)),
        entry("dense", scene="short", report=timed(10)), entry("fast", 4, scene="short"),
    ]  # fmt: skip
    data = comparison.compare(entries)
    assert comparison.summary(data)[1]["times faster"] == "2.00"
    assert any("1 of 2 prompts" in note for note in data["notes"])


def test_the_start_has_its_line_wherever_it_lies() -> None:
    points = {"slow": (0.5, 30.0), "fast": (2.0, 20.0)}
    without, between = (plots.scatter("speed", points, "x", "y", start=start) for start in (None, 1.0))
    assert between.count('class="grid"') == without.count('class="grid"') + 1


def test_plots_survive_flat_and_infinite_values() -> None:
    assert "<polyline" in plots.lines("flat", {"a": [1.0, 1.0, 1.0]})
    assert "<circle" in plots.scatter("one", {"a": (1.0, 2.0)}, "x", "y")
    assert plots.bars("none", {"a": {"b": 0.0}}) == plots.heat("none", [], "step", "layer") == ""
    assert plots.lines("nothing", {"a": [None, float("inf")]}) == ""
    assert "<b>" not in plots.lines("<b>", {"<b>": [1.0, 2.0]})
