"""What an adapter of another project is: how to switch it on, for as long as one render or one call lasts."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ...errors import UsageError
from ...grid import VideoGrid

Install = Callable[..., AbstractContextManager[Any]]
"""Takes a pipeline, the grid of its video, and settings by name."""


@dataclass(frozen=True)
class Peer:
    """Another project, or a part of diffusers, that makes the same pipelines faster.

    Attributes:
        name: what commands call it.
        kind: "cache" decides from step to step, so that only whole renders show what it does; "attention" makes every
            call cheaper.
        package: the module that must be importable.
        install: enters the state in which the pipeline runs with it, and leaves nothing behind.
        settings: of `install`, the defaults written out.
        whole: needs the pipeline itself, not only its transformer.
    """

    name: str
    kind: Literal["cache", "attention"]
    package: str
    install: Install
    settings: Mapping[str, Any] = field(default_factory=dict)
    whole: bool = False

    @property
    def is_here(self) -> bool:
        """Its package is installed."""
        return importlib.util.find_spec(self.package) is not None

    def around(self, pipe: Any, grid: VideoGrid | None) -> AbstractContextManager[Any]:
        """The state in which it runs.

        Args:
            pipe: the pipeline; None where its attention alone is wanted and it is not `whole`.
            grid: of the video; caches do without.
        """
        return self.install(pipe, grid, **self.settings)

    def setting(self, changes: Mapping[str, Any]) -> Peer:
        """The same with other settings.

        Raises:
            UsageError: a setting that it does not have.
        """
        if unknown := sorted(set(changes) - set(self.settings)):
            raise UsageError(f"{self.name} has no setting {unknown[0]!r}; it has {', '.join(self.settings) or 'none'}")
        return replace(self, settings={**self.settings, **changes})

    def __str__(self) -> str:
        said = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return f"{self.name} ({said})" if said else self.name
