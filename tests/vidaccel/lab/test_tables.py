"""Tables are what the records say; the README's are up to date."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vidaccel.errors import UsageError
from vidaccel.lab import tables

ROOT = Path(__file__).parents[3]
ROWS = [
    {
        "kind": "dense", "model": "m", "size": [1, 2, 3], "variant": "flash3", "compiled": False, "ok": True,
        "layer_ms": {"a": 1.25, "b": 2.0}, "call_ms": 1234.5,
    },
    {
        "kind": "sparse", "model": "m", "size": [1, 2, 3], "variant": "radial 0.25", "compiled": True, "ok": True,
        "layer_ms": {"a": 1.0, "b": 1.0}, "call_ms": 617.2, "speedup": 2.0, "bound": 2.4, "reached": 0.83,
    },
    {"kind": "sparse", "model": "m", "size": [1, 2, 3], "variant": "x", "compiled": False, "ok": False,
     "reason": "a|b"},
    {"kind": "cache", "model": "m", "size": [1, 2, 3], "variant": "cg-taylor", "compiled": False, "ok": True,
     "skipped_share": 0.0215, "cache_bytes": 2**31},
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "r.json").write_text(json.dumps({"rows": ROWS}))
    return tmp_path


def test_a_table_is_its_rows(folder: Path) -> None:
    assert tables.table("r.json models", folder).splitlines() == [
        "| model | size | attention | a layer, ms | a call, ms | times faster | bound | reached |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| m | 1x2, 3 frames | flash3 | 1.2 + 2.0 | 1,234 |  |  |  |",
        "| m | 1x2, 3 frames | radial 0.25, compiled | 1.0 + 1.0 | 617 | 2.00 | 2.40 | 0.83 |",
        "| m | 1x2, 3 frames | x |  |  |  |  | no figure: a/b |",
    ]
    assert tables.table("r.json caches", folder).splitlines()[2:] == ["| m | 1x2, 3 frames | cg-taylor | 2.15 | 2.00 |"]
    assert len(tables.table("r.json models kind=dense compiled=False", folder).splitlines()) == 3


def test_records_side_by_side(folder: Path) -> None:
    (folder / "s.json").write_text((folder / "r.json").read_text().replace('"m"', '"other"'))
    made = tables.table('r.json,s.json calls "variant=radial 0.25" compiled=True', folder).splitlines()[2:]
    assert [line.split(" | ")[0] for line in made] == ["| m", "| other"]
    with pytest.raises(UsageError, match=r"t\.json is no record"):
        tables.table("r.json,t.json calls", folder)


def test_files_are_rewritten_and_checked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = folder / "README.md"
    page.write_text("a\n<!-- table r.json caches -->\nold\n<!-- /table -->\nb\n")
    assert tables.main([str(page), "--check"]) == 1
    assert "out of date" in capsys.readouterr().out
    assert tables.main([str(page)]) == 0
    assert "| 2.15 |" in page.read_text()
    assert page.read_text().startswith("a\n")
    assert page.read_text().endswith("<!-- /table -->\nb\n")
    assert tables.main([str(page), "--check"]) == 0


@pytest.mark.parametrize(
    ("spec", "words"),
    [("r.json nosuch", "kinds? of table"), ("no.json models", "no record"), ("r.json models model=q", "no row")],
)
def test_what_cannot_be_made(folder: Path, spec: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        tables.table(spec, folder)


def test_kernel_records_make_tables() -> None:
    made = tables.table("kernels/bench/results/cpu.json kernels kernel=cpu", ROOT)
    assert "| 4,608 x 8 x 64 |" in made


def test_kernels_of_a_case_stand_side_by_side() -> None:
    made = tables.table("kernels/bench/results/wan-480p-h100.json rates pattern=radial density=0.25", ROOT)
    assert [line.split("|")[3:6] for line in made.splitlines()[2:]] == [
        [" 0.25 ", " 128 ", " 0.98 "],
        [" 0.25 ", " 64 ", " 0.75 "],
    ]


def test_causal_records_make_tables() -> None:
    made = tables.table("pipelines/bench/results/causal-wan-1.3b-480p-h100.json streams", ROOT)
    assert made.splitlines()[2].startswith("| 480x832, window of 12 | dense | 32.3 | 18.4 | 372 | 1.00 |")


PAGES = [path for path in ROOT.glob("**/*.md") if not path.relative_to(ROOT).parts[0].startswith(".")]


@pytest.mark.parametrize("path", sorted(PAGES), ids=lambda path: str(path.relative_to(ROOT)))
def test_committed_tables_are_up_to_date(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert tables.render(text, path.parent) == text
