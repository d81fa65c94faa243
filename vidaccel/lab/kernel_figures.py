"""What follows from a record of `vidaccel bench kernels`: the record holds only what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def by_kernel(cases: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each kernel of each case.

    Args:
        cases: as `kernels.bench.run` yields them and records hold them.

    Returns:
        The case's fields, `key` with the kernel's name behind it, `kernel`, `ok`, and what the record says of the
        kernel. Where it is `ok` also `tflops` (of the pairs of tokens that it computes: all, if it is dense, else those
        in visited blocks) and, if a dense kernel was right, `ratio` (times faster than the fastest such one of the
        case) and `of_dense` (its TFLOP/s over that one's).

    Raises:
        KeyError: a row is no case.
    """
    rows = []
    for case in cases:
        shared = {key: value for key, value in case.items() if key != "kernels"}
        kernels: Mapping[str, Mapping[str, Any]] = case["kernels"]
        pairs = case["heads"] * case["tokens"] ** 2
        dense = min((found["ms"] for name, found in kernels.items() if _is_dense(name) and _ok(found)), default=None)
        for name, found in kernels.items():
            row = {**shared, "key": f"{case['key']}, {name}", "kernel": name, "ok": _ok(found), **found}
            if row["ok"]:
                ms, share = found["ms"], 1.0 if _is_dense(name) else case["touched"]
                row["tflops"] = 4 * case["d"] * pairs * share / ms / 1e9
                if dense is not None:
                    row |= {"ratio": dense / ms, "of_dense": share * dense / ms}
            rows.append(row)
    return rows


def _is_dense(kernel: str) -> bool:
    """By the name that `kernels.bench_rivals` gives."""
    return kernel.startswith("dense")


def _ok(found: Mapping[str, Any]) -> bool:
    return "reason" not in found
