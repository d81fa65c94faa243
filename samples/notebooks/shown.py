"""What the notebooks show: frames of clips as one picture, and lines over time as one page of SVG."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vidaccel.report.plots import lines

_COLOURS = ("#1c3f7a", "#d2691e", "#2e8b57", "#8b008b", "#b8860b", "#708090")
_STYLE = (
    ".plot{max-width:720px}.plot text{font:11px sans-serif;fill:#555}.plot .title{font-weight:bold}"
    ".plot .axis{text-anchor:end}.plot .grid{stroke:#ddd}"
    ".plot polyline{fill:none;stroke:currentColor;stroke-width:1.5}"
) + "".join(
    f".plot .c{n}{{color:{colour};fill:{colour}}}.plot polyline.c{n}{{fill:none}}" for n, colour in enumerate(_COLOURS)
)


class Plots:
    """Plots below each other, which a notebook shows as they are."""

    def __init__(self, *plots: str) -> None:
        self.plots = plots

    def _repr_html_(self) -> str:
        return f"<style>{_STYLE}</style>" + "".join(self.plots)


def over(per: str, **series: Mapping[str, Sequence[float | None]]) -> Plots:
    """One plot for each keyword, its underscores read as spaces; in each, one line for each name.

    Args:
        per: what the horizontal axis counts.
        series: values by name.
    """
    return Plots(*(str(lines(title.replace("_", " "), values, per=per)) for title, values in series.items()))


def film(clips: Iterable[Any], columns: int = 8, side: int = 72, gap: int = 2) -> Image.Image:
    """Evenly spaced frames of clips (f, h, w, 3) in [0, 1], one clip a row, in few colours to be small."""
    rows = list(clips)
    size = (columns * (side + gap) - gap, len(rows) * (side + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    for row, clip in enumerate(rows):
        for column, number in enumerate(np.linspace(0, len(clip) - 1, columns).round().astype(int)):
            frame = Image.fromarray((np.clip(clip[number], 0, 1) * 255).astype(np.uint8)).resize((side, side))
            sheet.paste(frame, (column * (side + gap), row * (side + gap)))
    return sheet.quantize(96)
