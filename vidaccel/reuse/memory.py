"""What one layer attends to while a chunk is made: its past as the methods leave it, and its own chunk.

A compiled model sees `remembered`, one opaque op of tensors: what a layer remembers and which step it is on are looked
up inside, at run time, so that all layers, steps and chunks of one size share one graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch

from ..blocks import BlockMask
from ..grid import TokenLayout
from ..kernels.attention import attention
from ..kernels.merge import merge
from ..kernels.select import put_back, taken
from ..streaming.kvcache import LayerCache
from ..streaming.rope import VideoRope
from .flashblock import Calibration, late_error
from .in_place import in_place
from .linear_state import LinearState
from .methods import CausalAnn, CausalLightForcing, Methods
from .parts import Part
from .past import HashedPast, PooledPast
from .plan import ChunkPlan
from .selection import only_heads, rectangle, row_layout
from .tempcache import MergedKeys

# Heads (h,) whose past is attended to; a tuple where it is known without asking the device.
Wanted = torch.Tensor | tuple[bool, ...]
# (q, k, v) -> out, on the backend that the user has chosen
Dense = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Turn:
    """Where a stream is; one object for all layers of a branch, changed before every forward.

    Attributes:
        reused: (2,) fp32, heads that reused and heads that might have, since the stream began.
        calls: forwards of the open chunk so far.
        writes: this one writes the clean chunk to the cache.
        calibration: watches instead of reusing, where there is one.
    """

    reused: torch.Tensor
    calls: int = 0
    writes: bool = False
    calibration: Calibration | None = None


_numbers = itertools.count()
_live: WeakValueDictionary[int, LayerMemory] = WeakValueDictionary()


class LayerMemory:
    """One layer of one branch.

    Args:
        number: of the layer.
        cache: its keys and values.
        methods: what is used.
        turn: where the stream is.
        dense: dense attention.
        merged: keys that stand for evicted frames.
        linear: a state that stands for them.

    Attributes:
        ticket: int64 scalar in host memory, under which `remembered` finds it.
    """

    def __init__(
        self,
        number: int,
        cache: LayerCache,
        methods: Methods,
        turn: Turn,
        dense: Dense,
        merged: MergedKeys | None = None,
        linear: LinearState | None = None,
    ) -> None:
        self.number = number
        self.cache = cache
        self.methods = methods
        self.turn = turn
        self.dense = dense
        self.merged = merged
        self.linear = linear
        self.plan: ChunkPlan | None = None
        number_of_all = next(_numbers)
        _live[number_of_all] = self
        self.ticket = torch.tensor(number_of_all)
        self._bias: torch.Tensor | None = None
        select = methods.select
        self._hashed = HashedPast(select) if isinstance(select, CausalAnn) else None
        self._pooled = PooledPast(select) if isinstance(select, CausalLightForcing) else None
        self._kept: tuple[torch.Tensor, ...] | None = None
        self._kept_probe: tuple[torch.Tensor, ...] | None = None
        # Heads that reuse, where that is known beforehand, by those that do not.
        self._tables: dict[tuple[bool, ...], torch.Tensor] = {}

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What it keeps beside the cache from one forward to another."""
        pasts = [past.known or () for past in (self._hashed, self._pooled) if past is not None]
        states = [state.tensors for state in (self.merged, self.linear) if state is not None]
        bias = () if self._bias is None else (self._bias,)
        return tuple(itertools.chain(bias, self._kept or (), self._kept_probe or (), *pasts, *states))

    def open(self, plan: ChunkPlan) -> None:
        """A new chunk: whatever was derived from the chunk before is worthless."""
        self.plan = plan
        for past in (self._hashed, self._pooled):
            if past is not None:
                past.open()
        if self.merged is not None and plan.extra:
            bias = torch.nn.functional.pad(self.merged.bias(), (0, self.cache.k.shape[1] - self.cache.extra))
            kept = None if self._bias is None else (self._bias,)
            (self._bias,) = in_place(kept, bias[..., self._unused :])
        else:
            self._bias = None

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of the own chunk's q, k, v (b, own slots, h, d) in the plan's order."""
        out = self._window(query, key, value)
        if self.linear is None or not self.linear.tokens:
            return out
        assert self.plan is not None
        assert self.plan.rotary is not None
        return out + self.linear.attend(query, VideoRope.unrotated(query, self.plan.rotary))

    def _window(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention to the cache and the own chunk."""
        assert self.plan is not None
        keys, values = (x[:, self._unused :] for x in self.cache.write(key, value))
        own = key.shape[1]
        has_history = keys.shape[1] > own
        flash, turn = self.methods.flash, self.turn
        # A clean pass that neither fills the store nor reads it needs no parts.
        splits = flash is not None and self.plan.reuses and (flash.refresh or not turn.writes)
        if has_history and (splits or self.plan.ann_kept is not None):
            return self._in_two_parts(query, keys, values, own)
        if has_history and self.plan.rule is not None:
            q, k, v = (_folded(x) for x in (query, keys, values))
            mask = self._chosen(q, k, own)
            out, _ = attention(q, k, v, mask, key_bias=self._folded_bias(k.shape[1]))
            return _unfolded(out, query.shape[0])
        if self._bias is not None or self.plan.tokens is not None:
            return self._whole(query, keys, values)
        return self.dense(query, keys, values)

    def _whole(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Dense, past holes and with the logarithms of merged keys."""
        assert self.plan is not None
        layout, tokens = self.plan.layout, self.plan.tokens
        bias = self._bias
        if tokens is None:
            out, _ = attention(query, keys, values, key_bias=bias)
            return out
        keys, values = keys.index_select(1, tokens), values.index_select(1, tokens)
        query = layout.to_model(query)
        if bias is None:
            out = self.dense(query, keys, values)
        else:
            out, _ = attention(query, keys, values, key_bias=bias.index_select(2, tokens))
        return layout.to_kernel(out)

    def _in_two_parts(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, own: int) -> torch.Tensor:
        """The own chunk whole and fresh; its past chosen, or reused, or both."""
        q, k, v = (_folded(x) for x in (query, keys, values))
        start = k.shape[1] - own
        flash, turn = self.methods.flash, self.turn
        if flash is None or turn.calls == 0 or self._kept is None or (turn.writes and not flash.refresh):
            past, mine = self._parts(q, k, v, start)
            if flash is not None and not turn.writes:
                self._kept = in_place(self._kept, *past)
                if self._chooses:
                    self._kept_probe = in_place(self._kept_probe, *self._probe(q, k, v, start)[1])
        else:
            past, mine = self._reused(q, k, v, start)
        out, _ = merge(*past, *mine)
        return _unfolded(out, query.shape[0])

    def _parts(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, wanted: Wanted | None = None
    ) -> tuple[Part, Part]:
        """The past's part, of all heads or of those wanted, and the own chunk's, which begins at key `start`."""
        assert self.plan is not None
        if self.plan.parts is not None:
            return self.plan.parts(q, k, v, (True,) if wanted is None else wanted, self._folded_bias(k.shape[1]))
        if isinstance(wanted, tuple):
            wanted = ~self._tables[wanted]
        own = attention(q, k[:, start:], v[:, start:], self._own_mask(self.plan.layout))
        return self._external(q, k[:, :start], v[:, :start], wanted), own

    def _external(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, wanted: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The past's part, of all heads or of those wanted (h,) bool."""
        assert self.plan is not None
        if self.plan.ann_kept is not None:
            return self._nearest(q, k, v, wanted)
        bias = self._folded_bias(k.shape[1])
        if self.plan.rule is not None:
            mask: BlockMask | None = self._chosen(q, k, 0)
        elif self.plan.k_len is not None:
            mask = self._dense_mask(self.plan.layout, self._past_lengths())
        else:
            mask = None
        if wanted is not None and mask is not None:
            mask = only_heads(mask, wanted)
        return attention(q, k, v, mask, key_bias=bias)

    def _reused(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int) -> tuple[Part, Part]:
        """As `_parts`; the past's is the kept one, anew for heads that would be too far off."""
        assert self.plan is not None
        assert self._kept is not None
        flash, turn = self.methods.flash, self.turn
        assert flash is not None
        if turn.calibration is not None:
            past, mine = self._parts(q, k, v, start)
            # What stands in holes is no attention.
            filled = self.plan.layout.slot_of
            then, now = ((out[:, filled], lse[:, :, filled]) for out, lse in (self._kept, past))
            reuse = turn.calibration.see(turn.calls - 1, self.number, *now, *then)[0]
        elif flash.calibrated is not None:
            step = flash.calibrated[min(turn.calls, len(flash.calibrated)) - 1][self.number]
            wanted = step * (q.shape[2] // len(step))
            if wanted not in self._tables:
                self._tables[wanted] = ~torch.tensor(wanted, device=q.device)
            reuse = self._tables[wanted]
            past, mine = self._parts(q, k, v, start, wanted)
        else:
            rows, probe, own = self._probe(q, k, v, start)
            # Where blocks are chosen, drift is that of attention to all of the past, then and now.
            old = self._kept_probe if self._chooses else (self._kept[0][:, rows], self._kept[1][:, :, rows])
            assert old is not None
            reuse = late_error(merge(*probe, *own)[0], merge(old[0], old[1], *own)[0])[0] < flash.threshold
            if self._chooses:
                self._kept_probe = in_place(old, *_either(reuse, old, probe))
            past, mine = self._parts(q, k, v, start, ~reuse)
        turn.reused += torch.stack([reuse, torch.ones_like(reuse)]).sum(1)
        self._kept = in_place(self._kept, *_either(reuse, self._kept, past))
        return (self._kept[0], self._kept[1]), mine

    @property
    def _unused(self) -> int:
        """Slots in front of the cache that hold nothing yet."""
        assert self.plan is not None
        return self.cache.extra - self.plan.extra

    @property
    def _merged_sizes(self) -> torch.Tensor | None:
        """(b * h, extra), where there are merged keys."""
        return None if self.merged is None or self._bias is None else self.merged.size[:, self._unused :]

    @property
    def _chooses(self) -> bool:
        assert self.plan is not None
        return self.plan.rule is not None or self.plan.ann_kept is not None

    def _probe_rows(self, device: torch.device, count: int) -> torch.Tensor:
        """Evenly spread own tokens."""
        assert self.plan is not None
        slots = self.plan.layout.slot_of
        place = torch.arange(count, device=device) * slots.shape[0] // count
        return slots[place]

    def _probe(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int) -> tuple[torch.Tensor, Part, Part]:
        """Some rows, their part of all of the past, and their own chunk's."""
        assert self.plan is not None
        assert self.methods.flash is not None
        rows = self._probe_rows(q.device, min(self.methods.flash.probe, q.shape[1]))
        few, bias = q[:, rows], self._folded_bias(k.shape[1])
        if self.plan.probe is not None:
            return rows, *self.plan.probe(few, k, v, key_bias=bias)
        layout = row_layout(few.shape[1], self.plan.layout.block, q.device)
        own = attention(few, k[:, start:], v[:, start:], self._own_mask(layout))
        mask = None if self.plan.k_len is None else self._dense_mask(layout, self._past_lengths())
        bias = self._folded_bias(start)
        return rows, attention(few, k[:, :start], v[:, :start], mask, key_bias=bias), own

    def _nearest(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, wanted: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The past's part over the blocks that hash like the queries."""
        assert self._hashed is not None
        assert self.plan is not None
        assert self.plan.ann_kept is not None
        mask, q_order, k_order = self._hashed.choose(q, k, self.plan.ann_kept, self._merged_sizes)
        if wanted is not None:
            mask = only_heads(mask, wanted)
        places = q_order.T[None], k_order.T[None]
        moved = [taken(x, order) for x, order in ((q, places[0]), (k, places[1]), (v, places[1]))]
        bias = self._folded_bias(k.shape[1])
        bias = None if bias is None else bias.expand(1, q.shape[2], -1).gather(2, k_order[None])
        out, lse = attention(moved[0], moved[1], moved[2], mask, key_bias=bias)
        return put_back(out, places[0]), torch.empty_like(lse).scatter(2, q_order[None], lse)

    def _chosen(self, q: torch.Tensor, k: torch.Tensor, own: int) -> BlockMask:
        """Light Forcing's mask over the past and `own` slots behind it; k holds no more than these."""
        assert self.plan is not None
        assert self._pooled is not None
        return self._pooled.choose(q, k, own, self.plan, self._merged_sizes)

    def _own_mask(self, layout: TokenLayout) -> BlockMask | None:
        assert self.plan is not None
        return None if self.plan.k_len is None else self._dense_mask(layout, self.plan.layout.q_len)

    def _past_lengths(self) -> torch.Tensor:
        assert self.plan is not None
        assert self.plan.k_len is not None
        return self.plan.k_len[: self.plan.k_len.shape[0] - self.plan.layout.blocks]

    def _dense_mask(self, layout: TokenLayout, k_len: torch.Tensor) -> BlockMask:
        every = torch.arange(k_len.shape[0], device=k_len.device)
        return rectangle(every.expand(1, layout.blocks, -1), layout, k_len)

    def _folded_bias(self, slots: int) -> torch.Tensor | None:
        return None if self._bias is None else self._bias.flatten(0, 1)[None, :, :slots]


@torch.library.custom_op("vidaccel::remembered", mutates_args=())
def remembered(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ticket: torch.Tensor) -> torch.Tensor:
    """`LayerMemory.attend` of the memory with this ticket; q, k, v and the result are (b, own slots, h, d)."""
    return _live[int(ticket)].attend(query, key, value).contiguous()


@remembered.register_fake
def _(query: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    return query.new_empty(query.shape)


def _either(
    wanted: torch.Tensor, first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of the first for wanted heads (h,), of the second for the others: exactly, and in one pass."""
    mine, other = (~wanted)[:, None], wanted[:, None]
    return merge(first[0], first[1].masked_fill(mine, -torch.inf), second[0], second[1].masked_fill(other, -torch.inf))


def _folded(x: torch.Tensor) -> torch.Tensor:
    """(b, l, h, d) -> (1, l, b * h, d): every sample chooses for itself. No copy for one sample."""
    return x.transpose(0, 1).flatten(1, 2)[None]


def _unfolded(x: torch.Tensor, batch: int) -> torch.Tensor:
    samples: torch.Tensor = x[0].unflatten(1, (batch, -1))
    return samples.transpose(0, 1)
