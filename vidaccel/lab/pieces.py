"""Where a layer's time goes: watches around the real pieces of attention layers, in a pass of its own.

What is watched is what runs: blocks, attention layers and their linear layers by hooks, the kernel and what chooses its
blocks where the processor finds them. Watches inside other watches are subtracted, so that every millisecond counts
once. "rest" is everything outside the attention layer, and its linear layers.

A compiled model has no such places, but calls the same ops: there torch's profiler tells their time (`in_ops`), and
what the compiler wrote itself is rest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import mean
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .. import wrapping
from ..family import family_of
from ..trace import Stopwatch
from . import rivals, timing

PARTS = ("selection", "norm, RoPE, reorder", "attention", "rest")
OPS = {
    "selection": (
        "block_means",
        "keep_best",
        "common_cut",
        "means_behind",
        "coarse_to_fine",
        "sign_codes",
        "in_order",
        "moved",
    ),
    "norm, RoPE, reorder": ("to_kernel", "to_ranks", "to_model"),
    "attention": ("attention",),
}
# Dense attention, as compiled models call it.
DENSE = ("vidaccel::dense_flash3", "aten::scaled_dot_product", "aten::_scaled_dot_product")


@dataclass
class Pieces:
    """What one pass has seen.

    Attributes:
        times: (list of blocks, label) -> watches.
        kernel: the last attention over the video's tokens, ready to be repeated alone.
    """

    times: dict[tuple[str, str], list[Stopwatch]] = field(default_factory=dict)
    kernel: Callable[[], object] | None = None
    _open: list[str] = field(default_factory=list)
    _list: str = ""

    @contextlib.contextmanager
    def watch(self, label: str, device: torch.device) -> Iterator[None]:
        """Time this block, unless one of the same label is being timed."""
        if label in self._open or not self._list:
            yield
            return
        self._open.append(label)
        watch = Stopwatch(device)
        try:
            yield
        finally:
            watch.stop()
            self._open.remove(label)
            self.times.setdefault((self._list, label), []).append(watch)

    def split(self, name: str) -> dict[str, float]:
        """Milliseconds of one block of a list, by `PARTS`: the mean over its blocks."""
        blocks = len(self.times[name, "block"])

        def ms(label: str) -> float:
            return sum(watch.ms or 0.0 for watch in self.times.get((name, label), ())) / blocks

        attention, attend = ms("kernel"), max(ms("attend"), ms("kernel"))
        moved = ms("site") - ms("linear") - attend
        rest = ms("block") - attend - moved
        selection = attend - attention
        return dict(zip(PARTS, (selection, moved, attention, rest), strict=True))

    def block_ms(self, name: str) -> float:
        """Milliseconds of one whole block of a list, watches included."""
        return mean(watch.ms or 0.0 for watch in self.times[name, "block"])


class _Dense(TorchFunctionMode):
    """Watches dense attention over the video's tokens."""

    def __init__(self, pieces: Pieces, tokens: int) -> None:
        super().__init__()
        self._pieces = pieces
        self._tokens = tokens

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key = args[:2] if len(args) > 1 else (kwargs["query"], kwargs["key"])
        if min(query.shape[2], key.shape[2]) < self._tokens:
            return func(*args, **kwargs)
        self._pieces.kernel = lambda: func(*args, **kwargs)
        with self._pieces.watch("kernel", query.device):
            return func(*args, **kwargs)


def in_ops(call: Callable[[], object], device: torch.device, tokens: int) -> dict[str, float]:
    """Milliseconds of a call in each of `OPS`, and in dense attention over the video's tokens, on the device.

    What an op calls counts as the op's.
    """
    kind = torch.profiler.ProfilerActivity
    activities = [kind.CPU, kind.CUDA] if device.type == "cuda" else [kind.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        call()
        timing.synchronize(device)
    part_of = {f"vidaccel::{op}": part for part, ops in OPS.items() for op in ops}

    def part(event: Any) -> str | None:
        if event.name.startswith(DENSE):
            # (b, h, l, d) of queries and of keys.
            lengths = [shape[2] for shape in event.input_shapes[:2]]
            return "attention" if min(lengths) >= tokens else None
        return part_of.get(event.name)

    found = dict.fromkeys(OPS, 0.0)
    for event in profile.events():
        above = event.cpu_parent
        while above is not None and part(above) is None:
            above = above.cpu_parent
        if above is None and (where := part(event)) is not None:
            taken = event.device_time_total if device.type == "cuda" else event.cpu_time_total
            found[where] += taken / 1e3
    return found


@contextlib.contextmanager
def watched(transformer: Any, tokens: int) -> Iterator[Pieces]:
    """Watch the calls of a transformer, accelerated or not, that is not compiled.

    Args:
        transformer: of a known family.
        tokens: video tokens of the call.
    """
    pieces, family = Pieces(), family_of(transformer)
    device = next(transformer.parameters()).device
    with contextlib.ExitStack() as undo:

        def around(module: nn.Module, label: str) -> None:
            entered: list[contextlib.ExitStack] = []

            def before(*_: Any) -> None:
                entered.append(contextlib.ExitStack())
                entered[-1].enter_context(pieces.watch(label, device))

            def after(*_: Any) -> None:
                entered.pop().close()

            undo.callback(module.register_forward_pre_hook(before).remove)
            undo.callback(module.register_forward_hook(after, always_call=True).remove)

        def over_video(query: torch.Tensor, key: torch.Tensor) -> bool:
            return min(query.shape[2], key.shape[2]) >= tokens

        def timed(where: ModuleType, name: str, label: str) -> None:
            own = getattr(where, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                if where is rivals and not over_video(*args[1:3]):
                    return own(*args, **kwargs)
                if label == "kernel":
                    pieces.kernel = lambda: own(*args, **kwargs)
                with pieces.watch(label, device):
                    return own(*args, **kwargs)

            setattr(where, name, call)
            undo.callback(setattr, where, name, own)

        for name in family.stack(transformer).lists:
            for block in getattr(transformer, name):

                def enter(*_: Any, name: str = name) -> None:
                    pieces._list = name

                def leave(*_: Any) -> None:
                    pieces._list = ""

                undo.callback(block.register_forward_pre_hook(enter).remove)
                around(block, "block")
                undo.callback(block.register_forward_hook(leave, always_call=True).remove)
        for site in family.sites(transformer):
            attn = transformer.get_submodule(site.name.removesuffix(".processor"))
            around(attn, "site")
            for module in attn.modules():
                if isinstance(module, nn.Linear):
                    around(module, "linear")
        timed(wrapping, "attend", "attend")
        timed(wrapping, "attention", "kernel")
        timed(rivals, "flash3_attention", "kernel")
        undo.enter_context(_Dense(pieces, tokens))
        yield pieces
