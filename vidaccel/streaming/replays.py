"""Forwards that come again, recorded once and played back: CUDA graphs of a stream.

Idea: in the steady state every chunk repeats the forwards of the chunk before: same shapes, same addresses, other
    values. So each kind of forward (which step, which guidance branch) is recorded as a CUDA graph when it comes a
    second time, and played back from then on, without Python and its launches in between.
Validity: a recording is played where everything that its forward reads stands at the address it was recorded with, and
    all plain numbers are the same; else the forward runs as it is, and may be recorded the next time. Growing windows
    and densities that fall from chunk to chunk therefore run without one until they stay.
Cost: the memory of one forward's activations, shared by all recordings, and one more forward when it is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch

Forward = Callable[..., torch.Tensor]
# (forward, inputs that stay) -> (its output that stays, plays the forward back)
Record = Callable[[Forward, tuple[torch.Tensor, ...]], tuple[torch.Tensor, Callable[[], None]]]


class _Recording(NamedTuple):
    key: Hashable
    inputs: tuple[torch.Tensor, ...]
    output: torch.Tensor
    play: Callable[[], None]


class Replays:
    """Recordings of one stream's forwards.

    Args:
        record: makes a recording; CUDA graphs, unless something else is given.

    Attributes:
        played: forwards that were played back so far.
    """

    def __init__(self, record: Record | None = None) -> None:
        self.played = 0
        self._record = record or _cuda_graphs()
        self._seen: dict[Hashable, Hashable] = {}
        self._recorded: dict[Hashable, _Recording] = {}

    def run(self, kind: Hashable, reads: object, forward: Forward, *inputs: torch.Tensor) -> torch.Tensor:
        """The output of `forward(*inputs)`.

        Args:
            kind: of the forward; there is one recording of each.
            reads: tensors that it reads beside its inputs, and whatever plain values decide what it does, in tuples.
            forward: computes; it writes nothing but tensors that stay.
            inputs: tensors, wherever they are.
        """
        key = (signature(reads), tuple((tuple(x.shape), x.dtype) for x in inputs))
        recording = self._recorded.get(kind)
        if recording is None or recording.key != key:
            self._recorded.pop(kind, None)
            if self._seen.get(kind) != key:
                # The first of its kind also loads kernels and makes what is kept, which no recording may do.
                self._seen[kind] = key
                return forward(*inputs)
            kept = tuple(x.clone() for x in inputs)
            recording = self._recorded[kind] = _Recording(key, kept, *self._record(forward, kept))
        for place, x in zip(recording.inputs, inputs, strict=True):
            place.copy_(x)
        recording.play()
        self.played += 1
        return recording.output.clone()


def signature(x: object) -> Hashable:
    """What must not change: addresses and shapes of tensors, plain values as they are, other things by identity."""
    if isinstance(x, torch.Tensor):
        return x.data_ptr(), tuple(x.shape), x.stride(), x.dtype
    if isinstance(x, tuple):
        return tuple(signature(each) for each in x)
    return x if isinstance(x, (int, float, str, type(None))) else id(x)


def _cuda_graphs() -> Record:
    pool = torch.cuda.graph_pool_handle()

    def record(forward: Forward, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            output = forward(*inputs)
        return output, graph.replay

    return record
