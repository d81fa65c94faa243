"""Small videos on disk, and the headless Chromium that pages are tested in."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vidaccel.render import video
from vidaccel.report.comparison import Entry

FPS = 8.0


@pytest.fixture
def entry(tmp_path: Path) -> Callable[..., Entry]:
    """A video of a ball that moves, as the page gets it."""

    def make(label: str, shift: int = 0, frames: int = 9, size: int = 64, **more: Any) -> Entry:
        y, x = np.mgrid[0:size, 0:size]
        balls = [(x - 16 - 2 * t - shift) ** 2 + (y - 32) ** 2 < 100 for t in range(frames)]
        clip = np.where(np.stack(balls)[..., None], np.uint8([220, 60, 60]), np.uint8(40))
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.mp4"
        video.write(path, clip, FPS, {"job": {"prompt": label}})
        return Entry(label, lambda: clip, path.read_bytes(), FPS, **more)

    return make


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A real one. A machine without any fails, unless VIDACCEL_BROWSER=none says that these tests are not wanted."""
    from playwright.sync_api import sync_playwright

    if os.environ.get("VIDACCEL_BROWSER") == "none":
        pytest.skip("VIDACCEL_BROWSER=none: pages are not tested")
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        names = ("chromium", "chromium-browser", "google-chrome")
        path = next(filter(None, map(shutil.which, names)), own if Path(own).is_file() else None)
        if path is None:
            pytest.fail(
                "no Chromium is installed, and pages are tested in a real one. Get it with `make browser` (apt, as "
                "root) or `.venv/bin/playwright install chromium`; VIDACCEL_BROWSER=none leaves these tests out"
            )
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()
