"""A second path with full attention, whose cross-attention guides the first one (FreeSwim).

Idea: a window keeps detail and loses the plan of the whole frame, so objects repeat; what the text asks for is looked
    up by a path that sees everything.
Math: a guided call carries two copies of every sample. In self-attention the first attends through the window, the
    second to all; in cross-attention the second one's queries serve both. After the last block the second is dropped.
    With a period n > 1 only every n-th step of the conditional branch is guided, and in between each layer adds the
    cross-attention output that it kept; the unconditional branch runs alone. Where one call holds both branches, as in
    LTX-Video, it is guided as a whole.
Cost: a guided call is a dense and a sparse one, from the first layer on that runs sparse; there projections are shared.
    What comes before (embeddings, dense layers) and what comes after the blocks runs once, as do cross-attention and
    all other calls: nothing linear is done twice for rows that are equal. Kept outputs are layers x tokens x width:
    15.8 GB for Wan 1.3B at 1088x1920 and 81 frames.
Source: FreeSwim, arXiv 2511.14712, sections 3.2 and 3.3. Its released code carries two copies through every call.
Limits: Wan, SkyReels-V2 and LTX-Video, whose cross-attention is known; no cache on the same transformer; of Wan 2.2's
    two experts, a period of 1 only. Where the number of steps is not known, what is kept is freed at the next video or
    on removal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from .caching.layer_swap import LayerSwap, Place
from .errors import InstallError
from .family import Call
from .frontdoor import FrontDoor
from .patterns import FreeSwim, Pattern, of_layer
from .schedule import Step
from .trace import CallRecord
from .wrapping import SparseAttnProcessor

Mode = Literal["alone", "both", "kept"]


class CrossProcessor:
    """Stands in one cross-attention layer and holds the processor that stood there before.

    Attributes:
        wrapped: the processor that stood here.
        mode: "alone" hands the call on; "both" lets the second copy of the samples, where there are two, speak for
            both; "kept" computes nothing.
        rows: samples in one copy.
        keeps: keep what "both" says.
        kept: (b, tokens, width), what it said.
        host: where it is kept instead, in host memory; None keeps it where it was made.
    """

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped
        self.mode: Mode = "alone"
        self.rows = 0
        self.keeps = False
        self.kept: torch.Tensor | None = None
        self.host: torch.Tensor | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Attend, or give what was kept."""
        if self.mode == "kept":
            assert self.kept is not None
            return self.kept.to(hidden_states, non_blocking=True)
        inputs = (hidden_states, encoder_hidden_states, attention_mask)
        if self.mode == "alone":
            return self.wrapped(attn, *inputs, rotary_emb, **kwargs)
        out = self.wrapped(attn, *(None if x is None else x[-self.rows :] for x in inputs), rotary_emb, **kwargs)
        if self.keeps:
            self.kept = out if self.host is None else self.host.copy_(out, non_blocking=True)
        return out if hidden_states.shape[0] == self.rows else torch.cat([out, out])

    @property
    def _attention_backend(self) -> Any:
        return self.wrapped._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.wrapped._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return self.wrapped._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.wrapped._parallel_config = config


class _Made(NamedTuple):
    """What the kept outputs were made for."""

    trajectory: int
    latents: torch.Size
    step: int


class Guide:
    """The second path of one transformer.

    Args:
        door: the transformer's front door.
        pattern: its period and memory.
        layers: numbers of those whose cross-attention it guides; the second path goes through all.
        originals: every processor that stands in the transformer, by name.
        sites: our processors of its self-attention, by name.

    Attributes:
        processors: one a cross-attention layer, by name.

    Raises:
        InstallError: the family's cross-attention is not known, or a period was asked of one of two experts.
    """

    def __init__(
        self,
        door: FrontDoor,
        pattern: FreeSwim,
        layers: Set[int],
        originals: Mapping[str, Any],
        sites: Mapping[str, SparseAttnProcessor],
    ) -> None:
        names = door.family.cross_sites(door.transformer)
        check_guide(pattern, type(door.transformer).__name__, cross=bool(names), experts=door.expert is not None)
        self._door = door
        self._pattern = pattern
        self._guided = layers
        self._sites = sites
        self._blocks = {site.name.rsplit(".", 2)[0]: site for site in door.family.sites(door.transformer)}
        guided = [name for name in names if self._blocks[name.rsplit(".", 2)[0]].index in layers]
        self.processors = {name: CrossProcessor(originals[name]) for name in guided}
        self._layer = {site.name: site.index for site in self._blocks.values()}
        # Not the family's own stack alone: VACE has blocks that run before it.
        lists = tuple(dict.fromkeys(path.partition(".")[0] for path in self._blocks))
        stack = door.family.stack(door.transformer)._replace(lists=lists)
        self._swap = LayerSwap(door.transformer, stack, self._visit)
        self._made: _Made | None = None
        self._rows = self._first = 0

    @classmethod
    def of(
        cls, door: FrontDoor, pattern: Pattern, originals: Mapping[str, Any], sites: Mapping[str, SparseAttnProcessor]
    ) -> Guide | None:
        """The second path that a pattern asks for, for all layers or some of them; None for none.

        Raises:
            InstallError: as above, or layers ask for several.
        """
        asked = guide_of(pattern, (site.index for site in door.family.sites(door.transformer)))
        return None if asked is None else cls(door, *asked, originals, sites)

    def remove(self) -> None:
        """Free what is kept; also after a call that was interrupted from the keyboard."""
        self._swap.restore()
        self._forget()

    def before(self, call: Call, step: Step, record: CallRecord) -> None:
        """Decide how this call is guided."""
        if len(self._door.subscribers()) > 1:
            raise InstallError(
                "freeswim's second path gives some calls twice the rows, which whatever else acts on this transformer, "
                "such as a cache, cannot follow; drop the cache, or use guide=0"
            )
        is_asked = any(self._layer[name] in self._guided for name, _ in record.scheduled)
        record.guided = mode = self._decide(call, step, record) if is_asked else "alone"
        self._rows = call.latents.shape[0] if mode == "both" and call.latents is not None else 0
        for processor in self.processors.values():
            processor.mode, processor.rows = mode, self._rows
        if mode != "both":
            return
        self._first = min(self._layer[name] for name, _ in record.scheduled)
        for site in self._sites.values():
            site.full_rows = self._rows
        self._swap.swap()

    def after(self, record: CallRecord) -> None:
        """End of the call; after the last step nothing is kept."""
        self._swap.restore()
        for processor in self.processors.values():
            processor.mode = "alone"
        for site in self._sites.values():
            site.full_rows = site.same_rows = 0
        is_last = record.total is not None and record.step + 1 >= record.total and record.branch != "uncond"
        if record.failed or is_last:
            self._forget()

    def _visit(self, place: Place, block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run a block on what it needs: one copy of every sample before the first sparse layer, two from there on."""
        site, rows = self._blocks[place.name], self._rows
        if site.index < self._first:
            return block(*args, **kwargs)
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        # Where no copies come in, they are equal up to this layer's attention, which takes the rows of one.
        parted = any(x.shape[0] == 2 * rows for x in given)
        self._sites[site.name].same_rows = 0 if parted else rows
        args, kwargs = tuple(map(self._twice, args)), {key: self._twice(value) for key, value in kwargs.items()}
        if parted and self._door.family.rope_of_samples:
            kwargs = {key: tuple(map(self._twice, x)) if isinstance(x, tuple) else x for key, x in kwargs.items()}
        out = block(*args, **kwargs)
        if site.index < max(self._layer.values()):
            return out
        # Nobody asks for the second path any more, nor for what VACE adds to it.
        return out[:rows] if isinstance(out, torch.Tensor) else tuple(each[:rows] for each in out)

    def _twice(self, x: Any) -> Any:
        """Two copies of what has a row for each sample; of one sample they are one piece of memory."""
        if not isinstance(x, torch.Tensor) or x.shape[0] != self._rows:
            return x
        return x.expand(2, *x.shape).flatten(0, 1)

    def _decide(self, call: Call, step: Step, record: CallRecord) -> Mode:
        period = self._pattern.guide
        if period == 1 or record.branch is None:
            return "both"
        if record.branch == "uncond":
            return "alone"
        assert call.latents is not None
        made, shape = self._made, call.latents.shape
        trajectory = self._door.clock.trajectory
        if made is not None and made[:2] == (trajectory, shape) and step.index - made.step < period:
            return "kept"
        if made is None or made.latents != shape:
            self._prepare(call)
        self._made = _Made(trajectory, shape, step.index)
        return "both"

    def _prepare(self, call: Call) -> None:
        """Decide which layers keep their outputs in host memory."""
        assert call.latents is not None
        module = self._door.transformer
        shape = (call.latents.shape[0], call.grid.tokens, self._door.family.stack(module).width)
        size = kept_bytes(1, *shape, module.dtype)
        here = layers_here(self._pattern, len(self.processors), size)
        pin = call.device.type == "cuda"
        for number, processor in enumerate(self.processors.values()):
            processor.keeps, processor.kept = True, None
            processor.host = (
                None if number < here else torch.empty(shape, dtype=module.dtype, device="cpu", pin_memory=pin)
            )
        self._door.trace.note(
            f"freeswim keeps cross-attention outputs of {len(self.processors)} layers between guided steps: "
            f"{here * size / 2**30:.2f} GiB on {call.device}, "
            f"{(len(self.processors) - here) * size / 2**30:.2f} GiB in host memory"
        )

    def _forget(self) -> None:
        self._made = None
        for processor in self.processors.values():
            processor.kept = processor.host = None
            processor.keeps = False


def guide_of(pattern: Pattern, layers: Iterable[int]) -> tuple[FreeSwim, set[int]] | None:
    """The second path that a pattern asks for, and the numbers of the layers that it guides; None for none.

    Raises:
        InstallError: layers ask for several.
    """
    asked: dict[FreeSwim, set[int]] = {}
    for layer in layers:
        part = of_layer(pattern, layer)
        if isinstance(part, FreeSwim) and part.guide:
            asked.setdefault(FreeSwim(guide=part.guide, guide_gib=part.guide_gib), set()).add(layer)
    if len(asked) > 1:
        several = " and ".join(f"guide={one.guide}, guide_gib={one.guide_gib}" for one in asked)
        raise InstallError(
            f"layers ask for freeswim with {several}, but one second path goes through all of them; give all the "
            "same, or guide=0 to some"
        )
    return next(iter(asked.items()), None)


def check_guide(pattern: FreeSwim, transformer: str, *, cross: bool, experts: bool) -> None:
    """Raise InstallError where a model cannot have a second path.

    Args:
        pattern: its period.
        transformer: the model's class.
        cross: its cross-attention is known.
        experts: it is one of two.
    """
    if not cross:
        raise InstallError(
            f"freeswim guide={pattern.guide} was asked for, but vidaccel knows no cross-attention of {transformer} to "
            "guide; it knows that of Wan, SkyReels-V2 and LTX-Video. Use guide=0"
        )
    if experts and pattern.guide > 1:
        raise InstallError(
            f"freeswim guide={pattern.guide} was asked of a model with two experts, where nobody tells one of them "
            "when to free what it keeps; use guide=1, or guide=0"
        )


def layers_here(pattern: FreeSwim, layers: int, size: float) -> int:
    """How many of these layers keep their outputs, of `size` bytes each, on the device itself; none at each step."""
    if pattern.guide <= 1:
        return 0
    return layers if pattern.guide_gib is None or not size else min(layers, int(pattern.guide_gib * 2**30 / size))


def kept_bytes(layers: int, batch: int, tokens: int, width: int, dtype: torch.dtype) -> int:
    """Bytes of the cross-attention outputs that a period keeps."""
    return layers * batch * tokens * width * dtype.itemsize
