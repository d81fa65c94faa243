"""What users install: wheel, source distribution and editable checkout hold the same files."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRY = """
import vidaccel, vidaccel.kernels, vidaccel.pipelines.wan, vidaccel._samples, vidaccel.patterns
from pathlib import Path
assert vidaccel.presets() and Path(vidaccel._samples.path("wan-tiny"), "model_index.json").is_file()
print(vidaccel.__file__)
"""


def tracked() -> set[str]:
    """Every file that a user needs, as a path inside the package."""
    found = set()
    for folder, inside in (
        ("vidaccel", "vidaccel"),
        ("kernels/src", "vidaccel/kernels"),
        ("pipelines/src", "vidaccel/pipelines"),
        ("samples/models", "vidaccel/_samples"),
    ):
        for path in (ROOT / folder).rglob("*"):
            relative = path.relative_to(ROOT / folder)
            linked = folder == "vidaccel" and relative.parts[0] in ("kernels", "pipelines", "_samples")
            if path.is_file() and not linked and "__pycache__" not in path.parts:
                found.add(f"{inside}/{relative}")
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return out


def run_from(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *(words or ("-c", TRY))],
        cwd=folder,
        env={"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def check_stream(folder: Path) -> None:
    """The causal sample has a folder with its transformer alone, and finds its other parts in wan-tiny's."""
    render = [
        "-m",
        "vidaccel",
        "render",
        "--model",
        "sample-causal",
        "--stream",
        "--prompt",
        "a red circle moves right",
    ]
    run_from(folder, *render, "--frames", "5", "--seed", "0", "--output", "clip.mp4")
    assert (folder / "clip.mp4").stat().st_size > 1000


@pytest.mark.slow
def test_wheel_holds_everything_and_works(built: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        missing = tracked() - set(wheel.namelist())
        assert not missing
        wheel.extractall(tmp_path)
    assert run_from(tmp_path).startswith(str(tmp_path))
    check_stream(tmp_path)


@pytest.mark.slow
def test_sdist_holds_everything_and_builds_the_same_wheel(built: Path, tmp_path: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert not {name for name in tracked() if not (source / name).is_file()}
    assert run_from(source).startswith(str(source))
    check_stream(source)
    out = tmp_path / "again"
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        assert not tracked() - set(wheel.namelist())


def test_editable_install_is_this_checkout(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", TRY], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).resolve() == (ROOT / "vidaccel" / "__init__.py").resolve()


def test_console_script() -> None:
    script = Path(sys.executable).with_name("vidaccel")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "render" in done.stdout
