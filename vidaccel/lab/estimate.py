"""What a model would cost and could gain, from its configuration alone: no weights, no GPU."""

from __future__ import annotations

from ..grid import VideoGrid


def kept_pairs(grid: VideoGrid, text: int, density: float) -> float:
    """Share of all query-key pairs that is left where video-video pairs have this density and text sees all.

    (density n^2 + 2 n t + t^2) / (n + t)^2 for n video and t text tokens.
    """
    video = grid.tokens
    return (density * video**2 + 2 * video * text + text**2) / (video + text) ** 2
