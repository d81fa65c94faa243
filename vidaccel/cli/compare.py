"""`vidaccel compare`: videos side by side in one page."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import Format, FormatOption, Screen

if TYPE_CHECKING:
    from ..report.comparison import Entry

_MOST_FRAMES = 100_000


def compare(
    videos: Annotated[
        list[Path],
        typer.Argument(
            help="Two or more videos of one size and length, or folders of them; the first is the reference."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("compare.html"),
    format: FormatOption = Format.human,
) -> None:
    """Compare videos frame by frame, and write a page with players, wipe, difference and plots that opens anywhere.

    Folders are runs of the same prompts: their videos are paired by prompt and seed (by file name, where a video does
    not say), and figures are means over the pairs, with 95 % intervals.
    """
    from ..errors import UsageError
    from ..report.comparison import summary

    screen = Screen(format)
    if len(videos) < 2:
        raise UsageError("one video was given; two or more are compared, the first is the reference")
    if missing := [path for path in videos if not path.exists()]:
        raise UsageError(f"{missing[0]} was to be compared, but there is no such file; give videos, or folders of them")
    data = write_page(screen, videos, output)
    if screen.json({**data, "page": str(output)}) or screen.names([output]):
        return
    screen.table(summary(data), title=f"against {data['reference']}")
    for note in data["notes"]:
        screen.line(f"note: {note}")
    screen.line(f"page: {output}")


def write_page(screen: Screen, videos: Sequence[Path], output: Path) -> dict[str, Any]:
    """Compare videos, or folders of them, and write the page. Returns `comparison.compare`'s data."""
    from ..files import replacing
    from ..lab.shown import shows
    from ..render.video import check_writable
    from ..report import comparison

    check_writable(output)
    entries = _entries(screen, videos)
    data = comparison.compare(entries, shows)
    command = shlex.join(["vidaccel", "compare", *map(str, videos), "-o", str(output)])
    with replacing(output) as temporary:
        # Names of files need not be text.
        temporary.write_text(comparison.html(entries, data, command), encoding="utf-8", errors="replace")
    return data


def _entries(screen: Screen, paths: Sequence[Path]) -> list[Entry]:
    """Every video to compare, the reference's first."""
    from ..errors import UsageError, VideoError

    labels = _labels(paths)
    folders = [path for path in paths if path.is_dir()]
    if not folders:
        return [_entry(path, label) for path, label in zip(paths, labels, strict=True)]
    if len(folders) < len(paths):
        other = next(path for path in paths if not path.is_dir())
        raise UsageError(f"{folders[0]} is a folder and {other} is not; compare videos, or folders of videos")
    runs = [list(_run(folder, label)) for folder, label in zip(paths, labels, strict=True)]
    for folder, run in zip(paths, runs, strict=True):
        if not run:
            raise VideoError(f"{folder} holds no .mp4 file")
        scene, count = Counter(entry.scene for entry in run).most_common(1)[0]
        if count > 1:
            raise VideoError(f"{folder} holds {count} videos of {scene!r}; a run has one for each prompt and seed")
    common = set.intersection(*({entry.scene for entry in run} for run in runs))
    if not common:
        raise VideoError(f"no prompt and seed is in all of {', '.join(map(str, paths))}; there is nothing to pair")
    if left := len({entry.scene for run in runs for entry in run} - common):
        screen.warn(f"left out, because not in every folder: {left} of {left + len(common)} prompts and seeds")
    return [entry for run in runs for entry in run if entry.scene in common]


def _run(folder: Path, label: str) -> Iterator[Entry]:
    for path in sorted(folder.glob("*.mp4")):
        yield _entry(path, label, in_run=True)


def _labels(paths: Sequence[Path]) -> list[str]:
    """File names where they differ, paths where they do not."""
    names = [path.stem if path.is_file() else path.resolve().name for path in paths]
    if len(set(names)) == len(names):
        return names
    return [str(path.with_suffix("") if path.is_file() else path) for path in paths]


def _entry(path: Path, label: str, in_run: bool = False) -> Entry:
    import imageio_ffmpeg

    from ..errors import VideoError
    from ..render.video import read_frames, read_record
    from ..report.comparison import Entry

    read_frames(path, 1)  # Says what is wrong with it, if anything is.
    reader = imageio_ffmpeg.read_frames(f"file:{path}")
    fps = float(next(reader)["fps"])
    reader.close()
    try:
        record = read_record(path)
    except VideoError:  # Somebody else's video: it is compared all the same.
        record = None
    again = f"{path.parent.name}-{path.stem}-again.mp4" if in_run else f"{path.stem}-again.mp4"
    command = shlex.join(["vidaccel", "rerun", str(path), "-o", again]) if record else None
    scene = _scene(record, path) if in_run else ""
    return Entry(
        label,
        lambda: read_frames(path, _MOST_FRAMES),
        path.read_bytes(),
        fps,
        scene,
        command,
        record,
        _report(path, record, in_run),
    )


def _scene(record: dict[str, Any] | None, path: Path) -> str:
    """Prompt and seed."""
    job = record.get("job") if record else None
    if isinstance(job, dict) and "prompt" in job and "seed" in job:
        return f"{job['prompt']}, seed {job['seed']}"
    return path.stem


def _report(path: Path, record: dict[str, Any] | None, in_run: bool) -> dict[str, Any] | None:
    """The report that `vidaccel demo` and `render --report` leave beside a video.

    One that lies in the video's own folder may be that of another video there: it counts if the recipe is the same.
    """
    own = (path.with_name(f"{path.stem}-report"), path.with_suffix(""))
    for folder in own if in_run else (*own, path.parent):
        try:
            found = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if not isinstance(found, dict) or found.get("schema") != 1:
            continue
        if (folder in own or (record or {}).get("recipe_hash") == found.get("recipe_hash")) and _usable(found):
            return found
    return None


def _usable(report: dict[str, Any]) -> bool:
    """It has what the page draws: reports may come from anybody."""
    calls, summary = report.get("calls"), report.get("summary")
    keys = {"step", "sparse_layers", "dense_layers", "ms"}
    return (
        isinstance(calls, list)
        and all(isinstance(call, dict) and keys <= call.keys() for call in calls)
        and len({len(call.get("layer_density", ())) for call in calls}) <= 1
        and isinstance(summary, dict)
        and isinstance(summary.get("transformer_ms"), (int, float))
    )
