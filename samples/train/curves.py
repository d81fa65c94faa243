"""Writes what sweeps show into a card, between the marks `<!-- NAME of a report -->` and `<!-- end -->`.

    python -m samples.train.curves --model samples/models/wan-tiny

The tables are made from `reports/NAME.json`, so a card cannot say anything else than its reports.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from samples.train.controls import CONTROLS

Cells = dict[str, dict[str, Any]]
_MARKED = re.compile(r"<!-- (?!end)(\S+) -->\n.*?<!-- end -->", re.DOTALL)
_KINDS = {"control": ("random steps", "reuse", "fewer steps"), "rival": ("diffusers", "cache-dit")}


def main(words: list[str] | None = None) -> None:
    """Write every marked table of the card anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the exported folder")
    card = parser.parse_args(words).model / "README.md"
    card.write_text(filled(card))


def filled(card: Path) -> str:
    """Return the card's text with the tables that its reports give."""

    def fill(found: re.Match[str]) -> str:
        report = json.loads((card.parent / "reports" / f"{found[1]}.json").read_text())
        swept = [cell for cell in report["cells"].values() if "failed" not in cell]
        table = attention(report["cells"]) if any("attention" in cell for cell in swept) else caches(report["cells"])
        return f"<!-- {found[1]} -->\n{table}<!-- end -->"

    return _MARKED.sub(fill, card.read_text())


def attention(cells: Cells) -> str:
    """Return a row for each pattern, best first, and a column for each density: clips right, and PSNR to dense."""
    swept = {name: cell for name, cell in cells.items() if "attention" in cell}
    densities = sorted({cell["density"] for cell in swept.values()}, reverse=True)
    rows: dict[str, dict[float, dict[str, Any]]] = {}
    for cell in swept.values():
        rows.setdefault(cell["attention"], {})[cell["density"]] = cell

    def order(name: str) -> tuple[bool, int]:
        return name in CONTROLS, -sum(cell.get("right", 0) for cell in rows[name].values())

    header = ["", *(f"density {density}" for density in densities)]
    lines = [
        [f"control: {name}" if name in CONTROLS else name, *(_cell(rows[name].get(density)) for density in densities)]
        for name in sorted(rows, key=order)
    ]
    return table(header, lines)


def caches(cells: Cells) -> str:
    """Return the rows that no other of their kind beats at once in steps, right clips and PSNR; and all controls."""
    by_kind: dict[str, list[tuple[str, dict[str, Any]]]] = {"ours": [], "rival": [], "control": []}
    for name, cell in cells.items():
        if "cache" in cell and "failed" not in cell:
            kind = next((kind for kind, heads in _KINDS.items() if cell["cache"].startswith(heads)), "ours")
            by_kind[kind].append((name, cell))
    lines = []
    for kind, rows in by_kind.items():
        for name, cell in sorted(rows, key=lambda row: (row[1]["computed"], -row[1]["psnr_to_dense"])):
            if kind == "control" or not any(_beats(other, cell) for _, other in rows):
                scores = [f"{cell['computed']:.2f}", str(cell["right"]), f"{cell['psnr_to_dense']:.1f}"]
                lines.append([name if kind == "ours" else f"{kind}: {name}", *scores])
    return table(["", "steps computed", "right", "PSNR, dB"], lines)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *rows))


def _cell(cell: dict[str, Any] | None) -> str:
    return f"{cell['right']}, {cell['psnr_to_dense']:.1f} dB" if cell and "failed" not in cell else "not measured"


def _beats(one: dict[str, Any], other: dict[str, Any]) -> bool:
    mine, its = ((-cell["computed"], cell["right"], cell["psnr_to_dense"]) for cell in (one, other))
    return mine != its and all(a >= b for a, b in zip(mine, its, strict=True))


if __name__ == "__main__":
    main()
