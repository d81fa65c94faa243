"""A measurement on disk: cell after cell, whole or not at all, so that a stopped run goes on where it was."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vidaccel.env import environment


class Record:
    """A JSON file with settings, environment and one entry a cell.

    Args:
        file: Where it is; what it holds already is kept, unless its settings differ.
        settings: What all cells share.

    Raises:
        ValueError: the file was measured with other settings.
    """

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self.file = file
        settings = json.loads(json.dumps(settings))
        self.data: dict[str, Any] = {"settings": settings, "commit": commit(), **environment(), "cells": {}}
        if file.exists():
            kept = json.loads(file.read_text())
            if kept["settings"] != settings:
                raise ValueError(f"{file} was measured with other settings; choose another file, or delete it")
            self.data["cells"] = kept["cells"]

    @property
    def cells(self) -> dict[str, Any]:
        """What was measured so far, by the cell's name."""
        cells: dict[str, Any] = self.data["cells"]
        return cells

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Keep a cell and write the file."""
        self.cells[name] = result
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        # A cell a line: a tenth of the lines, and a difference shows which cells are new.
        head = json.dumps(self.data | {"cells": {}}, indent=1).removesuffix("{}\n}")
        cells = ((json.dumps(each), json.dumps(cell, separators=(",", ":"))) for each, cell in self.cells.items())
        lines = ",\n".join(f"  {each}: {cell}" for each, cell in cells)
        temporary.write_text(f"{head}{{\n{lines}\n }}\n}}\n")
        temporary.replace(self.file)


def packed(answers: Iterable[bool]) -> str:
    """Write answers as hexadecimal digits: four to a digit, the first one highest, no where the last four are fewer."""
    bits = "".join("01"[answer] for answer in answers)
    return "".join(f"{int(bits[start : start + 4].ljust(4, '0'), 2):x}" for start in range(0, len(bits), 4))


def unpacked(digits: str, count: int) -> list[bool]:
    """Read so many answers that were packed."""
    return [bool(int(digits[place // 4], 16) >> (3 - place % 4) & 1) for place in range(count)]


def commit() -> str:
    """Return the commit of the working tree, or what the variable COMMIT says where there is no git."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
