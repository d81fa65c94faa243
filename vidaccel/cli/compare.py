"""`vidaccel compare`: videos side by side in one page."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import Format, FormatOption, Screen

if TYPE_CHECKING:
    from ..report.comparison import Entry

_MOST_FRAMES = 100_000


def compare(
    videos: Annotated[
        list[Path], typer.Argument(help="Two or more videos of one size and length; the first is the reference.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("compare.html"),
    format: FormatOption = Format.human,
) -> None:
    """Compare videos frame by frame, and write a page with players, wipe, difference and plots that opens anywhere."""
    from ..errors import UsageError
    from ..files import replacing
    from ..render.video import check_writable
    from ..report import comparison

    screen = Screen(format)
    if len(videos) < 2:
        raise UsageError("one video was given; two or more are compared, the first is the reference")
    check_writable(output)
    entries = [_entry(path, label) for path, label in zip(videos, _labels(videos), strict=True)]
    data = comparison.compare(entries)
    command = shlex.join(["vidaccel", "compare", *map(str, videos), "-o", str(output)])
    with replacing(output) as temporary:
        temporary.write_text(comparison.html(entries, data, command), encoding="utf-8")
    if screen.json({**data, "page": str(output)}) or screen.names([output]):
        return
    screen.table(
        [{"video": label, **found["mean"]} for label, found in data["videos"].items()],
        title=f"against {data['reference']}",
    )
    screen.line(f"page: {output}")


def _labels(paths: list[Path]) -> list[str]:
    """File names where they differ, paths where they do not."""
    names = [path.stem for path in paths]
    return names if len(set(names)) == len(names) else [str(path.with_suffix("")) for path in paths]


def _entry(path: Path, label: str) -> Entry:
    import imageio_ffmpeg

    from ..errors import VideoError
    from ..render.video import read_frames, read_record
    from ..report.comparison import Entry

    frames = read_frames(path, _MOST_FRAMES)
    reader = imageio_ffmpeg.read_frames(f"file:{path}")
    fps = float(next(reader)["fps"])
    reader.close()
    try:
        record = read_record(path)
    except VideoError:  # Somebody else's video: it is compared all the same.
        record = None
    command = shlex.join(["vidaccel", "rerun", str(path), "-o", f"{path.stem}-again.mp4"]) if record else None
    return Entry(label, frames, path.read_bytes(), fps, command, record, _report(path))


def _report(path: Path) -> dict[str, Any] | None:
    """The report that `vidaccel demo` and `render --report` leave beside a video."""
    for folder in (path.with_name(f"{path.stem}-report"), path.parent):
        try:
            found = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and found.get("schema") == 1 and isinstance(found.get("calls"), list):
            return found
    return None
