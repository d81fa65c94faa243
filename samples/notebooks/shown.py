"""What the notebooks show: frames of clips and pictures in one, with their names, and lines over time as SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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


class Film:
    """Frames of clips as one picture, which a notebook keeps as a JPEG: a third of what a PNG takes."""

    def __init__(self, sheet: Image.Image) -> None:
        self.sheet = sheet

    def _repr_jpeg_(self) -> bytes:
        target = io.BytesIO()
        self.sheet.save(target, "jpeg", quality=45, optimize=True, progressive=True)
        return target.getvalue()


def film(clips: Mapping[str, Any], columns: int = 8, side: int = 52, gap: int = 2) -> Film:
    """Evenly spaced frames of clips (f, h, w, 3) in [0, 1] by name, one clip a row."""
    font = ImageFont.load_default(12)
    left = 10 + round(max(font.getlength(name) for name in clips))
    sheet = Image.new("RGB", (left + columns * (side + gap) - gap, len(clips) * (side + gap) - gap), "white")
    for row, (name, clip) in enumerate(clips.items()):
        top = row * (side + gap)
        ImageDraw.Draw(sheet).text((left - 8, top + side / 2), name, "black", font, anchor="rm")
        for column, number in enumerate(np.linspace(0, len(clip) - 1, columns).round().astype(int)):
            frame = Image.fromarray((np.clip(clip[number], 0, 1) * 255).astype(np.uint8)).resize((side, side))
            sheet.paste(frame, (left + column * (side + gap), top))
    return Film(sheet)


def beside(pictures: Mapping[str, Image.Image], gap: int = 24) -> Image.Image:
    """Pictures in a row, each under its name."""
    wide = sum(each.width + gap for each in pictures.values()) - gap
    sheet = Image.new("RGB", (wide, 20 + max(each.height for each in pictures.values())), "white")
    left = 0
    for name, each in pictures.items():
        ImageDraw.Draw(sheet).text((left, 2), name, "black", ImageFont.load_default(12))
        sheet.paste(each, (left, 20))
        left += each.width + gap
    return sheet.quantize(32)
