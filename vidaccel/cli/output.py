"""What commands write: data on stdout, everything else on stderr, in the format that was asked for."""

from __future__ import annotations

import enum
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

import typer

from ..errors import VidaccelWarning


class Format(str, enum.Enum):
    """How a command writes its result."""

    human = "human"
    json = "json"
    quiet = "quiet"


FormatOption = Annotated[
    Format,
    typer.Option("--format", help="human: tables and progress. json: one object. quiet: names only, no progress."),
]


def clean(value: object) -> str:
    """One line without control characters: names and prompts may come from files that somebody else wrote."""
    text = " ".join(str(value).split())
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def error(message: object) -> None:
    """Say in one line on stderr why a command ends."""
    typer.echo(f"error: {clean(message)}", err=True)


class Screen:
    """Writes for one command.

    Args:
        format: what was asked for.
        is_news: whether a warning is to be shown: where processes work together, one of them says it.

    Attributes:
        format: what was asked for.
    """

    def __init__(self, format: Format, is_news: Callable[[str], bool] = lambda text: True) -> None:
        self.format = format
        self._is_news = is_news

    @property
    def is_quiet(self) -> bool:
        """Nothing but results, warnings and errors."""
        return self.format is Format.quiet

    def say(self, text: object) -> None:
        """A line of progress, on stderr."""
        if not self.is_quiet:
            typer.echo(clean(text), err=True)

    def warn(self, text: object) -> None:
        """A warning, on stderr, in every format."""
        if self._is_news(line := clean(text)):
            typer.echo(f"warning: {line}", err=True)

    def json(self, data: Any) -> bool:
        """Write the result as JSON where that was asked for; True if so."""
        if self.format is Format.json:
            typer.echo(json.dumps(data, indent=1, default=str))
        return self.format is Format.json

    def line(self, text: object) -> None:
        """A line of the result, on stdout."""
        typer.echo(clean(text))

    def names(self, names: Iterable[object]) -> bool:
        """Write the names of what was made or found, one a line, where `quiet` was asked for; True if so."""
        if self.is_quiet:
            for name in names:
                self.line(name)
        return self.is_quiet

    def table(self, rows: Sequence[Mapping[str, object]], title: str | None = None) -> None:
        """A table on stdout, its columns named by the keys of the first row."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left")
        for name in rows[0] if rows else ():
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*(Text(clean(short(value))) for value in row.values()))
        # In a pipe there is no width to respect; a narrow guess would cut names in two.
        Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160, highlight=False).print(table)

    def pairs(self, values: Mapping[str, object]) -> None:
        """Names and values, aligned, on stdout."""
        width = max(map(len, values), default=0)
        for name, value in values.items():
            self.line_of(f"{name:<{width}}  {clean(short(value))}")

    def line_of(self, text: str) -> None:
        """A line whose spaces stand as they are, on stdout."""
        typer.echo(text)


def short(value: object) -> str:
    """A value for people: floats with four digits, None as a dash."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def prepare(screen: Screen) -> None:
    """Make warnings one line each, and switch off the progress bars and chatter of the libraries below."""
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    said: set[str] = set()

    def show(message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
        # Libraries warn of things that no user of a command can act on; ours carry a next step.
        if str(message) not in said and issubclass(category, VidaccelWarning):
            said.add(str(message))
            screen.warn(message)

    warnings.showwarning = show
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
