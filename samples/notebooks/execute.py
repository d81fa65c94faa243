"""Runs notebooks in place, without Jupyter: outputs are what a reader sees before running anything.

    python samples/notebooks/execute.py samples/notebooks/long_video.ipynb

A cell's text, and its last expression as text, HTML or a picture, become its outputs. The first code cell holds
settings.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def run(file: Path, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Execute a notebook and return it with its outputs.

    Args:
        file: the notebook.
        settings: names in place of those that the first code cell sets.

    Raises:
        Exception: whatever a cell raises.
        KeyError: a setting that the first code cell does not have.
    """
    notebook: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    sys.path.insert(0, str(file.resolve().parent))
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        for number, cell in enumerate(cells):
            cell["outputs"], cell["execution_count"] = _run("".join(cell["source"]), names), number + 1
            if number == 0:
                if unknown := sorted(set(settings or {}) - set(names)):
                    raise KeyError(f"{file.name} has no setting {unknown[0]}")
                names |= settings or {}
    finally:
        sys.path.remove(str(file.resolve().parent))
    return notebook


def _run(source: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    text, value = io.StringIO(), None
    with contextlib.redirect_stdout(text):
        exec(compile(tree, "<cell>", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
    outputs = []
    if text.getvalue():
        lines = text.getvalue().splitlines(keepends=True)
        outputs.append({"output_type": "stream", "name": "stdout", "text": lines})
    if value is not None:
        outputs.append({"output_type": "display_data", "metadata": {}, "data": _data(value)})
    return outputs


def _data(value: Any) -> dict[str, Any]:
    if hasattr(value, "_repr_html_"):
        return {"text/html": value._repr_html_(), "text/plain": "<plots>"}
    for kind in ("png", "jpeg"):
        if hasattr(value, f"_repr_{kind}_"):
            picture = base64.b64encode(getattr(value, f"_repr_{kind}_")()).decode()
            return {f"image/{kind}": picture, "text/plain": "<picture>"}
    return {"text/plain": repr(value)}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        done = run(Path(name))
        Path(name).write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
