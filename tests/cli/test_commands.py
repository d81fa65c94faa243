"""Help, presets, doctor, demo; and that help is quick."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vidaccel.recipe import Recipe, presets

COMMANDS = ["render", "rerun", "doctor", "presets", "demo"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(invoke: Callable, command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"Example: vidaccel {command}" in " ".join(result.stdout.split())
    assert "--format" in result.stdout


def test_bare_command_shows_help(invoke: Callable) -> None:
    assert invoke().exit_code == 2
    assert "render" in invoke().stdout
    assert invoke("--version").stdout.strip().count(".") == 2


def test_unknown_command(invoke: Callable, failed: Callable) -> None:
    failed(invoke("paint"), 2, "paint")


def test_command_line_imports_no_diffusers(environment: dict[str, str]) -> None:
    code = "import sys, vidaccel.cli.main; sys.exit(any(name in sys.modules for name in ('diffusers', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_presets(invoke: Callable, failed: Callable, tmp_path: Path) -> None:
    assert invoke("presets", "--format", "quiet").stdout.split() == presets()
    assert {entry["name"] for entry in json.loads(invoke("presets", "--format", "json").stdout)} == set(presets())
    assert "wan-tiny" in invoke("presets").stdout
    for name in presets():
        (tmp_path / "recipe.yaml").write_text(invoke("presets", name).stdout)
        assert Recipe.load(tmp_path / "recipe.yaml") == Recipe.load(name)
    assert json.loads(invoke("presets", "wan-tiny", "--format", "json").stdout)["hash"] == Recipe.load("wan-tiny").hash
    failed(invoke("presets", "nothing"), 2, "nothing", "wan-tiny")


def test_doctor(invoke: Callable) -> None:
    data = json.loads(invoke("doctor", "--format", "json").stdout)
    assert data["versions"]["torch"]
    assert "ffmpeg" in data["ffmpeg"]
    kernels = {row["kernel"]: row for row in data["kernels"] if row["device"] == "cpu"}
    assert kernels["cpu"]["ok"]
    assert kernels["reference"]["ok"]
    backends = {row["backend"]: row for row in data["dense_backends"]}
    assert backends["native"]["ok"]
    for row in [*data["kernels"], *data["dense_backends"], *data["models"]]:
        assert row["ok"] == (not row["why not"])
    human = invoke("doctor").stdout
    assert "sparse attention kernels" in human
    assert "cpu" in invoke("doctor", "--format", "quiet").stdout.split()


def test_demo(invoke: Callable, failed: Callable, wan: Path, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(
        "attention: {name: radial, block: 16}\ndensity: 0.5\nschedule: {dense_steps: 1}\n"
    )
    options = ["demo", "-m", wan, "-r", "small.yaml", "--steps", "2", "-o", "out/demo"]
    result = invoke(*options, "--format", "json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["dense"]["effective_density"] == 1
    assert data["sparse"]["delivered_density"] < data["sparse"]["effective_density"] < 1
    assert 0 < data["psnr_db"] <= 100
    assert data["denoising_speedup"] > 0
    for name in ("dense", "sparse"):
        assert Path(data[name]["file"]).is_file()
        assert Path(data[name]["report"]).is_file()
    human = invoke(*options)
    assert "denoising speed-up" in human.stdout
    assert "PSNR" in human.stdout
    assert Path(data["page"]).read_text().count("data:video/mp4;base64,") == 2
