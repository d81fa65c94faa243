"""Contact sheets: a few frames of every clip in one picture, one clip a row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def contact_sheet(clips: Sequence[Tensor], file: Path, columns: int = 8, scale: int = 2) -> None:
    """Write `columns` evenly spaced frames of each (f, h, w, 3) clip in [0, 1], shrunk `scale` times, to `file`."""
    rows = []
    for clip in clips:
        picks = torch.linspace(0, len(clip) - 1, columns).round().long()
        small = clip[picks.to(clip.device), ::scale, ::scale].float().clamp(0, 1).cpu()
        rows.append(torch.cat(list(small), dim=1))
    sheet = (torch.cat(rows, dim=0) * 255).round().byte().numpy()
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(file)
