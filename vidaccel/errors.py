"""Errors a user can act on. Each message says what was asked, what is true, and what to do.

VidaccelError
 ├── LayoutError        a grid, block or tile that cannot be
 ├── MaskError          a block mask whose indices do not describe its layout
 ├── PatternError       a pattern's parameters, or a density it cannot give
 ├── BackendError       a kernel that cannot run this problem, or whose result was wrong
 ├── InstallError       nothing to install on, installed twice, or displaced by somebody else
 ├── RecipeError        a recipe, preset or setting that cannot be read
 ├── ModelError         a model that cannot be found, or must not be loaded
 ├── RenderError        a render that failed, or whose result is no video
 ├── StreamError        an autoregressive stream that cannot go on
 ├── TuneError          a goal that nothing that was tried reaches
 ├── VideoError         a video file that cannot be written or read
 └── UsageError         arguments of a command or a job

VidaccelWarning         goes on, but not as asked; each carries the next step to take
"""


class VidaccelError(Exception):
    """Base of every error that vidaccel raises on purpose."""


class LayoutError(VidaccelError, ValueError):
    """A grid, block or tile that cannot be."""


class MaskError(VidaccelError, ValueError):
    """A block mask whose indices do not describe its layout."""


class PatternError(VidaccelError, ValueError):
    """A pattern's parameters, or a density it cannot give."""


class BackendError(VidaccelError, RuntimeError):
    """A kernel that cannot run this problem, or whose result was wrong."""


class InstallError(VidaccelError, RuntimeError):
    """Nothing to install on, installed twice, or displaced by somebody else."""


class RecipeError(VidaccelError, ValueError):
    """A recipe, preset or setting that cannot be read."""


class ModelError(VidaccelError, RuntimeError):
    """A model that cannot be found, or must not be loaded."""


class RenderError(VidaccelError, RuntimeError):
    """A render that failed, or whose result is no video."""


class StreamError(VidaccelError, RuntimeError):
    """An autoregressive stream that cannot go on."""


class TuneError(VidaccelError, RuntimeError):
    """A goal that nothing that was tried reaches."""


class VideoError(VidaccelError, RuntimeError):
    """A video file that cannot be written or read."""


class UsageError(VidaccelError, ValueError):
    """Arguments of a command or a job."""


class VidaccelWarning(UserWarning):
    """Goes on, but not as asked; each carries the next step to take."""
