"""The progress of a render: one bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from ..render import StepDone
from .output import Screen


class StepBar:
    """Shows step, density, time spent and time left. Call it with every `StepDone`; use it as a context manager."""

    def __init__(self, screen: Screen, name: str, total: int, note: Callable[[], str] = str) -> None:
        """Args: where, of what, how many steps, and what else to say behind the name, asked at every step."""
        self._screen = screen
        self._name = name
        self._note = note
        self._total = total
        self._start = time.monotonic()
        self._bar = None
        if not screen.is_quiet and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(),
                progress.TextColumn("step {task.completed}/{task.total}  density {task.fields[density]}"),
                progress.TimeElapsedColumn(),
                progress.TextColumn("left"),
                progress.TimeRemainingColumn(),
                console=Console(file=sys.stderr),
                transient=True,
            )
            self._task = self._bar.add_task(name, total=total, density="-")

    def __enter__(self) -> StepBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, step: StepDone) -> None:
        """Show a step that has ended."""
        if self._screen.is_quiet:
            return
        density = "dense" if step.density is None else f"{step.density:.2f}"
        done = step.step + 1
        name = f"{self._name}{self._note()}"
        if self._bar is not None:
            self._bar.update(self._task, description=name, completed=done, total=step.total, density=density)
        elif done == step.total or done % max(1, step.total // 10) == 0:
            spent = time.monotonic() - self._start
            left = spent / done * (step.total - done)
            self._screen.say(f"{name}: step {done}/{step.total}, density {density}, {spent:.1f} s, {left:.1f} s left")
