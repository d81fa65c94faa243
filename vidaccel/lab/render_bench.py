"""Whole renders, one way beside the other: stock diffusers, vidaccel's recipes, and other projects.

All of them share one process and the weights, and take turns: in each round everyone renders the same prompt with the
same seed, so that whatever else the machine does falls on all alike, and speed-ups are ratios within a round. First
renders stand apart: they pay for planning, compiling and checks.

The record (schema 1) is {"schema", "what": "render", "versions", "device", "system", "model", "job", "rows"}. Rows are
of three kinds:
    first       key, kind, variant, compiled, ok, reason, first_s, peak_gib (of a second render), psnr, ssim, motion
                (against stock diffusers, eager, on torch's choice), computed_steps, effective_density
    round       key, kind, number, seconds {name: {"denoise", "decode", "total"}}, failed {name: reason}, clock_mhz
    render      key, kind, what ("dense", "vidaccel", "peer"), variant, compiled, ok, reason, all of "first", rounds,
                denoise_s, decode_s, total_s (medians), against (the fastest dense one), speedup (the median ratio of
                total seconds within a round), speedup_low, speedup_high
A round that was interrupted is measured again as a whole; what has its "render" row is not measured again.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Literal

import torch

from ..api import Acceleration, accelerate
from ..errors import UsageError, VidaccelError, VidaccelWarning
from ..grid import VideoGrid
from ..recipe import Recipe
from ..render import ReadyJob
from ..render import dense as backends
from ..render.run import pipeline_arguments, timed
from ..report import quality
from . import timing
from .peers import Peer
from .rivals import Context, rivals
from .rows import Rows
from .sides import compile_blocks, twin

Row = dict[str, Any]
What = Literal["dense", "vidaccel", "peer"]


@dataclass(frozen=True, eq=False)
class Entrant:
    """One way to render.

    Attributes:
        what: of which kind.
        variant: its name.
        compiled: the transformer's blocks are compiled.
        context: the dense attention that its transformer runs on.
        recipe: of vidaccel, put in place once, before the first render.
        peer: switched on for each render alone; some of them change what others would run.
    """

    what: What
    variant: str
    compiled: bool
    context: Context = contextlib.nullcontext
    recipe: Recipe | None = None
    peer: Peer | None = None

    @property
    def name(self) -> str:
        """What rows call it."""
        return f"{self.variant}, compiled" if self.compiled else self.variant


class Turn:
    """An entrant with a pipeline of its own, whose weights are everybody's.

    Args:
        entrant: what it is.
        pipe: the pipeline, as loaded.
        job: what is rendered.
        grid: of the video.

    Attributes:
        seconds: of its last render.
        frames: of its last render.
        run: its acceleration, where it is ours.
    """

    def __init__(self, entrant: Entrant, pipe: Any, job: ReadyJob, grid: VideoGrid) -> None:
        self.entrant = entrant
        self.seconds: dict[str, float] = {}
        self.frames: quality.Frames | None = None
        self.run: Acceleration | None = None
        self._job = job
        self._grid = grid
        experts = {n: m for n in ("transformer", "transformer_2") if (m := getattr(pipe, n, None)) is not None}
        own = {name: twin(module, {}) for name, module in experts.items()}
        for module in own.values():
            _around(module, entrant.context)
        self.pipe = _like(pipe, own)
        if entrant.recipe is not None:
            self.run = accelerate(self.pipe, recipe=entrant.recipe)
        if entrant.compiled:
            for module in own.values():
                compile_blocks(module, _lists(module))

    def __call__(self) -> None:
        """One render."""
        entrant, job = self.entrant, self._job
        peer: AbstractContextManager[Any] = contextlib.nullcontext()
        with contextlib.ExitStack() as around:
            around.enter_context(torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True))
            around.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", VidaccelWarning)
            if entrant.peer is not None:
                peer = entrant.peer.around(self.pipe, self._grid)
            around.enter_context(peer)
            seconds = around.enter_context(timed(self.pipe, job.device))
            found = self.pipe(**pipeline_arguments(self.pipe, job), output_type="np").frames[0]
        self.seconds, self.frames = seconds, quality.frames_of(found)

    def about(self) -> Row:
        """What our report says of the last render; nothing for others."""
        if self.run is None:
            return {}
        summary = self.run.report().summary
        return {name: summary[name] for name in ("computed_steps", "effective_density", "kernels")}


class RenderBench:
    """Measures entrants on one pipeline.

    Args:
        pipe: as loaded.
        job: what is rendered; its recipe plays no part.
        grid: of the video.
        rows: where to; what is there already is not measured again.
        say: told of each first render and each round.
    """

    def __init__(
        self, pipe: Any, job: ReadyJob, grid: VideoGrid, rows: Rows, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.rows = rows
        self._pipe = pipe
        self._job = job
        self._grid = grid
        self._say = say
        self._device = torch.device(job.device)

    def dense(self, names: Sequence[str] = ()) -> dict[str, Context]:
        """Dense attention to try.

        Args:
            names: of rivals (see `rivals.py`) or of diffusers' own backends; without any, all rivals that are here.

        Raises:
            UsageError: no such name.
        """
        found = rivals(self._device, self._grid.tokens, padded=True)
        if not names:
            return found
        for name in names:
            if name not in found and name not in backends.dense_backends():
                here = ", ".join([*found, *backends.dense_backends()])
                raise UsageError(f"dense backend {name!r} is not here; there are {here}")
        head_dim = int(self._pipe.transformer.config.get("attention_head_dim", 64))
        where = self._job.device, self._job.torch_dtype, head_dim
        return {name: found.get(name) or partial(backends.use, name, *where) for name in names}

    def run(self, entrants: Sequence[Entrant], repeats: int) -> None:
        """Measure what has no row yet, in rounds, beside the fastest dense one.

        Args:
            entrants: dense ones first; the very first is what videos are compared with.
            repeats: rounds.
        """
        if any(entrant.compiled for entrant in entrants):
            # Each copy of the model and each pattern is a graph of its own.
            torch._dynamo.config.recompile_limit = 256
        missing = [entrant for entrant in entrants if self.rows.find(f"render {entrant.name}") is None]
        if not missing:
            return
        known = self._fastest(entrants)
        beside = [entrants[0], *([known] if known else [])]
        turns: dict[str, Turn] = {}
        for entrant in dict.fromkeys([*beside, *missing]):
            if (turn := self._first(entrant)) is not None:
                turns[entrant.name] = turn
                self._liken(turn, turns.get(entrants[0].name))
        # Who failed has its row with the reason; who is only compared with plays when it is a rival, too.
        playing = {name: turn for name, turn in turns.items() if turn.entrant in missing or turn.entrant is known}
        title = ", ".join(playing)
        for number in range(repeats if playing else 0):
            if self.rows.find(key := f"round {number} of {title}") is None:
                self._round(key, number, playing)
        rounds = [row for n in range(repeats) if (row := self.rows.find(f"round {n} of {title}")) is not None]
        for entrant in missing:
            self._add(entrant, rounds, entrants)

    def _first(self, entrant: Entrant) -> Turn | None:
        """The first renders, which others do not wait for; None where they fail."""
        key = f"first {entrant.name}"
        turn, row = None, self.rows.find(key)
        if row is not None and not row["ok"]:
            return None
        try:
            turn = Turn(entrant, self._pipe, self._job, self._grid)
            first = timing.first(turn, self._device)
            found: Row = {"ok": first.reason is None, "reason": first.reason}
            found |= {"first_s": first.seconds, "peak_gib": first.peak_gib}
        except Exception as error:
            found = {"ok": False, "reason": str(error) if isinstance(error, VidaccelError) else timing.why(error)}
        if row is None:
            row = {"key": key, "kind": "first", "variant": entrant.variant, "compiled": entrant.compiled, **found}
            self.rows.add(row)
            self._say(f"{entrant.name}: " + (f"first render {row['first_s']:.1f} s" if row["ok"] else row["reason"]))
        if not found["ok"]:
            if turn is not None and turn.run is not None:
                turn.run.remove()
            gc.collect()
            return None
        return turn

    def _liken(self, turn: Turn, reference: Turn | None) -> None:
        """Say in the row of a first render how like the reference's it is, and what ran."""
        row = self.rows.find(f"first {turn.entrant.name}")
        if row is None or "psnr" in row or reference is None or turn.frames is None or reference.frames is None:
            return
        means = quality.measure(turn.frames, reference.frames)["mean"]
        row |= {"psnr": means["psnr_db"], "ssim": means["ssim"], "motion": means["motion_ratio"], **turn.about()}

    def _round(self, key: str, number: int, turns: dict[str, Turn]) -> None:
        """Everybody renders once; who fails is out."""
        seconds: dict[str, dict[str, float]] = {}
        failed: dict[str, str] = {}
        for name, turn in list(turns.items()):
            try:
                turn()
                seconds[name] = turn.seconds
            except Exception as error:
                failed[name] = f"in round {number + 1}: {timing.why(error)}"
                del turns[name]
        clock = timing.clock_mhz() if self._device.type == "cuda" else None
        row = {"key": key, "kind": "round", "number": number, "seconds": seconds, "clock_mhz": clock}
        self.rows.add(row | ({"failed": failed} if failed else {}))
        self._say(
            f"round {number + 1}: " + ", ".join(f"{name} {each['total']:.2f} s" for name, each in seconds.items())
        )

    def _add(self, entrant: Entrant, rounds: Sequence[Row], entrants: Sequence[Entrant]) -> None:
        """The row that sums up what was measured of an entrant."""
        first = self.rows.find(f"first {entrant.name}")
        assert first is not None
        reasons = [why for row in rounds if (why := row.get("failed", {}).get(entrant.name))]
        if reasons or not first["ok"]:
            self.rows.add(_row(entrant) | {"ok": False, "reason": reasons[0] if reasons else first["reason"]})
            return
        mine = [row["seconds"][entrant.name] for row in rounds]
        found = {f"{part}_s": median(each[part] for each in mine) for part in ("denoise", "decode", "total")}
        dense = [e.name for e in entrants if e.what == "dense" and all(e.name in row["seconds"] for row in rounds)]
        if dense:
            best = min(dense, key=lambda name: median(row["seconds"][name]["total"] for row in rounds))
            ratios = [row["seconds"][best]["total"] / row["seconds"][entrant.name]["total"] for row in rounds]
            found |= {"speedup": median(ratios), "speedup_low": min(ratios), "speedup_high": max(ratios)}
            first = first | {"against": best}
        kept = {key: value for key, value in first.items() if key not in ("key", "kind", "commit")}
        self.rows.add(_row(entrant) | kept | {"rounds": len(rounds)} | found)

    def _fastest(self, entrants: Sequence[Entrant]) -> Entrant | None:
        """The fastest dense entrant that is measured already."""
        rows = [(entrant, self.rows.find(f"render {entrant.name}")) for entrant in entrants if entrant.what == "dense"]
        found = [(float(row["total_s"]), n) for n, (_, row) in enumerate(rows) if row is not None and row["ok"]]
        return rows[min(found)[1]][0] if found else None


def _around(module: torch.nn.Module, context: Context) -> None:
    """Its calls alone run in the context: the masks and types of text encoder and VAE do not suit every backend."""
    entered: list[contextlib.ExitStack] = []

    def before(*_: Any) -> None:
        entered.append(contextlib.ExitStack())
        entered[-1].enter_context(context())

    def after(*_: Any) -> None:
        entered.pop().close()

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)


def _row(entrant: Entrant) -> Row:
    return {
        "key": f"render {entrant.name}",
        "kind": "render",
        "what": entrant.what,
        "variant": entrant.variant,
        "compiled": entrant.compiled,
    }


def _like(pipe: Any, own: Mapping[str, Any]) -> Any:
    """A pipeline of the same class and parts, with these in place of its own."""
    wanted = inspect.signature(type(pipe).__init__).parameters
    config = {name: pipe.config[name] for name in wanted if name in pipe.config and name not in pipe.components}
    made = type(pipe)(**{**config, **pipe.components, **own})
    made.set_progress_bar_config(disable=True)
    return made


def _lists(transformer: Any) -> dict[str, int]:
    from ..family import family_of

    return {name: len(getattr(transformer, name)) for name in family_of(transformer).stack(transformer).lists}
