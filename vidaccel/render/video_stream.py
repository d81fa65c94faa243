"""An mp4 that can be played while it is written: fragments of a few frames each, every one complete."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from ..encode import ffmpeg
from ..errors import VideoError
from .video import MOST_BYTES, Frames

# Frames of a fragment: about one latent frame, so that even the first chunk is on disk as soon as it is made.
_FRAGMENT = 4


class VideoStream:
    """Writes frames as they come. A context manager; what was written before an error stays, and plays.

    Args:
        path: where; an existing file is replaced when the first frames come.
        size: (height, width) in pixels.
        fps: frames in a second.
        record: plain data for the `comment` tag, known before the first frame.

    Raises:
        VideoError: a record that is too large, no ffmpeg, or a place that cannot be written.
    """

    def __init__(self, path: Path, size: tuple[int, int], fps: float, record: Mapping[str, Any]) -> None:
        comment = json.dumps(record, sort_keys=True, separators=(",", ":"))
        if len(comment) > MOST_BYTES:
            raise VideoError(f"the record of {path.name} has {len(comment)} bytes, an mp4 gets at most {MOST_BYTES}")
        self.path = path
        self.frames = 0
        self._size = size
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        command = [ffmpeg(), "-nostdin", "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24"]
        command += ["-s", f"{size[1]}x{size[0]}", "-r", f"{fps:g}", "-i", "pipe:0", "-an", "-c:v", "libx264"]
        command += ["-preset", "medium", "-tune", "zerolatency", "-crf", "16", "-pix_fmt", "yuv420p", "-threads", "4"]
        command += ["-fflags", "+bitexact", "-flags:v", "+bitexact", "-metadata", f"comment={comment}"]
        command += ["-movflags", "+empty_moov+default_base_moof", "-frag_duration", f"{1e6 * _FRAGMENT / fps:.0f}"]
        command += ["-flush_packets", "1", "-f", "mp4", f"file:{path}"]
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def write(self, frames: Frames) -> None:
        """Append (f, h, w, 3) bytes.

        Raises:
            VideoError: another size, or ffmpeg has ended (no permission, a full disk).
        """
        if frames.shape[1:3] != self._size:
            raise VideoError(f"frames of {frames.shape[1:3]} were given to a video of {self._size}")
        if self._process is None:
            try:
                self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stderr=self._errors, bufsize=0)
            except OSError as error:
                raise VideoError(f"{self.path} could not be written: {error.strerror or error}") from None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(np.ascontiguousarray(frames).data.cast("B"))
        except OSError:
            raise VideoError(f"{self.path} could not be written: {self._reason()}") from None
        self.frames += len(frames)

    def close(self) -> None:
        """Finish the file.

        Raises:
            VideoError: ffmpeg failed.
        """
        if self._process is None:
            return
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        if self._process.wait():
            raise VideoError(f"{self.path} could not be finished: {self._reason()}")

    def __enter__(self) -> VideoStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except VideoError:
            if kind is None:
                raise
        finally:
            self._errors.close()

    def _reason(self) -> str:
        assert self._process is not None
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else f"ffmpeg ended with status {self._process.returncode}"
