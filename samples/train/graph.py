"""One training step as a CUDA graph: small models wait for launches, not for arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import torch

from samples.train.budget import get_logger

log = get_logger("graph")


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """Record `step` as a CUDA graph after a few warm-up runs; return its replay (or `step` if capture fails)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(5):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        log.warning("no CUDA graph, running eagerly: %s", error)
        return step
    return graph.replay
