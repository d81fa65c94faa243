"""Plots over the frames of one prompt's videos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from . import plots

_LOST = {
    "psnr": "PSNR against the reference, dB",
    "ssim": "SSIM against the reference",
    "lpips": "LPIPS against the reference, 0 is the same",
}


def scene_plots(reference: str, videos: Mapping[str, Mapping[str, Any]]) -> list[Markup]:
    """What was lost, and how everything moves.

    Args:
        reference: its name.
        videos: from `quality.measure`, by name.
    """
    first = next(iter(videos.values()))
    moves = {reference: first["motion_reference"], **{label: each["motion"] for label, each in videos.items()}}
    flickers = {reference: first["flicker_reference"], **{label: each["flicker"] for label, each in videos.items()}}
    lost = {key: {reference: [], **{label: each[key] or [] for label, each in videos.items()}} for key in _LOST}
    drawn = [
        *(plots.lines(title, lost[key]) for key, title in _LOST.items()),
        # Nothing follows the last frame, and only frames between two others can flicker: all plots have one axis.
        plots.lines("Motion to the next frame, levels of 255", {k: [*x, None] for k, x in moves.items()}, zero=True),
        plots.lines("Flicker, levels of 255", {k: [None, *x, None] for k, x in flickers.items()}, zero=True),
    ]
    return [plot for plot in drawn if plot]
