"""Errors a user can act on. Each message says what was asked, what is true, and what to do.

VidaccelError
 ├── LayoutError        a grid, block or tile that cannot be
 ├── MaskError          a block mask whose indices do not describe its layout
 ├── PatternError       a pattern's parameters, or a density it cannot give
 ├── BackendError       a kernel that cannot run this problem, or whose result was wrong
 ├── InstallError       nothing to install on, installed twice, or displaced by somebody else
 ├── RecipeError        a recipe, preset or setting that cannot be read
 └── UsageError         a command line's arguments
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


class UsageError(VidaccelError, ValueError):
    """A command line's arguments."""
