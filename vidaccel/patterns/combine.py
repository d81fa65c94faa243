"""Patterns made of patterns: what any of them keeps, and one for each range of layers.

Idea: a window sees what is near, a sink or a radial mask what is far; what either keeps is kept once.
Math: blocks of the union are those of the first part; a block is kept where the first part keeps it, or where another
    part keeps any pair of tokens in it. Only the first part decides blocks token by token. A first part that chooses
    from q and k is given what the others keep, for any head, as blocks to keep always, and chooses the rest of the
    density.
Cost: the parts' own, and one product of block maps for every part in another token order; where that part decides
    blocks token by token, a second more at 75,600 tokens. With a density, the first part is planned a few times.
Source: NABLA (arXiv 2507.13546) and SSTA (HunyuanVideo 1.5) join a window with another pattern.
Limits: one part may choose its blocks from q and k, and comes first; not if it moves or merges tokens (ann, pyramid).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, reduce
from typing import Any, ClassVar, cast

import torch

from ..blocks import BlockMask
from ..errors import PatternError
from ..grid import Site, TokenLayout
from ..order import Sides
from ..window import Boxes, Window
from .dynamic import EqualRows, dynamic_plan, row_length
from .freeswim import FreeSwim
from .neighborhood import Neighborhood
from .parameters import check_density, check_given, check_sink, nested
from .plan import Pattern, Plan
from .sliding_window import SlidingWindow
from .solve import TOLERANCE
from .svg import SparseVideoGen
from .topk import TopK

_MOST_TRIES = 6


@dataclass(frozen=True)
class Union:
    """Every pair that one of its parts keeps, in the token order of the first.

    Attributes:
        parts: patterns, or their recipes such as {"name": "radial", "rule": "ranked"}. With a density, the first, or
            the one that chooses, is given what the others leave of it; those go by their own parameters.
        sink_frames: first latent frames that every query sees, in whole blocks.
    """

    name: ClassVar[str] = "union"

    parts: tuple[Any, ...]
    sink_frames: int = 0

    def __post_init__(self) -> None:
        if not self.parts:
            raise PatternError("a union of no patterns was asked for; give one or more")
        object.__setattr__(self, "parts", tuple(as_recipe(part) for part in self.parts))
        check_shared(self.name, self.patterns)
        choosing = [part.name for part in self.patterns if getattr(part, "chooses", False)]
        if len(choosing) > 1:
            raise PatternError(
                f"a union of {' and '.join(choosing)} was asked for; one part may choose blocks from q and k, and the "
                "others keep theirs whatever these are: drop one, or give each its own layers with per-layer"
            )
        sizes = sorted({part.block for part in self.patterns})
        if len(sizes) > 1:
            raise PatternError(f"a union of patterns with blocks of {sizes} was asked for; give all the same block")

    @cached_property
    def patterns(self) -> tuple[Pattern, ...]:
        """The parts, as patterns; what chooses comes first."""
        return tuple(sorted(map(as_pattern, self.parts), key=lambda part: not getattr(part, "chooses", False)))

    @property
    def per_site(self) -> bool:
        """Some part differs between layers."""
        return any(part.per_site for part in self.patterns)

    @property
    def block(self) -> int:
        """Slots in a block."""
        return self.patterns[0].block

    def check(self, density: float | None) -> None:
        """See `Pattern.check`."""
        check_density(density)
        first, *others = self.patterns
        check_given(first, density)
        for part in others:
            try:
                check_given(part, None)
            except PatternError:
                if not (knobs := " or ".join(getattr(part, "knobs", ()))):
                    raise
                raise PatternError(
                    f"{part.name} stands behind {first.name} in a union, whose density is {first.name}'s alone; give "
                    f"{part.name} its own {knobs}"
                ) from None

    def plan(self, layout: TokenLayout, density: float | None, site: Site) -> Plan:
        """Plan one layer; see `Pattern.plan`.

        Raises:
            PatternError: a density that the other parts exceed already, or a part without a mask.
        """
        self.check(density)
        check_sink(self.name, self.sink_frames, layout.grid)
        raster = layout.to("cpu")
        first, sink = self.patterns[0], self.sink_frames
        if isinstance(first, (FreeSwim, Neighborhood, SlidingWindow, SparseVideoGen, TopK)):
            # It chooses thinner tiles where a sink would otherwise be as thick as they are.
            first, sink = replace(first, sink_frames=max(first.sink_frames, sink)), 0
        alone = first.plan(raster, density, site)
        if alone.select is not None:
            return self._around(alone, site, sink).to(layout.device)
        rests: dict[Sides | None, BlockMask | None] = {}

        def join(alone: Plan) -> Plan:
            tile = alone.layout.tile
            if tile not in rests:
                rests[tile] = self._rest(alone.layout, site, sink)
            rest = rests[tile]
            mask = alone.static if rest is None else alone.static.union(reblocked(rest, alone.layout))
            return Plan.of(mask, density, self._rule(alone), alone.notes)

        plan = join(alone)
        rest = rests[plan.layout.tile]
        if density is not None and rest is not None:
            plan = self._fit(lambda wanted: join(first.plan(raster, wanted, site)), rest.density, plan, density)
        return plan.to(layout.device)

    def _rule(self, first: Plan) -> str:
        others = [part.name for part in self.patterns[1:]]
        return " + ".join([first.rule, *others, *["first frames"] * bool(self.sink_frames)])

    def _around(self, first: Plan, site: Site, sink: int) -> Plan:
        """What is chosen from q and k, around what the other parts keep."""
        select, density = first.select, first.requested
        if not isinstance(select, EqualRows) or select.moves or density is None:
            raise PatternError(
                f"{self.patterns[0].name} moves or merges tokens, or has parts that choose, so that no other pattern "
                "can keep blocks of its own beside it; give each its own layers with per-layer, or unions as parts"
            )
        forced, rest = select.forced, self._rest(select.layout, site, sink)
        if rest is not None:
            # Rows of all heads are chosen around the same blocks: what a part keeps for any head.
            forced = forced | (rest.video_map() > 0).any(0)
        select = select.forcing(forced, row_length(self.name, select.layout, forced, density))
        plan = dynamic_plan(select, density, self._rule(first), first.reselect)
        return replace(plan, varies=first.varies)

    def _rest(self, layout: TokenLayout, site: Site, sink: int) -> BlockMask | None:
        """What the parts other than the first keep, in whole blocks of the first's order."""
        masks = []
        for part in self.patterns[1:]:
            if isinstance(part, (FreeSwim, Neighborhood)) and part.tile is None and layout.tile is not None:
                # Its window is in tokens, so any tile serves it, and another one would touch more of these.
                part = replace(part, tile=layout.tile)
            masks.append(reblocked(part.plan(layout, None, site).static, layout))
        if sink:
            masks.append(reblocked(first_frames(layout, sink, self.block), layout))
        return reduce(BlockMask.union, masks) if masks else None

    def _fit(self, join: Callable[[float], Plan], floor: float, full: Plan, density: float) -> Plan:
        """The first part's share of a density, by bisection: a union keeps at least that, and at most the sum."""
        if floor >= density:
            raise PatternError(
                f"density {density} was asked for, but the parts of this union other than the first keep {floor:.3f} "
                f"already on a {full.layout.grid} grid; ask for more, or give those parts less"
            )
        low, high, wanted, plans = density - floor, density, (density - floor) / (1 - floor), [full]
        for _ in range(_MOST_TRIES):
            kept = 0.0
            with suppress(PatternError):  # so little the first part cannot have
                plans.append(join(wanted))
                kept = plans[-1].delivered
            if abs(kept - density) <= TOLERANCE / 2 * density:
                break
            low, high = (wanted, high) if kept < density else (low, wanted)
            wanted = (low + high) / 2
        best = min(plans, key=lambda plan: abs(plan.delivered - density))
        if abs(best.delivered - density) > TOLERANCE * density:
            best = replace(
                best, notes=(*best.notes, f"{best.rule} comes no nearer to {density} than {best.delivered:.3f}")
            )
        return best


@dataclass(frozen=True)
class PerLayer:
    """Another pattern from some layers on.

    Attributes:
        layers: the number of the first layer of each range, from 0 on, with its pattern or the recipe of one.
    """

    name: ClassVar[str] = "per-layer"
    per_site: ClassVar[bool] = True

    layers: Mapping[int, Any]

    def __post_init__(self) -> None:
        # JSON has no numbers as keys.
        layers = {int(start): as_recipe(part) for start, part in sorted(self.layers.items(), key=lambda i: int(i[0]))}
        if min(layers, default=1) != 0:
            raise PatternError(
                f"per-layer patterns from layers {sorted(layers)} on were asked for; the first range begins at layer 0"
            )
        object.__setattr__(self, "layers", layers)

    @cached_property
    def patterns(self) -> dict[int, Pattern]:
        """The pattern of each range, by its first layer."""
        return {start: as_pattern(part) for start, part in self.layers.items()}

    @property
    def block(self) -> int:
        """Slots in a block."""
        return self.patterns[0].block

    def check(self, density: float | None) -> None:
        """See `Pattern.check`."""
        for part in self.patterns.values():
            check_given(part, density)

    def check_model(self, layers: int, heads: int) -> None:
        """See `Pattern`."""
        if beyond := [start for start in self.layers if start >= layers]:
            raise PatternError(
                f"per-layer patterns from layers {list(self.layers)} on were asked for, but this transformer has "
                f"{layers} layers, 0 to {layers - 1}; leave out {', '.join(map(str, beyond))}, or begin earlier"
            )

    def at(self, layer: int) -> Pattern:
        """The pattern of a layer."""
        return self.patterns[max(start for start in self.patterns if start <= layer)]

    def plan(self, layout: TokenLayout, density: float | None, site: Site) -> Plan:
        """Plan one layer; see `Pattern.plan`."""
        return self.at(site.index).plan(layout, density, site)


def of_layer(pattern: Pattern, layer: int) -> Pattern:
    """What a layer runs, where patterns differ between layers; the pattern itself elsewhere."""
    return of_layer(pattern.at(layer), layer) if isinstance(pattern, PerLayer) else pattern


def check_shared(name: str, parts: Sequence[Pattern]) -> None:
    """Raise PatternError where a part that shares layers with others asks for what acts on a layer as a whole."""
    for part in (each for whole in parts for each in nested(whole)):
        if isinstance(part, FreeSwim) and (part.logit_scale != 1 or part.guide):
            raise PatternError(
                f"{name} was given a freeswim with logit_scale={part.logit_scale:g} and guide={part.guide}, which act "
                "on whole layers, other parts' keys too; leave them at 1 and 0, or give freeswim layers of its own "
                "with per-layer"
            )


def first_frames(layout: TokenLayout, frames: int, block: int) -> BlockMask:
    """The first frames and nothing else, seen by all: blocks of the raster order. Text sees all, and all see text."""
    raster = layout.tiled(None, block)
    keep = torch.zeros(raster.blocks, raster.blocks, dtype=torch.bool)
    keep[raster.video_blocks :] = True
    keep[:, raster.video_blocks :] = True
    keep[:, : -(-frames * raster.grid.frame // block)] = True
    return BlockMask.of(keep, raster)


def reblocked(mask: BlockMask, layout: TokenLayout) -> BlockMask:
    """The blocks of another layout that hold any kept pair, whole."""
    kinds = mask.block_map()
    if torch.equal(mask.layout.order, layout.order) and mask.layout.block == layout.block:
        return BlockMask.of(kinds > 0, layout)
    mine, theirs = mask.layout.slot_of // mask.layout.block, layout.slot_of // layout.block
    shared = torch.zeros(layout.blocks, mask.layout.blocks)
    shared[theirs, mine] = 1
    keep = shared @ (kinds == 2).float() @ shared.T > 0
    if mask.window is not None:
        _add_partial(keep, kinds == 1, mask.window, mask.layout, mine, theirs)
    return BlockMask.of(keep, layout)


def _add_partial(
    keep: torch.Tensor, partial: torch.Tensor, window: Window, layout: TokenLayout, mine: torch.Tensor,
    theirs: torch.Tensor,
) -> None:  # fmt: skip
    """Set in `keep` (h, their blocks, their blocks) what holds a pair that a window keeps in partial blocks.

    The window knows only the axes that cut blocks, so it is asked about pieces that lie in one block of each layout.

    Args:
        keep: is written to.
        partial: (h, blocks, blocks) bool.
        window: the rule, on the slots of `layout`.
        layout: the order of the mask.
        mine: (tokens,) the block of each token there.
        theirs: (tokens,) its block in the other order.
    """
    pieces, piece = (theirs * layout.blocks + mine).unique(return_inverse=True)
    owner, block = pieces // layout.blocks, pieces % layout.blocks
    token, lengths = piece.argsort(stable=True), piece.bincount().tolist()
    lo, hi, position = (side[layout.slot_of[token]] for side in window.axes())
    boxes = Boxes.of(position, piece[token])
    somewhere = partial.any(0)[:, block[boxes.block]]
    for row, (begin, end) in enumerate(zip(lo.split(lengths), hi.split(lengths), strict=True)):
        near = somewhere[block[row]].nonzero()[:, 0]
        meets = (begin[:, None] < boxes.hi[near]) & (boxes.lo[near] < end[:, None])
        met = boxes.block[near[meets.all(2).any(0)]]
        head, found = partial[:, block[row], block[met]].nonzero(as_tuple=True)
        keep[head, owner[row], owner[met[found]]] = True


def as_recipe(part: Any) -> Any:
    """A registered pattern as plain data, which recipes can hold; others stay what they are."""
    from . import PATTERNS

    if not isinstance(part, Mapping) and PATTERNS.get(getattr(part, "name", "")) is type(part):
        part = {"name": part.name, **asdict(cast(Any, part))}
    return _tuples(part)


def as_pattern(part: Any) -> Pattern:
    """A pattern, or the one that plain data describe.

    Raises:
        PatternError: an unknown name, or a setting that the pattern does not have.
    """
    from . import PATTERNS

    if not isinstance(part, (Mapping, str)):
        return cast(Pattern, part)
    settings: dict[str, Any] = {"name": part} if isinstance(part, str) else dict(part)
    name = settings.pop("name", None)
    if name not in PATTERNS:
        raise PatternError(f"pattern {name!r} is unknown; patterns: {', '.join(sorted(PATTERNS))}")
    try:
        return PATTERNS[name](**{key: _tuples(value) for key, value in settings.items()})
    except TypeError as error:
        raise PatternError(f"pattern {name} cannot be built from {settings}: {error}") from None


def _tuples(value: Any) -> Any:
    """Lists, which is what files hold, as tuples: a part equals itself after it was written and read."""
    if isinstance(value, Mapping):
        return {key: _tuples(each) for key, each in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
