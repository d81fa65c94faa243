"""The kernels, compiled for a GPU that is not here: no spills, asynchronous tensor cores, shared memory that fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from vidaccel.kernels import gluon

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "kernels/bench/compile_health.py", "sm_90"],
        cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_every_kernel(rows: list[dict[str, Any]]) -> None:
    wanted = {"portable": (16, 32, 64, 128), "tma": (64, 128)}
    every = {(kernel, d, block) for kernel, blocks in wanted.items() for block in blocks for d in (64, 128)}
    every |= {("gluon", d, block) for d, block in gluon.CONFIGS}
    assert {(row["kernel"], row["d"], row["block"]) for row in rows} == every
    assert all(row["shared"] <= 232_448 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["portable", "tma"])
def test_triton(rows: list[dict[str, Any]], kernel: str) -> None:
    for row in rows:
        if row["kernel"] == kernel:
            assert row["stack"] == 0, row
            assert "STL" not in row, row
            # Warpgroup instructions need 64 rows; smaller blocks use the older tensor core path.
            assert row.get("HGMMA" if row["block"] >= 64 else "HMMA", 0) > 0, row
            # Two waits a loop: for the scores, and for the weighted values of the step before.
            assert row.get("WARPGROUP.DEPBAR", 0) <= (4 if row["window"] else 2), row
            assert (row.get("UTMALDG", 0) > 0) == (kernel == "tma"), row


@pytest.mark.slow
def test_gluon(rows: list[dict[str, Any]]) -> None:
    found = [row for row in rows if row["kernel"] == "gluon"]
    every = {(*form, *extras) for form, extras in product(gluon.CONFIGS, product((0, 1, 2), (False, True)))}
    assert {(row["d"], row["block"], row["window"], row["bias"]) for row in found if row["dtype"] == "bf16"} == every
    in_fp16, in_bf16 = (
        {row["config"]["streams"] for row in found if row["dtype"] == dtype} for dtype in ("fp16", "bf16")
    )
    assert in_fp16 == in_bf16
    for row in found:
        assert row["stack"] == 0, row
        assert "STL" not in row, row
        assert row["HGMMA"] > 0, row
        assert row["UTMALDG"] > 0, row
        # Scores and values of a tile, and of the first and the last: more would mean that they wait in turn.
        groups = 2 if row["config"]["streams"] == 1 else 3
        assert row["WARPGROUP.DEPBAR"] <= 4 * groups, row


def test_gluon_takes_what_it_is_given() -> None:
    """Constants are handed over by their places."""
    pytest.importorskip("triton")
    from vidaccel.kernels.gluon_kernel import block_sparse

    constants = ["D", "KEYS", "UNITS", *(name.upper() for name in gluon.Config._fields), "WINDOW", "BIAS"]
    assert block_sparse.arg_names[-len(constants) :] == constants
