"""The gallery runs from its first to its last cell, small, and what is committed was made by it."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[2] / "samples" / "notebooks"
GALLERY = NOTEBOOKS / "gallery.ipynb"


def kinds(notebook: dict[str, list[dict[str, object]]]) -> list[set[str]]:
    """What each code cell shows."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [{kind for shown in cell["outputs"] for kind in shown.get("data", {"text": 0})} for cell in cells]


def test_every_cell_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    run = runpy.run_path(str(NOTEBOOKS / "execute.py"))["run"]
    small = {"MODEL": str(NOTEBOOKS.parent / "models" / "wan-tiny"), "SIDE": 64, "FRAMES": 9, "STEPS": 8, "BLOCK": 16}
    try:
        done = run(GALLERY, {**small, "DENSITY": 0.5, "PATTERNS": ("radial", "topk")})
    finally:
        sys.modules.pop("shown", None)
    shown = kinds(done)
    assert sum("image/png" in each for each in shown) == 2
    assert sum("image/jpeg" in each for each in shown) == 3
    assert sum("text/html" in each for each in shown) == 2
    assert sorted(path.name for path in (tmp_path / "out" / "gallery").iterdir()) == [
        "report.html", "report.json", "report.md",
    ]  # fmt: skip
    assert GALLERY.stat().st_size < 2**18
    # A reader finds every output that running it gives.
    assert kinds(json.loads(GALLERY.read_text(encoding="utf-8"))) == shown
