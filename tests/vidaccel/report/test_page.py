"""The compare page in a real browser, opened from a file: plays, seeks, wipes, and says nothing in the console."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vidaccel.report import comparison


def wait(page: Any, condition: str) -> None:
    """Until a condition holds; asked from outside, because the page's own policy forbids to evaluate strings."""
    for _ in range(200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never: {condition}")


@pytest.fixture
def page(browser: Any, entry: Any, tmp_path: Path) -> Iterator[Any]:
    entries = [entry("dense"), entry("radial", shift=4), entry("cached", shift=9)]
    path = tmp_path / "compare.html"
    path.write_text(comparison.html(entries, comparison.compare(entries), "vidaccel compare"), encoding="utf-8")
    opened = browser.new_page(viewport={"width": 1200, "height": 1400})
    said: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
    opened.goto(path.as_uri())
    wait(opened, "left.readyState >= 2 && right.readyState >= 2")
    yield opened
    opened.close()
    assert said == []


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
    box = page.locator(".strip").first.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 5.5 / 9, box["y"] + box["height"] / 2)
    assert state(page)[0] == 5
    assert float(page.locator(".strip .now").first.get_attribute("x1")) == 5.5


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
