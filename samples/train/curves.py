"""Writes what sweeps show into a card, between the marks `<!-- NAME of a report -->` and `<!-- end -->`.

    python -m samples.train.curves --model samples/models/wan-tiny

The tables are made from `reports/NAME.json`, so a card cannot say anything else than its reports. `<!-- NAME rows -->`
asks for one table with every cell and its intervals.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from samples.train.cells import CURVES
from samples.train.controls import CONTROLS
from samples.train.rivals import SWEEPS

Cells = dict[str, dict[str, Any]]
_MARKED = re.compile(r"<!-- (?!end)(\S+)( rows)? -->\n.*?<!-- end -->", re.DOTALL)
_AT = 0.05
"""By how much delivered density may miss the one asked for before a cell no longer counts as of that density."""
MARGIN = (10.0, 3.0)
"""Points of clips right, or decibels of PSNR to dense, that a pattern has to be ahead of a control."""
SHARES = (0.15, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6)
"""Columns of a table of caches: shares of the steps that are computed."""
_CONTROLS = ("random steps", "reuse", "fewer steps")
_KINDS = {"control": _CONTROLS, "rival": tuple(SWEEPS)}
_METHODS = (*CURVES, *SWEEPS, *_CONTROLS)


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
        made = (rows if found[2] else tables)(report["cells"])
        return f"<!-- {found[1]}{found[2] or ''} -->\n{made}<!-- end -->"

    return _MARKED.sub(fill, card.read_text())


def is_sweep(cells: Cells) -> bool:
    """Whether these are patterns, or caches."""
    return any("attention" in cell or "cache" in cell for cell in cells.values())


def tables(cells: Cells) -> str:
    """Return the tables of a sweep."""
    return f"{attention(cells)}\n{leads(cells)}" if _swept(cells) else f"{caches(cells)}\n{cache_leads(cells)}"


def rows(cells: Cells) -> str:
    """Return a row for each cell that ran: share computed and right, and how it differs from dense, with intervals."""
    header = ["", "computed", "right", "to dense", "PSNR, dB", "SSIM"]
    return table(header, [_row(name, cell) for name, cell in cells.items() if "failed" not in cell])


def attention(cells: Cells) -> str:
    """Return a row for each pattern, best first, and a column for each density: clips right, and PSNR to dense.

    Where a pattern computed another share of the blocks than asked for, that share stands behind.
    """
    swept = {name: cell for name, cell in cells.items() if "attention" in cell}
    densities = sorted({cell["density"] for cell in swept.values()}, reverse=True)
    by_name: dict[str, dict[float, dict[str, Any]]] = {}
    for cell in swept.values():
        by_name.setdefault(cell["attention"], {})[cell["density"]] = cell

    def order(name: str) -> tuple[bool, int]:
        return name in CONTROLS, -sum(cell.get("right", 0) for cell in by_name[name].values())

    header = ["", *(f"density {density}" for density in densities)]
    lines = [
        [
            f"control: {name}" if name in CONTROLS else name,
            *(_cell(by_name[name].get(density)) for density in densities),
        ]
        for name in sorted(by_name, key=order)
    ]
    return table(header, lines)


def leads(cells: Cells) -> str:
    """Return by how much the best pattern of each density, and radial attention, are ahead of each control.

    The best is that with the most clips right. Points are hundredths of all clips; a lead below both of `MARGIN` is
    said to be too little: there a pattern is not told from one that should fail. Cells that computed more or less than
    asked for are left out.
    """
    swept = {(cell["attention"], cell["density"]): cell for cell in _swept(cells) if _is_at_density(cell)}
    lines = []
    for density in sorted({density for _, density in swept}, reverse=True):
        ours = {name: cell for (name, at), cell in swept.items() if at == density and name not in CONTROLS}
        best = max(ours, key=lambda name: (ours[name]["right"], ours[name]["psnr_to_dense"]))
        for name in dict.fromkeys((best, "radial")):
            controls = (swept.get((control, density)) for control in CONTROLS)
            lines.append([str(density), name, *(_lead(ours.get(name), control) for control in controls)])
    return table(["density", "pattern", *(f"ahead of {name}" for name in CONTROLS)], lines)


def caches(cells: Cells) -> str:
    """Return a row for each method, a column for each share of computed steps: its best threshold.

    A column goes from the share before it. Clips right, PSNR to dense, and how many times faster the transformer was;
    best is that with the highest PSNR.
    """
    by_method: dict[str, list[dict[str, Any]]] = {}
    for cell in _cached(cells):
        by_method.setdefault(_method(cell["cache"]), []).append(cell)
    names = [*(each for each in _METHODS if each in by_method), *(each for each in by_method if each not in _METHODS)]
    lines = []
    for name in sorted(names, key=_kind):
        line = [f"{kind}: {name}" if (kind := _kind(name)) != "" else name]
        for low, high in itertools.pairwise((0.0, *SHARES)):
            best = _best(cell for cell in by_method[name] if low < cell["computed"] <= high)
            line.append("" if best is None else f"{_gist(best)}, {_times(best, cells):.1f}x")
        lines.append(line)
    return table(["", *(f"to {share:.2f}" for share in SHARES)], lines)


def cache_leads(cells: Cells) -> str:
    """Return what is best by PSNR where at most a share of the steps may be computed, and how it stands to controls.

    Shares are those of the controls, and up to 0.01 more. A lead below both of `MARGIN` is said to be too little.
    """
    swept, lines = _cached(cells), []
    for share in sorted({cell["computed"] for cell in swept if cell["cache"] == "reuse"}):
        fitting = [cell for cell in swept if cell["computed"] <= share + 0.0101]
        ours = _best(cell for cell in fitting if not _kind(cell["cache"]))
        named = [
            ours,
            _best(cell for cell in fitting if cell["cache"] == "cg-taylor"),
            _best(cell for cell in fitting if _kind(cell["cache"]) == "rival"),
        ]
        line = [f"{share:.2f}", *("none" if cell is None else f"{cell['cache']}: {_gist(cell)}" for cell in named)]
        for name in ("reuse", "random steps"):
            line.append(_lead(ours, _best(c for c in swept if c["cache"] == name and c["computed"] == share)))
        lines.append(line)
    header = ["steps computed, at most", "best of ours", "cg-taylor", "best rival", "ahead of reuse", "of random steps"]
    return table(header, lines)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *rows))


def _swept(cells: Cells) -> list[dict[str, Any]]:
    return [cell for cell in cells.values() if "attention" in cell and "failed" not in cell]


def _lead(ours: dict[str, Any] | None, control: dict[str, Any] | None) -> str:
    if ours is None or control is None:
        return "not measured"
    points = 100 * (ours["right"] - control["right"]) / ours["clips"]
    decibel = ours["psnr_to_dense"] - control["psnr_to_dense"]
    small = points < MARGIN[0] and decibel < MARGIN[1]
    return f"{points:+.0f} points, {decibel:+.1f} dB{': too little' if small else ''}"


def _is_at_density(cell: dict[str, Any]) -> bool:
    return abs(float(cell.get("delivered_density", cell["density"])) - float(cell["density"])) <= _AT


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None or "failed" in cell:
        return "not measured"
    delivered = "" if _is_at_density(cell) else f" ({cell['delivered_density']:.2f})"
    return f"{cell['right']}, {cell['psnr_to_dense']:.1f} dB{delivered}"


def _row(name: str, cell: dict[str, Any]) -> list[str]:
    low, high = cell["right_interval"]
    row = [name, f"{cell['computed']:.2f}", f"{cell['right'] / cell['clips']:.2f} ({low:.2f} to {high:.2f})"]
    if "right_to_dense" not in cell:
        return [*row, "", "", ""]
    difference, low, high = cell["right_to_dense"]
    row += [f"{difference:+.2f} ({low:+.2f} to {high:+.2f})", f"{cell['psnr_to_dense']:.1f}"]
    return [*row, f"{cell['ssim_to_dense']:.3f}"]


def _cached(cells: Cells) -> list[dict[str, Any]]:
    return [cell for cell in cells.values() if "cache" in cell and "failed" not in cell and cell["computed"] < 1]


def _method(cache: str) -> str:
    return cache if cache in _METHODS else f"{cache.partition(',')[0]}, other forms"


def _kind(name: str) -> str:
    return next((kind for kind, heads in _KINDS.items() if name.startswith(heads)), "")


def _best(cells: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    return max(cells, key=lambda cell: float(cell["psnr_to_dense"]), default=None)


def _gist(cell: dict[str, Any]) -> str:
    return f"{cell['right']}, {cell['psnr_to_dense']:.1f} dB"


def _times(cell: dict[str, Any], cells: Cells) -> float:
    return float(cells["dense"]["transformer_seconds"] / cell["transformer_seconds"])


if __name__ == "__main__":
    main()
