"""`vidaccel explain` on a small pipeline in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result


def test_an_atlas(invoke: Callable[..., Result], wan: Path, tmp_path: Path) -> None:
    result = invoke("explain", "-m", wan, "-a", "radial, topk", "-d", 0.6, "--block", 16, "--at", "0,2", "-o", "atlas")
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "atlas" / "atlas.json").read_text())
    assert {row["step"] for row in data["rows"]} == {0, 2}
    assert sorted(p.name for p in (tmp_path / "atlas").iterdir()) == ["atlas.html", "atlas.json", "atlas.png"]
    assert "mass kept" in result.stdout
    assert "radial was asked for 0.6" in result.stdout
    assert set(data["why"]) == {"plan", "backend", "schedule"}


def test_a_recipe_is_explained(invoke: Callable[..., Result], wan: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("attention: {name: topk, block: 16}\ndensity: 0.5\nschedule: {dense_steps: 1}\n")
    result = invoke("explain", "-m", wan, "-r", "r.yaml", "--at", "0,1", "--format", "json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert list(data["patterns"]) == ["topk"]
    assert data["why"]["schedule"][0].startswith("dense: step 0 (of 3), no layer (of 2)")
    assert "where the schedule stays dense topk would keep" in data["why"]["schedule"][1]


def test_nothing_is_broken(invoke: Callable[..., Result], wan: Path) -> None:
    result = invoke("explain", "-m", wan, "-a", "radial", "-d", 0.6, "--block", 16, "--find-nan")
    assert result.exit_code == 0, result.output
    assert "finite numbers" in result.stdout
    quiet = ("-a", "radial", "-d", 0.6, "--block", 16, "--find-nan", "--format", "quiet")
    assert invoke("explain", "-m", wan, *quiet).stdout == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--at", "x"), "0,10,19"),
        (("--at", "99"), "steps 0 to 2"),
        (("-a", "nosuch"), "nosuch"),
        (("-r", "nosuch"), "neither"),
        (("-r", "wan-tiny", "-d", "0.35"), "--density was given beside recipe wan-tiny"),
        (("-r", "wan-tiny", "-a", "topk"), "--attention was given"),
    ],
)
def test_bad_usage(
    invoke: Callable[..., Result], failed: Callable[..., None], wan: Path, arguments: tuple[str, ...], words: str
) -> None:
    failed(invoke("explain", "-m", wan, *arguments), 2, words)
