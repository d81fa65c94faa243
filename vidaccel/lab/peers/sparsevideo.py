"""sparsevideo (Mutual-Luo/SparseVideo): ports of published sparse attention, with its own tuned settings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ...grid import VideoGrid
from .peer import Peer


@contextlib.contextmanager
def sparsevideo(pipe: Any, grid: VideoGrid, method: str) -> Iterator[None]:
    """Its settings: one of its methods, such as svg2, radial, sta, spargeattn."""
    import sparsevideo

    sparsevideo.replace_attention(pipe, method=method)
    try:
        yield
    finally:
        sparsevideo.restore_sparse_attention(pipe)


SPARSEVIDEO = Peer("sparsevideo", "attention", "sparsevideo", sparsevideo, {"method": "svg2"}, whole=True)
