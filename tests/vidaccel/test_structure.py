"""What holds the folders together: import arrows, light imports, exports, nobody else's package shadowed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vidaccel

ROOT = Path(__file__).parents[2]

# Each part may import the parts named here (and itself). "below" may be imported by everybody.
BELOW = {"encode", "errors", "files", "grid", "order", "ranks", "trace", "env"}
ARROWS = {
    "errors": set(),
    "order": {"errors"},
    "grid": {"errors", "order"},
    "ranks": {"errors"},
    "exchange": BELOW | {"kernels"},
    "parallel": BELOW | {"family"},
    "trace": {"grid"},
    "encode": {"errors"},
    "env": set(),
    "files": set(),
    "window": {"errors"},
    "blocks": BELOW | {"window"},
    "patterns": BELOW | {"blocks", "kernels", "window"},
    "kernels": BELOW | {"blocks", "window"},
    "schedule": BELOW,
    "family": BELOW | {"exchange"},
    "frontdoor": BELOW | {"family", "schedule"},
    "wrapping": BELOW | {"exchange", "family", "kernels", "patterns", "reuse"},
    "choices": BELOW | {"blocks", "patterns"},
    "guide": BELOW | {"caching", "family", "frontdoor", "patterns", "schedule", "wrapping"},
    "install": BELOW
    | {"checked", "choices", "exchange", "family", "frontdoor", "guide", "kernels", "patterns", "schedule", "wrapping"},
    "processors": BELOW | {"family", "install", "patterns", "schedule", "wrapping"},
    "pipelines": BELOW | {"blocks", "exchange", "family", "frontdoor", "kernels", "patterns", "reuse", "streaming"},
    "recipe": BELOW | {"caching", "patterns", "schedule"},
    "report": BELOW | {"patterns", "recipe"},
    "api": BELOW | {"caching", "choices", "family", "frontdoor", "install", "patterns", "recipe", "report", "schedule"},
    "render": BELOW
    | {"_samples", "api", "caching", "family", "guide", "patterns", "pipelines", "recipe", "report", "reuse"}
    | {"parallel", "schedule", "streaming"},
    "caching": BELOW | {"family", "frontdoor", "kernels", "schedule"},
    "reuse": BELOW | {"blocks", "kernels", "patterns", "streaming"},
    "streaming": BELOW,
    "lab": BELOW
    | {"api", "blocks", "caching", "family", "guide", "kernels", "patterns", "pipelines", "recipe", "render", "report"}
    | {"_samples", "exchange", "parallel", "reuse", "schedule", "streaming", "wrapping"},
    "_samples": set(),
}


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "vidaccel").with_suffix("").parts[0]


def imports(path: Path) -> Iterator[str]:
    """Parts of vidaccel that a file imports, wherever in the file."""
    package = ["vidaccel", *path.relative_to(ROOT / "vidaccel").parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = [*base, *(node.module or "").split(".")] if node.module else base
            names = [".".join([*stem, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("vidaccel."):
                yield name.split(".")[1]


def sources() -> list[Path]:
    return sorted(p for p in (ROOT / "vidaccel").rglob("*.py") if "cli" not in p.parts)


def test_import_arrows() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources()
        if (part := part_of(path)) in ARROWS
        for name in imports(path)
        if name != part
        and name not in ARROWS[part]
        and (ROOT / "vidaccel" / name).with_suffix(".py").exists() | (ROOT / "vidaccel" / name).is_dir()
    ]
    assert not wrong, "\n".join(wrong)


def test_the_arrow_test_sees_imports() -> None:
    assert set(imports(ROOT / "vidaccel" / "install.py")) >= {"family", "frontdoor", "patterns", "schedule", "wrapping"}
    assert "errors" in set(imports(ROOT / "vidaccel" / "patterns" / "radial.py"))


def test_patterns_take_nothing_but_selection_from_the_kernels() -> None:
    names = {
        node.module
        for path in (ROOT / "vidaccel" / "patterns").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "kernels"
    }
    assert names == {"kernels.select"}


@pytest.mark.parametrize("folder", ["patterns", "kernels"])
def test_patterns_and_kernels_know_no_diffusers(folder: str) -> None:
    for path in (ROOT / "vidaccel" / folder).rglob("*.py"):
        assert "diffusers" not in {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            for name in (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            )
        }, path


def python(code: str, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_needs_neither_diffusers_nor_triton() -> None:
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("diffusers", "triton", "transformers", "accelerate"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import torch, time
start = time.perf_counter()
import vidaccel, vidaccel.patterns, vidaccel.kernels, vidaccel.processors
mask = vidaccel.patterns.Radial(block=16)
print(time.perf_counter() - start)
"""
    assert float(python(code)) < 2.0


def test_hugging_face_kernels_is_not_shadowed() -> None:
    """Python started in the repository root must not take our folders for somebody's packages."""
    code = """
import importlib.util, sys
assert "" in sys.path or "." in sys.path
for name in ("kernels", "pipelines", "samples", "tests"):
    spec = importlib.util.find_spec(name)
    assert spec is None or spec.origin is None or "site-packages" in spec.origin, (name, spec)
from diffusers import WanPipeline
"""
    python(code)
    for folder in ("kernels", "pipelines"):
        assert not (ROOT / folder / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_a_real_kernels_package_wins(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("marker = 'the real one'\n")
    assert (
        python(f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.marker)")
        == "the real one"
    )


def test_exports_are_sorted_few_and_there() -> None:
    assert vidaccel.__all__ == sorted(vidaccel.__all__)
    assert len(vidaccel.__all__) <= 14
    assert all(hasattr(vidaccel, name) for name in vidaccel.__all__)


def test_version_agrees_with_the_package() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{vidaccel.__version__}"' in pyproject
