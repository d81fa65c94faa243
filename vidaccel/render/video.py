"""Video files: frames to mp4 with a record in its `comment` tag, and back; and a look at what was rendered."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..encode import ffmpeg, write_mp4
from ..errors import UsageError, VideoError

Frames = npt.NDArray[np.uint8]

# One argument of a command line holds 128 KiB on Linux; a record is a few KiB, most of it the prompt.
MOST_BYTES = 60_000
_BLACK = 4
_IDENTICAL_DB = 100.0


def to_uint8(frames: npt.NDArray[np.floating[Any]]) -> Frames:
    """(f, h, w, 3) in [0, 1] -> bytes. NaN becomes 0; `problems` is where it is told."""
    scaled = np.nan_to_num(frames, nan=0.0, posinf=1.0, neginf=0.0) * 255
    return np.ascontiguousarray(scaled.round().clip(0, 255).astype(np.uint8))


def count_nan(frames: npt.NDArray[np.floating[Any]]) -> int:
    """How many frames hold a value that is no finite number."""
    return int((~np.isfinite(frames)).any(axis=(1, 2, 3)).sum())


def problems(frames: Frames) -> list[str]:
    """What looks broken in a video, in words; an empty list where nothing does."""
    black = int((frames.max(axis=(1, 2, 3)) <= _BLACK).sum())
    if black:
        return [f"{black} of {len(frames)} frames are black"]
    spread = frames.max(axis=(1, 2)).astype(int) - frames.min(axis=(1, 2))
    if int(spread.max()) <= 1:
        return [f"all {len(frames)} frames are one flat colour"]
    return []


def digest(frames: Frames) -> str:
    """SHA-256 of the raw frames and their shape, before any encoding."""
    return hashlib.sha256(f"{frames.shape}".encode() + frames.tobytes()).hexdigest()


def psnr(a: Frames, b: Frames) -> float:
    """Peak signal-to-noise ratio in dB, per frame and then the mean; frames that are equal count as 100 dB."""
    if a.shape != b.shape:
        raise VideoError(f"videos of {a.shape} and {b.shape} were compared; frames, height and width must agree")
    error = ((a.astype(np.float64) - b.astype(np.float64)) ** 2).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return float(np.minimum(10 * np.log10(255.0**2 / error), _IDENTICAL_DB).mean())


def check_writable(path: Path, option: str = "-o") -> None:
    """Make the folder of `path` and try to write in it, before hours of work depend on it.

    Args:
        path: a file that is to be written.
        option: names it on the command line.

    Raises:
        VideoError: the folder cannot be made or written to, or `path` is a folder itself.
    """
    if path.is_dir():
        raise VideoError(f"{path} cannot be written: it is a folder; name a file with {option}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent) as trial:
            trial.write(b"0")
    except OSError as error:
        raise VideoError(
            f"{path} cannot be written: {error.strerror or error}; choose another place with {option}"
        ) from None


def write(path: Path, frames: Frames, fps: float, record: Mapping[str, Any]) -> None:
    """Write an mp4, whole or not at all: under a temporary name first, then renamed. An existing file is replaced.

    The same frames and record give the same bytes: the number of threads is fixed, no date and no encoder version is
    written.

    Args:
        path: where.
        frames: (f, h, w, 3).
        fps: frames in a second.
        record: plain data for the `comment` tag.

    Raises:
        VideoError: no permission, a full disk, a record that is too large, or no ffmpeg.
    """
    comment = json.dumps(record, sort_keys=True, separators=(",", ":"))
    if len(comment) > MOST_BYTES:
        raise VideoError(
            f"the record of {path.name} has {len(comment)} bytes, an mp4 gets at most {MOST_BYTES}; shorten the prompt"
        )
    write_mp4(path, frames, fps, comment)


def read_record(path: Path) -> dict[str, Any]:
    """The record that `write` put into an mp4: untrusted data, checked for nothing but being a JSON object.

    Raises:
        VideoError: no such file, no mp4, or no record in it.
    """
    if not path.is_file():
        raise VideoError(f"{path} is not a file")
    # The demuxer is named and only files may be opened: an mp4 must not turn out to be a playlist.
    command = [ffmpeg(), "-nostdin", "-v", "error", "-protocol_whitelist", "file", "-f", "mov", "-i", f"file:{path}"]
    command += ["-f", "ffmetadata", "-protocol_whitelist", "pipe", "pipe:1"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        raise VideoError(f"{path} took more than 60 seconds to read; it is no mp4 of vidaccel's") from None
    if done.returncode:
        raise VideoError(f"{path} is not an mp4 that ffmpeg can read")
    text = done.stdout.decode(errors="replace")
    found = (
        re.search(r"^comment=((?:[^\\\n]|\\.)*)$", text, re.MULTILINE | re.DOTALL)
        if len(text) < 4 * MOST_BYTES
        else None
    )
    if found is None:
        raise VideoError(f"{path} carries no record of how it was made; only videos that vidaccel wrote do")
    comment = re.sub(r"\\(.)", r"\1", found[1], flags=re.DOTALL)
    try:
        record = json.loads(comment) if len(comment) <= MOST_BYTES else None
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise VideoError(f"the comment in {path} is not a record of vidaccel's")
    return record


def read_image(path: Path, height: int, width: int) -> Any:
    """A picture from a file, as a PIL image of that size.

    Raises:
        UsageError: no picture in it.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UsageError(f"image {path} cannot be read: {error}") from None


def read_frames(path: Path, count: int) -> Frames:
    """The first `count` frames of a video file, (f, h, w, 3); fewer where it has fewer.

    Raises:
        VideoError: no video in it.
    """
    import imageio_ffmpeg

    if not path.is_file():
        raise VideoError(f"{path} is not a file")
    found: list[Frames] = []
    try:
        reader: Iterator[Any] = imageio_ffmpeg.read_frames(f"file:{path}", pix_fmt="rgb24")
        width, height = next(reader)["size"]
        for frame, _ in zip(reader, range(count), strict=False):
            found.append(np.frombuffer(frame, np.uint8).reshape(height, width, 3))
        reader.close()  # type: ignore[attr-defined]
    except (OSError, RuntimeError, StopIteration, KeyError, ValueError):
        raise VideoError(f"{path} is not a video that ffmpeg can read") from None
    return np.stack(found) if found else np.empty((0, height, width, 3), np.uint8)
