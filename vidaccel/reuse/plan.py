"""Planning a chunk: token order, what is kept of the past, and whether choosing blocks would pay at all."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from ..errors import UsageError
from ..grid import TokenLayout, VideoGrid
from ..patterns.gain import break_even
from ..streaming.growth import Growth
from ..streaming.rollout import Rollout
from .methods import CausalAnn, CausalLightForcing, Methods
from .parts import Parts
from .selection import FrameRule, frame_layout

# To move a token costs as much as so many query-key pairs of dense attention: 480p and 720p, one H200.
_MOVE = 1500
_SUBSTITUTE = "hybrid memory: merged keys, its training-free substitute, as no trained projection was given"


class ChunkPlan(NamedTuple):
    """One chunk as all its layers see it.

    Attributes:
        layout: order of the own tokens.
        extra: slots of merged keys in use, in front of everything else that is seen.
        k_len: (blocks,) int32, filled slots of the key blocks of everything seen; None where there are no holes.
        tokens: (tokens,) int64, the filled slots of everything seen; None where there are no holes.
        rule: Light Forcing's choice; None where this chunk is dense.
        ann_kept: blocks of history in a row, for nearest neighbours; None where this chunk is dense.
        reuses: FlashBlock works on this chunk, where it is asked for.
        parts: attends to the past and the own chunk as two results; None where a launch for each does.
        probe: likewise, of the rows that FlashBlock looks at.
        rotary: cosines and sines of the own tokens, in the layout's order.
    """

    layout: TokenLayout
    extra: int = 0
    k_len: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    rule: FrameRule | None = None
    ann_kept: int | None = None
    reuses: bool = True
    parts: Parts | None = None
    probe: Parts | None = None
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None


class PlannedChunk(NamedTuple):
    """A chunk before it is made.

    Attributes:
        plan: what its layers are given.
        history: latent frames that it sees as they are.
        density: pairs of own queries and keys that it computes, of those that a dense chunk would; blocks and merged
            keys count whole, FlashBlock's reuse does not count.
        note: why it runs as it does.
    """

    plan: ChunkPlan
    history: int
    density: float
    note: str


class ChunkPlanner:
    """Plans the chunks of one stream.

    Args:
        methods: what is used.
        rollout: chunks and window.
        grid: (height, width) in tokens of a frame.
        device: where plans are used.

    Attributes:
        merge: how evicted frames are merged, with room for those that are remembered; None where they are forgotten.
        window: frames in the cache, the own chunk included; None for all.
        slots: of one frame.
        extra: slots of merged keys.
        horizon: frames before those kept whole that the rollout's window would show; None where all are remembered.
        token_slots: (tokens,) slots of a frame that hold tokens; None where all do.

    Raises:
        UsageError: methods that this rollout leaves no room for.
    """

    def __init__(self, methods: Methods, rollout: Rollout, grid: tuple[int, int], device: torch.device) -> None:
        self.methods = methods
        self.rollout = rollout
        self.grid = grid
        self._device = device
        self._layouts: dict[int, TokenLayout] = {}
        # Tensors of plans, by frames (and merged keys); always the same ones, for CUDA graphs.
        self._holes: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._always: dict[int, torch.Tensor] = {}
        self._kept = torch.zeros((), dtype=torch.int32, device=device)
        self._parts: dict[tuple[int, int, int], Parts] = {}
        block = methods.block
        self._frame = None if block is None else frame_layout(1, *grid, block)
        self.slots = grid[0] * grid[1] if self._frame is None else self._frame.slots
        self.token_slots = None if self._frame is None else self._frame.slot_of.to(device)
        self.merge = methods.hybrid.substitute if methods.hybrid is not None else methods.merge
        self.window = rollout.window
        keeps_window = methods.hybrid is not None or (self.merge is not None and self.merge.recent is None)
        if keeps_window and rollout.window is None:
            raise UsageError("a memory of evicted frames was asked for, but without a window none is evicted")
        self.horizon: int | None = None
        if self.merge is not None and self.merge.recent is not None:
            wanted = rollout.sink + self.merge.recent + rollout.chunk
            self.horizon = None if rollout.window is None else max(0, rollout.window - wanted)
            self.window = wanted if rollout.window is None else min(wanted, rollout.window)
            if self.horizon is not None:
                # More room would hold nothing, and be attended to.
                room = min(self.merge.frames, self.horizon)
                self.merge = replace(self.merge, frames=room) if room else None
        self.extra = 0 if self.merge is None else self.merge.frames * self.slots

    def layout(self, frames: int) -> TokenLayout:
        """Order of the tokens of some frames; the same object for every chunk of so many."""
        if frames not in self._layouts:
            block, grid = self.methods.block, VideoGrid(frames, *self.grid)
            made = TokenLayout.of(grid) if block is None else frame_layout(*grid, block)
            self._layouts[frames] = made.to(self._device)
        return self._layouts[frames]

    def plan(self, start: int, own: int, history: list[int]) -> PlannedChunk:
        """Plan a chunk of `own` frames from frame `start` on; `history` numbers the frames in the cache, by place."""
        layout = self.layout(own)
        made = start + own
        dense_frames = made if self.rollout.window is None else min(made, self.rollout.window)
        # Frames that were never absorbed have left no merged keys.
        extra = min(self.extra, (start - len(history)) * self.slots)
        seen = len(history) + own + extra / self.slots
        plan = ChunkPlan(layout, extra)
        density, note = seen / dense_frames, ""
        select = self.methods.select
        if self._frame is not None:
            plan = self._with_holes(plan, len(history) + own)
        if isinstance(select, CausalLightForcing) and (history or extra):
            kept, rule, note = self._light_forcing(select, made, own, history, dense_frames, extra)
            if rule is not None:
                whole = own * self.slots // select.block
                # Choosing alone drops blocks of the own chunk too; reuse needs all of them, and a launch for each part.
                rests = self.methods.flash is not None and self.methods.break_even is None and whole >= kept
                plan = plan._replace(rule=rule, reuses=not rests)
                # As many blocks are then chosen of the past alone.
                computed = whole + min(kept, rule.most - whole) if self.methods.flash and not rests else kept
                density = computed * select.block / (dense_frames * self.slots)
                if rests:
                    note = (
                        f"FlashBlock is disabled: beside it all {whole} blocks of the own chunk are attended to, where "
                        f"Light Forcing keeps {kept} in all"
                    )
        elif isinstance(select, CausalAnn) and (history or extra):
            blocks = -(-(len(history) * self.slots + extra) // select.block)
            if why := self._ann_loses(select, own * self.slots, len(history) * self.slots + extra):
                note = why
            else:
                kept = max(1, round(select.density * blocks))
                plan = plan._replace(ann_kept=kept)
                density = (own + kept * select.block / self.slots) / dense_frames
        if self.methods.flash is not None and self._frame is None and plan.ann_kept is None and (history or extra):
            queries, past = own * self.slots, len(history) * self.slots + extra
            few = min(self.methods.flash.probe, queries)
            plan = plan._replace(parts=self._two(queries, past, queries), probe=self._two(few, past, queries))
        return PlannedChunk(plan, len(history), density, "; ".join(filter(None, (note, self._merge_note))))

    def oldest(self, start: int, own: int) -> int | None:
        """The oldest frame behind the first ones that a chunk sees, merged or whole; None where all are whole."""
        if self.merge is None or self.merge.recent is None:
            return None
        first, window = self.rollout.sink, self.rollout.window
        return first if window is None else max(first, start + own - window + first)

    @property
    def _merge_note(self) -> str:
        given = self.methods.merge
        if given is not None and self.merge is None:
            return (
                f"TempCache is disabled: a window of {self.rollout.window} frames leaves none to merge beside the "
                f"{self.rollout.sink} first ones, {given.recent} recent ones and a chunk of {self.rollout.chunk}"
            )
        return "" if self.methods.hybrid is None or self.merge is None else _SUBSTITUTE

    def _two(self, queries: int, past: int, own: int) -> Parts:
        """The same object for every chunk of this size."""
        key = (queries, past, own)
        if key not in self._parts:
            self._parts[key] = Parts(*key, self._device)
        return self._parts[key]

    def _light_forcing(
        self, select: CausalLightForcing, made: int, own: int, history: list[int], dense_frames: int, extra: int
    ) -> tuple[int, FrameRule | None, str]:
        per_frame = self.slots // select.block
        growth = Growth(select.density, select.base_density, self.rollout.chunk, select.frames, self.rollout.window)
        # By the frames that are made after it: the first chunk may be short.
        wanted = growth.at(-(-made // self.rollout.chunk) - 1)
        before = extra // select.block
        keep_frames = select.keep_frames if len(history) > select.keep_frames else None
        looked = len(history) if keep_frames is None else keep_frames
        eligible = before + (looked + own) * per_frame
        # The budget is a share of what a dense chunk sees; merged keys have used up some of those already.
        kept = min(eligible, max(1, int(wanted * dense_frames * per_frame + 1e-6)))
        everything = before + (len(history) + own) * per_frame
        if kept >= (least := self._break_even(select.block)) * everything:
            return everything, None, _dense_note(kept / everything, least)
        latest = sorted(frame for frame in history if frame >= select.sink)[-select.near or len(history) :]
        always = [frame < select.sink or frame in latest for frame in history]
        seen = self._always.setdefault(len(always), torch.empty(len(always), dtype=torch.bool, device=self._device))
        seen.copy_(torch.tensor(always, dtype=torch.bool))
        self._kept.fill_(kept)
        return kept, FrameRule(self._kept, eligible, keep_frames, seen, before, per_frame), ""

    def _ann_loses(self, select: CausalAnn, own: int, past: int) -> str:
        """Why dense attention is as fast for so many own and past slots; empty where it is not."""
        if self.methods.break_even is not None:
            least = self.methods.break_even
            return _dense_note(select.density, least) if select.density >= least else ""
        pairs = own + select.density * past / break_even(select.block)
        # Queries and keys are sorted, values and results follow them.
        cost = (pairs + 2 * _MOVE * (own + past) / own) / (own + past)
        if cost < 1:
            return ""
        return (
            f"dense: sorting, and attention at density {select.density:.2f}, would take {cost:.2f} of a dense chunk's "
            "time, by estimate"
        )

    def _break_even(self, block: int) -> float:
        given = self.methods.break_even
        return break_even(block) if given is None else given

    def _with_holes(self, plan: ChunkPlan, frames: int) -> ChunkPlan:
        if (frames, plan.extra) not in self._holes:
            assert self._frame is not None
            block = self._frame.block
            lengths = self._frame.q_len.repeat(frames)
            lengths = torch.cat([torch.full((plan.extra // block,), block, dtype=torch.int32), lengths])
            frame = torch.arange(frames)[:, None] * self.slots
            tokens = torch.cat([torch.arange(plan.extra), (self._frame.slot_of + frame).flatten() + plan.extra])
            self._holes[frames, plan.extra] = (lengths.to(self._device), tokens.to(self._device))
        k_len, tokens = self._holes[frames, plan.extra]
        return plan._replace(k_len=k_len, tokens=tokens)


def _dense_note(density: float, least: float) -> str:
    return f"dense: density {density:.2f} of what is there is above the break-even of {least}"
