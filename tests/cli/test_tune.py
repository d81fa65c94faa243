"""`vidaccel tune`: on a tiny pipeline what it writes and how it goes on, on the trained sample what it is for."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from vidaccel._samples import world
from vidaccel.caching.goal import Goal
from vidaccel.lab.outcome import Outcome
from vidaccel.lab.tune import Aim
from vidaccel.recipe import Recipe, presets

ROOT = Path(__file__).parents[2]
SMALL = ("--steps", 6, "--attention", "radial,topk", "--density", "0.4", "--cache", "cg-taylor", "--renders", 4)


@pytest.fixture
def prompts(tmp_path: Path) -> tuple[object, ...]:
    (tmp_path / "mine.txt").write_text("a cat\na dog\n")
    (tmp_path / "others.txt").write_text("a bird\n")
    return "--prompts", "mine.txt", "--check", "others.txt"


def test_it_writes_a_recipe_its_rivals_and_its_evidence(
    invoke: Callable[..., Result], wan: Path, tmp_path: Path, prompts: tuple[object, ...]
) -> None:
    command = ("tune", "-m", wan, "--target", "psnr>=5", *SMALL, *prompts, "-o", "tuned")
    result = invoke(*command)
    assert result.exit_code == 0, result.output
    evidence = json.loads((tmp_path / "tuned" / "evidence.json").read_text())
    assert (evidence["schema"], evidence["what"]) == (1, "tune")
    kinds = [row["kind"] for row in evidence["rows"]]
    # Two patterns in blocks of two sizes; three prompts.
    assert (kinds.count("attention"), kinds.count("dense")) == (4, 3)
    found = json.loads((tmp_path / "tuned" / "result.json").read_text())
    recipe = Recipe.load(tmp_path / "tuned" / "recipe.yaml")
    assert recipe.hash == found["winner"]["hash"]
    assert "psnr>=5" in recipe.about
    assert recipe.evidence
    assert found["winner"]["work_speedup"] > 1
    assert found["check"]["means"]["tuned"]["prompts"] == 1
    speeds = [row["work_speedup"] for row in found["pareto"]]
    assert speeds == sorted(speeds, reverse=True)
    assert "| tuned |" in (tmp_path / "tuned" / "report.md").read_text()
    video = invoke(
        "render", "-m", wan, "-p", "a fish", "--recipe", "tuned/recipe.yaml", "--dry-run", "--format", "json"
    )
    assert json.loads(video.stdout)["recipe_hash"] == recipe.hash

    again = invoke(*command)
    assert again.stderr == "", "nothing is measured twice"
    assert json.loads((tmp_path / "tuned" / "evidence.json").read_text()) == evidence
    # Another target begins with what is known.
    other = invoke("tune", "-m", wan, "--target", "1.01x", *SMALL, *prompts, "-o", "tuned")
    assert other.exit_code == 0, other.output
    assert "dense" not in other.stderr


def test_a_recipe_of_a_cache_alone_renders(invoke: Callable[..., Result], wan: Path, tmp_path: Path) -> None:
    (tmp_path / "cache.yaml").write_text("cache: {name: taylorseer, interval: 2}\n")
    command = ("render", "-m", wan, "-p", "a cat", "--recipe", "cache.yaml", "-o", "cat.mp4")
    planned = invoke(*command, "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert "taylorseer (interval 2" in planned.stdout
    assert invoke(*command).exit_code == 0
    assert (tmp_path / "cat.mp4").is_file()


def test_what_cannot_be_reached_fails_and_keeps_its_evidence(
    invoke: Callable[..., Result], wan: Path, tmp_path: Path, prompts: tuple[object, ...]
) -> None:
    result = invoke("tune", "-m", wan, "--target", "50x", *SMALL, *prompts, "-o", "tuned", "--format", "quiet")
    assert result.exit_code == 1
    assert "50x" in result.stderr
    assert json.loads((tmp_path / "tuned" / "result.json").read_text())["winner"] is None
    assert not (tmp_path / "tuned" / "recipe.yaml").exists()


@pytest.mark.slow
def test_on_the_sample_it_beats_the_preset_on_prompts_it_was_not_tuned_on(
    invoke: Callable[..., Result], tmp_path: Path
) -> None:
    """Small, where the preset's own blocks of 128 would gain nothing: its pattern in blocks of 16."""
    (tmp_path / "small.yaml").write_text(Recipe.load("wan-tiny").override({"attention.block": 16}).to_yaml())
    size = ("--height", 128, "--width", 128, "--frames", 9, "--steps", 10, "--baseline", "small.yaml")
    space = ("--attention", "none", "--cache", "cg-taylor,teacache", "--renders", 8)
    rng = random.Random(7)
    shown = {"mine": [world.draw(rng, things=1) for _ in range(2)], "others": world.unseen()[4::16]}
    for name, scenes in shown.items():
        (tmp_path / f"{name}.txt").write_text("".join(scene.caption() + "\n" for scene in scenes))
    given = ("--prompts", "mine.txt", "--check", "others.txt")
    result = invoke("tune", "--target", "psnr>=28", *size, *space, *given, "-o", "tuned", "--format", "json")
    assert result.exit_code == 0, result.output
    beats(json.loads(result.stdout))


def beats(found: dict[str, Any]) -> None:
    """On prompts that it was not tuned on: less work than the preset, and nearer to the dense video."""
    (name,) = set(found["check"]["means"]) - {"tuned"}
    preset, tuned = (found["check"]["means"][each] for each in (name, "tuned"))
    assert preset["work_speedup"] > 1
    assert tuned["prompts"] >= 4
    assert tuned["psnr"] > preset["psnr"]
    assert tuned["ssim"] > preset["ssim"]
    assert tuned["work_speedup"] > preset["work_speedup"]


@pytest.mark.parametrize("path", sorted(ROOT.glob("samples/tuned/*/result.json")), ids=lambda path: path.parts[-2])
def test_committed_searches_beat_the_preset(path: Path) -> None:
    found = json.loads(path.read_text())
    beats(found)
    assert set(found["check"]["means"]) - {"tuned"} <= set(presets())
    recipe = Recipe.load(path.with_name("recipe.yaml"))
    evidence = json.loads(path.with_name("evidence.json").read_text())
    tuned_on = {row["prompt"] for row in evidence["rows"] if row.get("hash") != recipe.hash and row["kind"] == "render"}
    assert recipe.hash == found["winner"]["hash"]
    # Nobody but the preset and the winner has seen the prompts that show the result.
    others = {
        row["hash"] for row in evidence["rows"] if row.get("prompt") in found["check"]["prompts"] and "hash" in row
    }
    assert len(others) == 2
    assert tuned_on
    aim = Aim(Goal.of(found["goal"]), found["speed_by"])
    told = Outcome(aim, *(found[name] for name in ("setting", "command", "winner", "pareto", "check")))
    assert path.with_name("report.md").read_text() == told.markdown()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--target", "fast"), ("'fast'", "psnr>=28")),
        (("--target", "2x", "--attention", "raidal"), ("raidal", "radial")),
        (("--target", "2x", "--cache", "replay"), ("replay", "cg-taylor")),
        (("--target", "2x", "--attention", "none", "--cache", "none"), ("none",)),
        (("--target", "2x", "--density", "1.5"), ("1.5", "(0, 1)")),
        (("--target", "2x", "--density", "x"), ("'x'", "0.15")),
        (("--target", "2x", "--by", "taste"), ("taste", "work or time")),
        (("--target", "2x", "--baseline", "nosuch"), ("nosuch", "wan-tiny")),
        (("--target", "2x", "--model", "sample-causal"), ("sample-causal", "--stream")),
    ],
)
def test_bad_usage(
    invoke: Callable[..., Result], failed: Callable[..., None], arguments: tuple[object, ...], words: tuple[str, ...]
) -> None:
    failed(invoke("tune", *arguments), 2, *words)


def test_prompts_must_be_said_and_not_shared(
    invoke: Callable[..., Result], failed: Callable[..., None], wan: Path, tmp_path: Path
) -> None:
    failed(invoke("tune", "-m", wan, "--target", "2x"), 2, "--prompts")
    (tmp_path / "p.txt").write_text("a cat\n")
    same = ("--prompts", "p.txt", "--check", "p.txt")
    failed(invoke("tune", "-m", wan, "--target", "2x", *same), 2, "a cat", "--check")
