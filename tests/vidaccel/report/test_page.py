"""The compare page in a real browser, opened from a file: plays, seeks, wipes, and says nothing in the console."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vidaccel
from vidaccel.patterns import Radial
from vidaccel.report import comparison


def wait(page: Any, condition: str) -> None:
    """Until a condition holds; asked from outside, because the page's own policy forbids to evaluate strings."""
    for _ in range(200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never: {condition}")


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Callable[[list[Any]], Any]]:
    """Opens a comparison from a file; at the end the page must have said nothing, and asked for nothing."""
    opened: list[Any] = []
    said: list[str] = []

    def of(entries: list[Any]) -> Any:
        path = tmp_path / "compare.html"
        path.write_text(comparison.html(entries, comparison.compare(entries), "vidaccel compare"), encoding="utf-8")
        found = browser.new_page(viewport={"width": 1200, "height": 1400})
        found.on("console", lambda message: said.append(message.text))
        found.on("pageerror", lambda error: said.append(str(error)))
        found.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
        found.goto(path.as_uri())
        wait(found, "left.readyState >= 2 && right.readyState >= 2")
        opened.append(found)
        return found

    yield of
    for each in opened:
        each.close()
    assert said == []


@pytest.fixture
def page(open_page: Any, entry: Any) -> Any:
    return open_page([entry("dense"), entry("radial", shift=4), entry("cached", shift=9)])


def state(page: Any) -> tuple[int, float, float]:
    wait(page, "!left.seeking && !right.seeking")
    now, left, right = page.evaluate("[now, left.currentTime, right.currentTime]")
    return now, left, right


def test_both_players_stand_at_the_same_frame(page: Any) -> None:
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert state(page) == (2, 2.5 / 8, 2.5 / 8)
    page.keyboard.press("ArrowLeft")
    assert state(page)[0] == 1
    page.keyboard.press("End")
    assert state(page) == (8, 8.5 / 8, 8.5 / 8)
    page.keyboard.press("ArrowRight")
    assert state(page)[0] == 8
    page.keyboard.press("Home")
    assert state(page)[0] == 0
    page.locator("#on").click()
    assert state(page)[0] == 1
    assert page.locator("#number").text_content() == "frame 1 of 8"


def test_play_and_pause(page: Any) -> None:
    page.keyboard.press(" ")
    wait(page, "now >= 2")
    page.locator("#play").click()
    _, left, right = state(page)
    assert left > 0
    assert abs(left - right) < 1 / 8
    page.keyboard.press("Home")
    page.locator("#play").click()
    wait(page, "now === 8 && !playing")


def test_the_strip_seeks(page: Any) -> None:
    assert page.locator(".strip").count() == 2
    worst = page.locator(".strip rect").first
    assert worst.evaluate("e => getComputedStyle(e).fill") != "rgb(0, 0, 0)", "colours are understood"
    box = page.locator(".strip svg").first.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 5.5 / 9, box["y"] + box["height"] / 2)
    assert state(page)[0] == 5
    assert float(page.locator(".strip .now").first.get_attribute("x1")) == 5.5


def test_plots_over_frames_seek(page: Any) -> None:
    plot = page.locator(".plot[data-per=frame]").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    # A plot of 640 units shows its 9 frames from unit 56 on, over 572 of them.
    page.mouse.click(box["x"] + box["width"] * (56 + 572 * 7.5 / 9) / 640, box["y"] + box["height"] / 2)
    assert state(page)[0] == 7
    assert float(plot.locator(".now").get_attribute("x1")) == pytest.approx(56 + 572 * 7.5 / 9)


def test_a_phone_shows_all_of_it(page: Any) -> None:
    """Wide tables scroll by themselves, and letters in plots stay as large as a reader needs."""
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    text = page.locator(".plot text.axis").first
    assert text.evaluate("e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a") > 9


def test_prompts_can_be_turned(open_page: Any, entry: Any) -> None:
    first = [entry("dense", scene="one"), entry("radial", shift=4, scene="one")]
    second = [entry("dense", frames=5, scene="two"), entry("radial", shift=9, frames=5, scene="two")]
    page = open_page([*first, *second])
    assert page.locator("section:visible .plot").count() == 4
    page.keyboard.press("End")
    assert state(page)[0] == 8
    before = page.evaluate("left.src")
    page.keyboard.press("n")
    wait(page, "left.readyState >= 2 && right.readyState >= 2 && left.src !== right.src")
    assert page.evaluate("left.src") != before
    assert page.locator("#scene").input_value() == "two"
    assert page.locator("#number").text_content() == "frame 0 of 4"
    page.keyboard.press("End")
    assert state(page)[0] == 4
    assert page.locator("section:visible").count() == 1
    page.locator("#scene").select_option("one")
    wait(page, "left.readyState >= 2 && right.readyState >= 2")
    assert page.evaluate("left.src") == before
    page.locator("#scene").blur()
    page.keyboard.press("p")
    assert page.locator("#scene").input_value() == "two"


def test_views(page: Any) -> None:
    figures = page.locator("#stage figure")
    first, second = (figures.nth(n).bounding_box() for n in range(2))
    assert first["x"] + first["width"] <= second["x"]
    page.keyboard.press("2")
    first, second = (figures.nth(n).bounding_box() for n in range(2))
    assert first == second
    page.keyboard.press("]")
    assert page.evaluate("getComputedStyle(stage).getPropertyValue('--wipe')") == "55%"
    box = page.locator("#stage").bounding_box()
    page.mouse.move(box["x"] + 10, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 50)
    page.mouse.up()
    assert page.locator("#wipe").input_value() == "25"
    page.locator("button[data-mode=difference]").click()
    assert page.locator("#gain").is_visible()
    assert not page.locator("#wipe").is_visible()


def test_the_difference_is_black_where_the_videos_agree(page: Any) -> None:
    page.keyboard.press("3")

    def brightest() -> int:
        wait(page, "!left.seeking && !right.seeking")
        page.wait_for_timeout(200)
        picture = Image.open(io.BytesIO(page.locator("#stage").screenshot())).convert("RGB")
        # The last row may be half the page's own background.
        return int(np.asarray(picture)[4:-4, 4:-4].max())

    assert brightest() > 200
    page.locator("#pick-right").select_option("dense")
    wait(page, "right.readyState >= 2 && right.currentTime > 0 && !right.seeking")
    assert brightest() < 12


def test_another_pair_can_be_picked(page: Any) -> None:
    page.keyboard.press("ArrowRight")
    page.locator("#pick-right").select_option("cached")
    wait(page, "right.readyState >= 2 && right.currentTime > 0 && !right.seeking")
    assert page.locator("#stage figcaption").all_text_contents() == ["dense", "cached"]
    assert state(page)[2] == pytest.approx(1.5 / 8)


def test_the_report_of_a_run_plays_its_videos(browser: Any, wan: Any, render: Any, tmp_path: Path) -> None:
    with vidaccel.accelerate(wan, Radial(block=16), density=0.4) as run:
        render(wan)
    video = np.random.default_rng(0).random((9, 32, 32, 3))
    path = run.report(video, against=video[::-1], fps=8).save(tmp_path) / "report.html"
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(path.as_uri())
    wait(page, "left.readyState >= 2 && right.readyState >= 2")
    page.keyboard.press("End")
    assert state(page) == (8, 8.5 / 8, 8.5 / 8)
    assert page.locator("#stage figcaption").all_text_contents() == ["reference", "accelerated"]
    page.close()
    assert said == []
