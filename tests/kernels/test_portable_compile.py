"""The Triton kernel, compiled for a GPU that is not here: no spills, tensor cores, shared memory that fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "kernels/bench/compile_health.py", "sm_90"],
        cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_sm_90(rows: list[dict[str, Any]]) -> None:
    assert {(row["d"], row["block"]) for row in rows} >= {(d, b) for d in (64, 128) for b in (16, 32, 64, 128)}
    for row in rows:
        assert row["shared"] <= 232_448, row
        assert row["stack"] == 0, row
        assert "STL" not in row, row
        # Warpgroup instructions need 64 rows; smaller blocks use the older tensor core path.
        assert row.get("HGMMA" if row["block"] >= 64 else "HMMA", 0) > 0, row
