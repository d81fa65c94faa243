"""What a pattern is, and what it hands to a processor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

import torch

from ..blocks import BlockMask
from ..errors import PatternError
from ..grid import Site, TokenLayout
from ..kernels.select import taken
from ..ranks import HeadPart

if TYPE_CHECKING:
    from typing_extensions import Self


class Choice(NamedTuple):
    """What was chosen, apart from the values of q, k and v: it can serve a later step.

    Attributes:
        mask: kept blocks of the queries and of the keys, in the orders below.
        q_order: (1, slots, h) int64, which of the given queries stands in each slot of a head; None where none moves.
        k_order: likewise for keys.
        rest: attention to all that the mask leaves out, (1, slots, h, d), and its log-sum-exp (1, h, slots), where a
            plan's `residual` asks for it.
        spent: () fp32, the share of pairs that a call computed, where the mask does not say it.
    """

    mask: BlockMask
    q_order: torch.Tensor | None = None
    k_order: torch.Tensor | None = None
    rest: tuple[torch.Tensor, torch.Tensor] | None = None
    spent: torch.Tensor | None = None


class Residual(NamedTuple):
    """How the rest of a choice is used again; see `patterns.flashblock`.

    Attributes:
        threshold: relative error of a head's output from which it is computed whole.
        rows: (n,) int64, slots of the queries that see everything anew.
        few: a layout of as many queries.
        kept: () fp32, share of pairs that the mask keeps.
    """

    threshold: float
    rows: torch.Tensor
    few: TokenLayout
    kept: torch.Tensor

    def to(self, device: torch.device | str) -> Residual:
        """The same with its tensors on `device`."""
        return Residual(self.threshold, self.rows.to(device), self.few.to(device), self.kept.to(device))


class Selection(NamedTuple):
    """A choice applied to one call; every sample of a batch counts as heads of its own.

    Attributes:
        mask: kept blocks of the queries and of the keys below.
        k: (1, slots, h, d), the keys that `mask` counts: those given, sorted or merged.
        v: (1, slots, h, d), their values.
        key_bias: (1, h or 1, slots) fp32, added to the logits of each key; None for none.
        order: (1, slots, h) int64, which of the given queries stands in each slot of each head; None where none moves.
    """

    mask: BlockMask
    k: torch.Tensor
    v: torch.Tensor
    key_bias: torch.Tensor | None = None
    order: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Select(ABC):
    """Chooses blocks from q and k. Its fields are tensors and numbers, so that torch.compile can trace it.

    Two steps, because a choice may serve several denoising steps. A choice may also move tokens, head by head (hash
    buckets, clusters), and its use may merge keys (pooling).

    Attributes:
        layout: token order in which it is given q, k and v, and of the masks that it makes.
        biased: its use adds a bias to the logits of keys.
    """

    layout: TokenLayout
    biased: ClassVar[bool] = False

    def to(self, device: torch.device | str) -> Self:
        """The same with its tensors on `device`."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: part.to(device) for name, part in parts.items() if hasattr(part, "to")})

    def of_heads(self, part: HeadPart) -> Self:
        """The same for heads that are counted, so that samples are told apart; on one of several ranks, its own."""
        return self

    def for_text(self, layout: TokenLayout) -> Self:
        """The same for padded text, whose lengths the layout has.

        Samples that choose for themselves are heads of one sample, whose blocks have one length. So several lengths
        change nothing here: the plan hides the padding by a bias.
        """
        return replace(self, layout=layout) if len(layout.k_len) == 1 else self

    @abstractmethod
    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Choice:
        """Choose for q, k, v (1, slots, h, d) in kernel order, batches folded into heads."""

    def apply(self, choice: Choice, k: torch.Tensor, v: torch.Tensor) -> Selection:
        """Use a choice, made now or at an earlier step, for k and v (1, slots, h, d)."""
        if choice.k_order is not None:
            k, v = taken(k, choice.k_order), taken(v, choice.k_order)
        return Selection(choice.mask, k, v, order=choice.q_order)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Selection:
        """Choose, and use it."""
        return self.apply(self.choose(q, k, v), k, v)


@dataclass(frozen=True, eq=False)
class Plan:
    """How one layer attends: by a mask, or by one that is chosen at every call.

    Attributes:
        requested: the density that was asked for; None where the pattern's own parameters decide.
        delivered: fraction of video-video pairs that is kept.
        visited: video tiles touched x their area over all video-video pairs; this bounds speed.
        mask: the kept blocks, in the token order of `mask.layout`; None where `select` chooses them.
        rule: which of the pattern's rules made it, for the report.
        notes: what the user should know about it.
        select: chooses the blocks from q and k. The densities above then hold for every call, up to the lengths of
            clipped tiles.
        reselect: how many steps a choice of `select` serves, or the steps at which it is made anew.
        scale: factor on the usual scale of the logits, 1 / sqrt(d).
        varies: how much a choice keeps depends on q and k; the densities above are the most that it can be.
        text_bias: (b, text slots) fp32, 0 or -inf where a text key is padding, for samples whose blocks have one
            length; None where the layout's key lengths say it.
        residual: what the choice leaves out is taken from an earlier step; None drops it.
    """

    requested: float | None
    delivered: float
    visited: float
    mask: BlockMask | None
    rule: str = ""
    notes: tuple[str, ...] = field(default=())
    select: Select | None = None
    reselect: int | tuple[int, ...] = 1
    scale: float = 1.0
    varies: bool = False
    text_bias: torch.Tensor | None = None
    residual: Residual | None = None

    @classmethod
    def of(cls, mask: BlockMask, requested: float | None, rule: str = "", notes: tuple[str, ...] = ()) -> Plan:
        """A plan around `mask`, its densities counted.

        Raises:
            PatternError: a query block that would attend to nothing.
        """
        if mask.has_empty_rows:
            raise PatternError(
                f"the pattern leaves a query block of the {mask.layout.grid} grid without any key; "
                "keep at least the own block of each row, or ask for a higher density"
            )
        return cls(requested, mask.density, mask.visited, mask, rule, notes)

    @property
    def layout(self) -> TokenLayout:
        """Token order of the call."""
        made = self.mask or self.select
        assert made is not None
        return made.layout

    @property
    def is_watched(self) -> bool:
        """Somebody looks at its choices: a later step, or the trace."""
        return self.reselect != 1 or self.varies

    @property
    def static(self) -> BlockMask:
        """The mask.

        Raises:
            PatternError: it is chosen anew at every call.
        """
        if self.mask is None:
            raise PatternError(
                f"blocks that are chosen from q and k ({self.rule}) cannot be joined to others; give that pattern "
                "layers of its own with per-layer"
            )
        return self.mask

    def with_valid_text(self, valid: torch.Tensor) -> Plan:
        """The same plan for padded text: keys past the first `valid` (b,) text tokens of each sample fall away."""
        layout = self.layout.with_valid_text(valid)
        if self.mask is not None:
            return replace(self, mask=replace(self.mask, layout=layout))
        select = self.select and self.select.for_text(layout)
        if len(valid) == 1:
            return replace(self, select=select)
        slot = torch.arange(layout.video_blocks * layout.block, layout.slots, device=layout.device)
        seen = slot % layout.block < layout.k_len[:, slot // layout.block]
        return replace(self, select=select, text_bias=torch.where(seen, 0.0, -torch.inf))

    def of_heads(self, part: HeadPart) -> Plan:
        """The same plan for the heads of a model, or of one of several ranks. Its densities stay those of all heads.

        Raises:
            PatternError: a mask of another number of heads.
        """
        if self.mask is not None and self.mask.heads not in (1, part.total):
            raise PatternError(
                f"a mask of {self.mask.heads} heads was planned ({self.rule}), but the model has {part.total}; plan as "
                "many, or one for all"
            )
        mask = self.mask if part.ranks is None else self.mask and self.mask.of_heads(part.first, part.end)
        return replace(self, mask=mask, select=self.select and self.select.of_heads(part))

    def to(self, device: torch.device | str) -> Plan:
        """The same plan with its tensors on `device`."""
        mask, select = self.mask and self.mask.to(device), self.select and self.select.to(device)
        bias = None if self.text_bias is None else self.text_bias.to(device)
        residual = self.residual and self.residual.to(device)
        return replace(self, mask=mask, select=select, text_bias=bias, residual=residual)


class Pattern(Protocol):
    """Which pairs of tokens attend. A frozen dataclass; its fields are the keys of a recipe.

    A pattern with fields that decide its density themselves names them in `knobs`, so that a command line knows that
    such a field and a recipe's density replace each other. One that can do nothing with some densities, or without one,
    on any grid, has a method `check(density)` that raises PatternError, and one that fits only some models
    `check_model(layers, heads)`: they are asked before anything runs.

    Attributes:
        name: what recipes and reports call it.
    """

    name: ClassVar[str]

    @property
    def per_site(self) -> bool:
        """Plans differ between layers, so that each is asked for its own."""
        ...

    @property
    def block(self) -> int:
        """Slots in a block."""
        ...

    def plan(self, layout: TokenLayout, density: float | None, site: Site) -> Plan:
        """Plan one layer.

        Args:
            layout: raster order, in blocks of `self.block`; the plan may use another order of the same tokens.
            density: wanted fraction of video-video pairs, in (0, 1); None lets the pattern's own parameters decide.
            site: the layer.
        """
        ...
