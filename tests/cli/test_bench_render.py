"""`vidaccel bench render`, in this process, on a pipeline small enough for a CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from vidaccel.recipe import Recipe

QUICK = ("--steps", 4, "--repeats", 2, "--device", "cpu")
WHO = ("-a", "radial", "-d", "0.5", "-c", "taylorseer", "--peers", "diffusers taylorseer,fastvideo-sta")


def rows_of(path: Path, kind: str) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in json.loads(path.read_text())["rows"] if row["kind"] == kind}


def test_everybody_takes_turns_and_failures_are_rows(invoke: Callable[..., Result], wan: Path, tmp_path: Path) -> None:
    command = ("bench", "render", "-m", wan, *QUICK, *WHO, "-o", "renders.json")
    result = invoke(*command)
    assert result.exit_code == 0, result.output
    path = tmp_path / "renders.json"
    record = json.loads(path.read_text())
    assert (record["schema"], record["what"], record["job"]["num_inference_steps"]) == (1, "render", 4)
    found = {row["variant"]: row for row in rows_of(path, "render").values()}
    dense, failed = found["torch's choice"], found.pop("fastvideo-sta (window 3)")
    assert {row["what"] for row in found.values()} == {"dense", "vidaccel", "peer"}
    assert len(found) == 4
    assert not failed["ok"]
    assert "fastvideo_kernel" in failed["reason"]
    assert dense["psnr"] == 100
    assert dense["speedup"] == 1
    for row in found.values():
        assert row["ok"]
        assert row["against"] == "torch's choice"
        assert row["first_s"] > 0
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        assert 0 < row["denoise_s"] < row["total_s"]
    assert found["taylorseer"]["computed_steps"] < 4
    assert found["radial 0.5"]["kernels"]
    assert found["diffusers taylorseer (interval 4)"]["psnr"] < 100
    rounds = rows_of(path, "round")
    assert len(rounds) == 2
    assert all(set(row["seconds"]) == set(found) for row in rounds.values())
    assert "fastvideo" in result.stdout

    again = invoke(*command)
    assert again.stderr == "", "nothing is measured twice"
    assert json.loads(path.read_text()) == record

    # Interrupted in the second round: it is measured again as a whole, the first one stays.
    kept = [row for row in record["rows"] if row["kind"] != "render" and row.get("number") != 1]
    path.write_text(json.dumps(record | {"rows": kept}))
    resumed = invoke(*command)
    assert resumed.exit_code == 0, resumed.output
    assert "round 2" in resumed.stderr
    assert "round 1" not in resumed.stderr
    assert next(iter(rows_of(path, "round").values())) == next(iter(rounds.values()))
    assert set(rows_of(path, "render")) == set({row["key"]: 0 for row in record["rows"] if row["kind"] == "render"})


def test_who_comes_later_is_measured_beside_the_fastest_dense(
    invoke: Callable[..., Result], wan: Path, tmp_path: Path
) -> None:
    Path("mine.yaml").write_text(Recipe.from_dict({"cache": "taylorseer"}).to_yaml())
    command = ("bench", "render", "-m", wan, "--steps", 4, "--repeats", 1, "-o", "renders.json", "--format", "json")
    assert invoke(*command).exit_code == 0
    before = rows_of(tmp_path / "renders.json", "render")
    result = invoke(*command, "--recipe", "mine.yaml", "--compile")
    assert result.exit_code == 0, result.output
    after = rows_of(tmp_path / "renders.json", "render")
    assert before.items() <= after.items()
    assert set(after) == {
        "render torch's choice", "render torch's choice, compiled", "render mine", "render mine, compiled",
    }  # fmt: skip
    assert all(row["ok"] for row in after.values()), [row["reason"] for row in after.values()]
    assert after["render mine, compiled"]["psnr"] == pytest.approx(after["render mine"]["psnr"], abs=3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--dense", "flash9"), ("flash9", "torch's choice")),
        (("--peers", "nosuch"), ("nosuch", "cache-dit")),
        (("-a", "raidal"), ("raidal", "radial")),
        (("-d", "0.5"), ("--density 0.5", "--attention")),
        (("-r", "nosuch"), ("nosuch", "wan-tiny")),
        (("-o", "no/such/rows.json"), ("no/such",)),
        (("--height", 65), ("65", "multiples")),
    ],
)
def test_bad_usage(
    invoke: Callable[..., Result],
    failed: Callable[..., None],
    wan: Path,
    arguments: tuple[object, ...],
    words: tuple[str, ...],
) -> None:
    failed(invoke("bench", "render", "-m", wan, *QUICK, *arguments), 2, *words)
