"""Tables in Markdown files, made from committed records: `python -m vidaccel.lab.tables README.md [--check]`.

A table stands between two comments, the first of which says what it shows:

    <!-- table kernels/bench/results/h100.json kernels kernel=gluon,portable block=128 -->
    ...
    <!-- /table -->

The kinds are those of `KINDS`. More records of the same folder may follow the first one's name after commas.
`key=value,value` keeps the rows in which that key has one of these values; quotes stand around what has spaces. To
`kernels` and `rates` a row is a kernel of a case. Rows without a figure are shown with the reason why; what is not in
the record, and does not follow from it, cannot be in the table.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import replacing
from .kernel_figures import by_kernel

_TABLE = re.compile(r"(<!-- table (?P<spec>[^\n]*?) -->\n).*?(<!-- /table -->)", re.DOTALL)

Row = Mapping[str, Any]
Columns = Mapping[str, Callable[[Row], object]]


def _number(key: str, digits: int = 2, scale: float = 1.0) -> Callable[[Row], object]:
    def cell(row: Row) -> object:
        value = row.get(key)
        return "" if value is None else f"{scale * value:,.{digits}f}"

    return cell


def _layers(row: Row) -> str:
    return " + ".join(f"{ms:,.1f}" for ms in (row.get("layer_ms") or {}).values())


def _part(name: str) -> Callable[[Row], object]:
    return lambda row: " + ".join(f"{split[name]:,.1f}" for split in (row.get("split") or {}).values())


def _predicted(ranks: str) -> Callable[[Row], object]:
    return lambda row: f"{row['predicted'][ranks]['speedup']:.1f}" if row["ok"] else ""


def _size(row: Row) -> str:
    height, width, frames = row["size"]
    return f"{height}x{width}, {frames} frames"


def _variant(row: Row) -> str:
    return f"{row['variant']}{', compiled' if row['compiled'] else ''}"


KINDS: Mapping[str, tuple[Mapping[str, tuple[object, ...]], Columns]] = {
    "kernels": (
        {},
        {
            "shape": lambda row: row["name"],
            "tokens x heads x channels": lambda row: f"{row['tokens']:,} x {row['heads']} x {row['d']}",
            "mask": lambda row: row["pattern"],
            "block": lambda row: row["block"],
            "density": lambda row: row["density"],
            "kernel": lambda row: row["kernel"],
            "ms": _number("ms"),
            "TFLOP/s": _number("tflops", 1),
            "times faster": _number("ratio"),
        },
    ),
    # A line for each case of a record of kernels: shares of the dense rate, side by side.
    "rates": (
        {},
        {
            "shape": lambda row: row["name"],
            "mask": lambda row: row["pattern"],
            "density": lambda row: row["density"],
            "blocks of": lambda row: row["block"],
            "ours": _number("gluon"),
            "ours, holes counted": _number("visited of dense"),
            "FlashAttention 4": _number("fa4"),
            "FastVideo": _number("fastvideo"),
            "FlashInfer": _number("flashinfer"),
            "FlexAttention": _number("flex"),
        },
    ),
    "around": (
        {},
        {
            "layer": lambda row: row["name"],
            "work": lambda row: row["work"],
            "ms": _number("ms"),
            "GB/s": _number("gb_s", 0),
            "of a copy's": _number("ratio"),
            "of sparse attention's time": _number("share", 3),
        },
    ),
    "models": (
        {"kind": ("dense", "sparse")},
        {
            "model": lambda row: row["model"],
            "size": _size,
            "attention": _variant,
            "a layer, ms": _layers,
            "a call, ms": _number("call_ms", 0),
            "in full, ms": _number("whole_ms", 0),
            "times faster": _number("speedup"),
            "bound": _number("bound"),
            "reached": _number("reached"),
        },
    ),
    "calls": (
        {"kind": ("sparse",)},
        {
            "model": lambda row: row["model"],
            "size": _size,
            "attention": _variant,
            "stock, ms": _number("against_ms", 0),
            "with it, ms": _number("call_ms", 0),
            "times faster": _number("speedup"),
        },
    ),
    "layers": (
        {"kind": ("dense", "sparse")},
        {
            "model": lambda row: row["model"],
            "size": _size,
            "attention": _variant,
            "a layer, ms": _layers,
            "selection": _part("selection"),
            "norm, RoPE, reorder": _part("norm, RoPE, reorder"),
            "attention, ms": _part("attention"),
            "rest": _part("rest"),
            "attention alone": _number("kernel_alone_ms", 1),
        },
    ),
    "parallel": (
        {"kind": ("call",)},
        {
            "model": lambda row: row["model"],
            "size": _size,
            "attention": _variant,
            "GPUs": lambda row: row["ranks"],
            "a call on one, ms": lambda row: f"{row['one']['call_ms']:,.0f}" if row["ok"] else "",
            "on all, ms": lambda row: f"{row['all']['call_ms']:,.0f}" if row["ok"] else "",
            "times faster": _number("speedup"),
            "exchange, % of it": _number("exchange_share", 1, 100.0),
            "beside weights, GiB: one, all": lambda row: (
                f"{row['one']['activations_gib']:.1f}, {row['all']['activations_gib']:.1f}" if row["ok"] else ""
            ),
            "a video each, times faster": _number("videos_speedup"),
            "predicted for 4": _predicted("4"),
            "for 8": _predicted("8"),
        },
    ),
    "renders": (
        {"kind": ("render",)},
        {
            "who": _variant,
            "first render, s": _number("first_s", 1),
            "denoising, s": _number("denoise_s"),
            "whole, s": _number("total_s"),
            "times faster": _number("speedup"),
            "PSNR, dB": _number("psnr", 1),
            "SSIM": _number("ssim", 3),
            "peak, GiB": _number("peak_gib", 1),
        },
    ),
    "caches": (
        {"kind": ("cache",)},
        {
            "model": lambda row: row["model"],
            "size": _size,
            "cache": lambda row: row["variant"],
            "a skipped step, % of a full one": _number("skipped_share", 2, 100.0),
            "held, GiB": _number("cache_bytes", 2, 2.0**-30),
        },
    ),
    "streams": (
        {},
        {
            "size": lambda row: f"{row['height']}x{row['width']}, window of {row['rollout']['window']}",
            "method": lambda row: f"{row['rival']}{', compiled' if row['compiled'] else ''}",
            "frames a second": _number("fps", 1),
            "decoded too": _number("fps_with_vae", 1),
            "a chunk, ms": _number("chunk_ms", 0),
            "times faster": _number("speedup"),
            "attention, ms a layer": _number("attention_ms"),
            "attention, times faster": _number("attention_speedup"),
            "first chunks, ms": _number("first_ms", 0),
            "last chunks, ms": _number("last_ms", 0),
        },
    ),
    "trajectories": (
        {"kind": ("trajectory",)},
        {
            "model": lambda row: row["model"],
            "size": _size,
            "computed": lambda row: row["variant"],
            "seconds": _number("seconds", 1),
            "dense, seconds": _number("dense_seconds", 1),
            "times faster": _number("speedup"),
        },
    ),
}


def render(text: str, folder: Path) -> str:
    """A Markdown text with all its tables made anew.

    Args:
        text: the file.
        folder: paths in it are relative to this.

    Raises:
        UsageError: a table that cannot be made.
    """
    return _TABLE.sub(lambda found: f"{found[1]}{table(found['spec'], folder)}\n{found[3]}", text)


def table(spec: str, folder: Path) -> str:
    """One table.

    Args:
        spec: "FILE,FILE KIND key=value,value ...".
        folder: where the first FILE is; the others lie beside it.

    Raises:
        UsageError: no such file or kind, or no row that fits.
    """
    name, kind, *filters = [*shlex.split(spec), "", ""]
    filters = [each for each in filters if each]
    if kind not in KINDS:
        raise UsageError(f"table {spec!r}: {kind!r} is no kind of table; there are {', '.join(KINDS)}")
    first, *others = name.split(",")
    rows: list[Row] = []
    for file in (Path(first), *(Path(first).with_name(other) for other in others)):
        try:
            found = json.loads((folder / file).read_text(encoding="utf-8"))["rows"]
            rows += by_kernel(found) if kind in ("kernels", "rates") else found
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(f"table {spec!r}: {file} is no record: {error}") from None
    wanted, columns = KINDS[kind]
    asked = {key: tuple(value.split(",")) for key, _, value in (each.partition("=") for each in filters)}
    kept = [
        row
        for row in rows
        if all(row.get(key) in values for key, values in wanted.items())
        and all(str(row.get(key)) in values for key, values in asked.items())
    ]
    if not kept:
        raise UsageError(f"table {spec!r}: no row of {name} fits")
    return _markdown(_by_case(kept) if kind == "rates" else kept, columns)


def _by_case(rows: Sequence[Row]) -> Sequence[Row]:
    """One row for each case of a record of kernels, with what share of the dense rate each kernel reached."""
    cases: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("name", "pattern", "block", "density"))
        case = cases.setdefault(key, {**row, "ok": True})
        case[row["kernel"]] = row.get("of_dense")
        if row["kernel"] == "gluon" and {"of_dense", "visited"} <= set(row):
            case["visited of dense"] = row["of_dense"] * row["visited"] / row["touched"]
    return [cases[key] for key in sorted(cases, key=lambda key: (key[0], -key[2], key[1], -key[3]))]


def _markdown(rows: Sequence[Row], columns: Columns) -> str:
    cells = [[str(cell(row)) for cell in columns.values()] for row in rows]
    for row, line in zip(rows, cells, strict=True):
        if not row["ok"]:
            line[-1] = f"no figure: {row['reason']}".replace("|", "/")
    # A column in which nobody has anything says nothing.
    used = [n for n in range(len(columns)) if any(line[n] for line in cells)]
    lines = [list(columns), ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line[n] for n in used)} |" for line in lines)


def main(arguments: Sequence[str]) -> int:
    """Rewrite files, or with `--check` only say which are out of date. Returns the exit status."""
    check, stale = "--check" in arguments, []
    for name in arguments:
        if name == "--check":
            continue
        path = Path(name)
        text = path.read_text(encoding="utf-8")
        made = render(text, path.resolve().parent)
        if made != text:
            stale.append(name)
            if not check:
                with replacing(path) as temporary:
                    temporary.write_text(made, encoding="utf-8")
    for name in stale:
        print(f"{name} {'is out of date' if check else 'rewritten'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
