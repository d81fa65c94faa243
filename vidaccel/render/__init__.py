"""Rendering videos: jobs as plain data, models by name, mp4s that say how they were made.

Example:
    >>> model = find("wan-tiny")
    >>> job = RenderJob("a red circle moves right", recipe=Recipe.load("wan-tiny")).complete(model)
    >>> rendering = render(open_pipeline(job, model), job)
    >>> save(Path("out.mp4"), rendering, job, model)
"""

from __future__ import annotations

from .job import DENSE, ReadyJob, RenderJob
from .models import Model, find
from .preview import preview
from .run import Rendering, StepDone, open_pipeline, render, save
from .upscale import recipe_for

__all__ = [
    "DENSE",
    "Model",
    "ReadyJob",
    "RenderJob",
    "Rendering",
    "StepDone",
    "find",
    "open_pipeline",
    "preview",
    "recipe_for",
    "render",
    "save",
]
