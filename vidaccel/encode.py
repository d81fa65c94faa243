"""Frames to an H.264 mp4, by the ffmpeg that comes with imageio-ffmpeg.

It is called directly: imageio's writer does not look at its exit status, so a disk that fills up at the end would pass
for success.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .errors import VideoError


def write_mp4(path: Path, frames: npt.NDArray[np.uint8], fps: float, comment: str = "") -> None:
    """Write an mp4, whole or not at all: under a temporary name first, then renamed. An existing file is replaced.

    The same frames and comment give the same bytes: the number of threads is fixed, no date and no encoder version is
    written.

    Args:
        path: where.
        frames: (f, h, w, 3).
        fps: frames in a second.
        comment: text for the `comment` tag.

    Raises:
        VideoError: no permission, a full disk, or no ffmpeg.
    """
    height, width = frames.shape[1:3]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    command = [ffmpeg(), "-nostdin", "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", f"{width}x{height}", "-r", f"{fps:g}", "-i", "pipe:0", "-an", "-c:v", "libx264"]
    command += ["-preset", "medium", "-crf", "16", "-pix_fmt", "yuv420p", "-threads", "4"]
    command += ["-fflags", "+bitexact", "-flags:v", "+bitexact"]
    command += ["-metadata", f"comment={comment}", "-movflags", "+faststart", "-f", "mp4", f"file:{temporary}"]
    try:
        done = subprocess.run(
            command, input=np.ascontiguousarray(frames).data.cast("B"), capture_output=True, check=False
        )
        if done.returncode:
            raise VideoError(f"{path} could not be written: {_reason(done)}; nothing was left behind")
        temporary.replace(path)
    except OSError as error:
        raise VideoError(f"{path} could not be written: {error.strerror or error}; nothing was left behind") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def ffmpeg() -> str:
    """Path of the ffmpeg program.

    Raises:
        VideoError: there is none.
    """
    try:
        import imageio_ffmpeg

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        raise VideoError("no ffmpeg was found; `pip install imageio-ffmpeg` brings one") from None


def _reason(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    for line in lines:
        if "No space left" in line:
            return "the disk is full"
        if "File too large" in line:
            return "the file would pass the size limit set for this process"
    if done.returncode < 0:
        return f"ffmpeg was ended by signal {-done.returncode}"
    return lines[-1][:200] if lines else f"ffmpeg ended with status {done.returncode}"
