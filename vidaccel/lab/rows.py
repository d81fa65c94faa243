"""A record that grows row by row: JSON on disk, whole at every moment, so that an interrupted run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import replacing

SCHEMA = 1


class Rows:
    """Measurements with what they were made on. Each row has a `key`; a key that is there is not measured again.

    Args:
        about: hardware, versions, commit: `kernels.bench.about()`; and what else all rows of a file must share. A
            `schema` says that its rows have another form than they once had.
        path: where to keep them; None keeps them in memory.
        what: is measured; the record says it, and its command.

    Raises:
        UsageError: the file holds something else, or was measured on another machine or with other versions.
    """

    def __init__(self, about: dict[str, Any], path: Path | None = None, what: str = "model") -> None:
        self._path = path
        # As it will be read back: tuples become lists.
        self._about: dict[str, Any] = {"what": what, **json.loads(json.dumps(about))}
        self.rows: list[dict[str, Any]] = []
        if path is None or not path.exists():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            known = {key: found[key] for key in self._head()}
            self.rows = list(found["rows"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UsageError(f"{path} is not a record of {what} measurements; choose another place with -o") from None
        for key, value in self._head().items():
            if key in known and known[key] != value:
                before, now = _apart(known[key], value)
                raise UsageError(
                    f"{path} was measured with another {key} ({before}), this is {now}; rows of both in one file "
                    "could not be compared: choose another place with -o"
                )

    def find(self, key: str) -> dict[str, Any] | None:
        """The row of this key."""
        return next((row for row in self.rows if row["key"] == key), None)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row, its numbers to six digits, and write the file."""
        self.rows.append(rounded(row) | {"commit": self._about.get("commit")})
        if self._path is None:
            return
        # A row a line: a difference shows which rows are new.
        head = json.dumps({**self._head(), "rows": []}, indent=1).removesuffix("[]\n}")
        lines = ",\n".join(f"  {json.dumps(each, separators=(',', ':'))}" for each in self.rows)
        with replacing(self._path) as temporary:
            temporary.write_text(f"{head}[\n{lines}\n ]\n}}\n", encoding="utf-8")

    def data(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {**self._head(), "rows": self.rows}

    def _head(self) -> dict[str, Any]:
        about = {key: value for key, value in self._about.items() if key != "commit"}
        return {"schema": SCHEMA, **about}


def _apart(before: Any, now: Any) -> tuple[Any, Any]:
    """Of two dicts what differs; else both."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return before, now
    names = [name for name in before | now if before.get(name) != now.get(name)]
    return tuple({name: each.get(name) for name in names} for each in (before, now))  # type: ignore[return-value]


def rounded(value: Any) -> Any:
    """Plain data, numbers to six digits: what was measured is not known to more."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value
