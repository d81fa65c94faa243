"""The command `vidaccel`: its commands, and the one place where their errors become a line and an exit status."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import signal
import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from ..errors import LayoutError, PatternError, RecipeError, UsageError, VidaccelError
from .calibrate import calibrate
from .compare import compare
from .demo import demo
from .doctor import doctor
from .estimate import estimate
from .explain import explain
from .output import error
from .presets import presets
from .render import render
from .rerun import rerun
from .tune import tune

_BAD_USAGE = (UsageError, RecipeError, PatternError, LayoutError)


def _refused(problem: Exception) -> str | None:
    """What to tell where the system refused a file or had no room; None for all else, of which a traceback tells."""
    if not isinstance(problem, OSError) or problem.errno is None:
        return None
    if problem.filename:
        return f"{problem.filename} could not be read or written: {problem.strerror}"
    full = problem.errno in (errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EROFS)
    return f"the output could not be written: {problem.strerror}" if full else None


class Boundary(TyperGroup):
    """Ends every command with status 0, 1 (failed), 2 (bad usage) or 130 (interrupted), and no traceback for users."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; Ctrl-C ends it with one line."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            error(str(stop) or "interrupted")
            raise typer.Exit(130) from None

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run the program and exit."""
        try:
            status = super().main(*args, **{**kwargs, "standalone_mode": False})
        except VidaccelError as problem:
            error(problem)
            status = 2 if isinstance(problem, _BAD_USAGE) else 1
        except typer.Abort:
            error("interrupted")
            status = 130
        except Exception as problem:
            # Typer's own usage errors; their class moved between its versions, their methods did not.
            if hasattr(problem, "format_message") and hasattr(problem, "exit_code"):
                where = getattr(getattr(problem, "ctx", None), "command_path", "vidaccel")
                error(f"{problem.format_message()} See {where} --help")
                status = problem.exit_code
            else:
                from ..ranks import stopped

                if (message := stopped(problem) or _refused(problem)) is None:
                    raise
                error(message)
                status = 1
        sys.exit(status if isinstance(status, int) else 0)


app = typer.Typer(
    name="vidaccel",
    cls=Boundary,
    help="Sparse attention and caching for video diffusion.",
    epilog='Example: vidaccel render --prompt "a red circle moves right" -o out.mp4',
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command(epilog='Example: vidaccel render --prompt "a red circle moves right" --density 0.3 --seed 1 -o out.mp4')(
    render
)
app.command(epilog="Example: vidaccel rerun out.mp4 -o again.mp4")(rerun)
app.command(epilog="Example: vidaccel compare dense.mp4 sparse.mp4 -o compare.html")(compare)
app.command(epilog="Example: vidaccel estimate --model wan2.1-14b --attention radial --density 0.25")(estimate)
app.command(epilog="Example: vidaccel calibrate --model wan-tiny --cache cg-taylor,placed --thresholds 0.1,0.2,0.4")(
    calibrate
)
app.command(epilog="Example: vidaccel tune --target 'psnr>=28' -o out/tune")(tune)
app.command(epilog="Example: vidaccel explain --attention radial,topk --density 0.35 -o out/explain")(explain)
app.command(epilog="Example: vidaccel doctor --format json")(doctor)
app.command(epilog="Example: vidaccel presets wan2.1-14b-720p > my.yaml")(presets)
app.command(epilog="Example: vidaccel demo -o out/demo")(demo)

if importlib.util.find_spec("vidaccel.cli.bench") is not None:
    app.add_typer(importlib.import_module("vidaccel.cli.bench").app, name="bench")


def _version(value: bool) -> None:
    if value:
        from .. import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Sparse attention and caching for video diffusion."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit(2)


def main() -> None:
    """Entry point of the console script."""

    def stop(number: int, frame: Any) -> NoReturn:
        # As Ctrl-C does: temporary files go, finished videos stay.
        raise KeyboardInterrupt("terminated")

    with contextlib.suppress(ValueError, AttributeError):
        signal.signal(signal.SIGTERM, stop)
    app()
