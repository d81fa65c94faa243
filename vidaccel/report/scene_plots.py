"""Plots over the frames of one prompt's videos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from . import plots


def scene_plots(reference: str, videos: Mapping[str, Mapping[str, Any]]) -> list[Markup]:
    """What was lost, and how everything moves.

    Args:
        reference: its name.
        videos: from `quality.measure`, by name.
    """
    first = next(iter(videos.values()))
    moves = {reference: first["motion_reference"], **{label: each["motion"] for label, each in videos.items()}}
    flickers = {reference: first["flicker_reference"], **{label: each["flicker"] for label, each in videos.items()}}
    drawn = [
        plots.lines("PSNR against the reference, dB", {label: each["psnr"] for label, each in videos.items()}),
        plots.lines("SSIM against the reference", {label: each["ssim"] for label, each in videos.items()}),
        plots.lines(
            "LPIPS against the reference, 0 is the same",
            {label: each["lpips"] for label, each in videos.items() if each["lpips"]},
        ),
        # Nothing follows the last frame, and only frames between two others can flicker: all plots have one axis.
        plots.lines("Motion to the next frame, levels of 255", {k: [*each, None] for k, each in moves.items()}),
        plots.lines("Flicker of each frame, levels of 255", {k: [None, *each, None] for k, each in flickers.items()}),
    ]
    return [plot for plot in drawn if plot]
