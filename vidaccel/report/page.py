"""The page: one HTML file that holds videos, tables, plots and settings, and asks nothing from anywhere."""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ..encode import write_mp4
from .quality import Frames

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Scene:
    """Videos of one prompt and seed, to be looked at side by side.

    Attributes:
        name: what the page calls it.
        fps: frames in a second.
        frames: how many each video has.
        videos: mp4 files by label, the reference first.
        psnr: decibels of each frame against the reference, by label.
        plots: over its frames.
    """

    name: str
    fps: float
    frames: int
    videos: Mapping[str, bytes]
    psnr: Mapping[str, Sequence[float]]
    plots: Sequence[Markup] = ()


@dataclass(frozen=True)
class Page:
    """What the page shows, from top to bottom.

    Attributes:
        title: its first line.
        lead: its second one: what is seen here.
        scenes: videos; without any there are no players.
        tables: rows by title.
        plots: those over frames stand in their scenes.
        notes: sentences, without their full stops.
        details: texts by title, folded away: settings, environment, long tables.
        commands: what makes all this again.
    """

    title: str
    scenes: Sequence[Scene] = ()
    tables: Mapping[str, Rows] = field(default_factory=dict)
    plots: Sequence[Markup] = ()
    notes: Sequence[str] = ()
    details: Mapping[str, str | Rows] = field(default_factory=dict)
    commands: Sequence[str] = ()
    lead: str = ""

    def html(self) -> str:
        """The file."""
        template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
            (resources.files(__package__) / "page.html").read_text(encoding="utf-8")
        )
        script = [
            {
                "name": scene.name,
                "fps": scene.fps,
                "frames": scene.frames,
                "labels": list(scene.videos),
                "psnr": {label: [round(db, 2) for db in each] for label, each in scene.psnr.items()},
            }
            for scene in self.scenes
        ]
        sources = [
            {
                "scene": number,
                "label": label,
                "source": f"data:video/mp4;base64,{base64.b64encode(mp4).decode()}",
            }
            for number, scene in enumerate(self.scenes)
            for label, mp4 in scene.videos.items()
        ]
        # `<` would end the script that holds it.
        return template.render(page=self, sources=sources, script=Markup(json.dumps(script).replace("<", "\\u003c")))


def mp4(frames: Frames, fps: float) -> bytes:
    """Frames (f, h, w, 3) as the bytes of an mp4.

    Raises:
        VideoError: no ffmpeg, or frames that it cannot encode.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_mp4(path, frames, fps)
        return path.read_bytes()
