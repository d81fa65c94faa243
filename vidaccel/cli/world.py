"""The processes of one command: torchrun, accelerate launch or a cluster's launcher starts them, this joins them."""

from __future__ import annotations

import datetime
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import typer
from torch import distributed
from torch.distributed import HashStore  # type: ignore[attr-defined]  # its stub does not say so
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ..errors import RenderError, UsageError, VidaccelError
from ..ranks import stopped

T = TypeVar("T")

# Ranks that render videos of their own meet only at the end, however long the others take.
_PATIENCE = datetime.timedelta(days=7)


@dataclass(frozen=True)
class World:
    """The processes of this command.

    Attributes:
        rank: of this process.
        size: how many.
        local: rank on this host.
        together: ranks that make one video.
        talk: group in which ranks tell each other things, on CPUs; None where there is one process.
        store: what all of them can write to, and read what others wrote.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    together: int = 1
    talk: Any = field(default=None, repr=False)
    store: Any = field(default_factory=HashStore, repr=False)

    @property
    def is_first(self) -> bool:
        """This process speaks for all."""
        return self.rank == 0

    @property
    def writes(self) -> bool:
        """This process speaks for those that make a video with it."""
        return self.rank % self.together == 0

    @property
    def teams(self) -> int:
        """Videos that are made at a time."""
        return self.size // self.together

    @property
    def team(self) -> int:
        """Which of them this process works on."""
        return self.rank // self.together

    def device(self, asked: str | None) -> str | None:
        """This process's own of several GPUs, unless a device was asked for by number."""
        if self.size > 1 and asked in (None, "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local % torch.cuda.device_count()}"
        return asked

    def decided(self, decide: Callable[[], T]) -> T:
        """What the first process decides; where it cannot, it says why, and the others end with it.

        Raises:
            VidaccelError: of the first process.
        """
        if self.size == 1:
            return decide()
        found: list[Any] = [None, None]
        problem: VidaccelError | None = None
        if self.is_first:
            try:
                found[0] = decide()
            except VidaccelError as error:
                problem, found[1] = error, 2 if isinstance(error, UsageError) else 1
        distributed.broadcast_object_list(found, group=self.talk)
        if problem is not None:
            raise problem
        if found[1] is not None:
            raise typer.Exit(found[1])
        value: T = found[0]
        return value

    def shared(self, many: int) -> Iterator[int]:
        """Numbers below `many`, each for one team, whichever is free first; the processes of a team get the same."""
        for turn in itertools.count():
            if self.writes:
                n = self.store.add("begun", 1) - 1
                self.store.set(f"{self.team} {turn}", str(n))
            else:
                n = int(self.store.get(f"{self.team} {turn}"))
            if n >= many:
                return
            yield n

    def post(self, n: int, found: Any) -> None:
        """Tell what became of video `n`, as plain data; None where it failed."""
        self.store.set(f"video {n}", json.dumps(found))
        self.store.add("finished", int(found is not None))

    def posted(self, numbers: Iterable[int]) -> dict[int, Any]:
        """What became of those of these videos that somebody told of, whether or not who did is still there."""
        return {n: json.loads(self.store.get(f"video {n}")) for n in numbers if self.store.check([f"video {n}"])}

    def finished(self) -> int:
        """How many videos were posted that did not fail."""
        return int(self.store.add("finished", 0))

    def is_news(self, text: str) -> bool:
        """No process has said this before."""
        return bool(self.store.add(f"said {text}", 1) == 1)

    def meet(self) -> None:
        """Wait for all processes; the first waits for those that are left where others have stopped.

        Raises:
            RenderError: one has stopped.
        """
        if self.size == 1:
            return
        try:
            distributed.monitored_barrier(self.talk, timeout=_PATIENCE, wait_all_ranks=True)
        except RuntimeError as problem:
            if message := stopped(problem):
                raise RenderError(message) from None
            raise


@contextmanager
def joined(together: int = 1, device: str | None = None) -> Iterator[World]:
    """Join the processes that a launcher has started; one process where none has.

    Args:
        together: ranks that make one video.
        device: "cpu" joins over gloo; else NCCL where there are GPUs.

    Raises:
        UsageError: a number of ranks that the processes do not divide by, or one GPU for two of them.
    """
    # torchrun, accelerate launch and others set these.
    rank, size, local = (int(os.environ.get(name, default)) for name, default in
                         (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))  # fmt: skip
    if together < 1 or size % together:
        raise UsageError(
            f"--context-parallel {together} was asked for, with {size} process{'es' * (size > 1)}; start a multiple of "
            f"{max(together, 1)}: torchrun --nproc-per-node {max(together, 1)} -m vidaccel ..."
        )
    if size == 1:
        yield World()
        return
    on_gpus = device != "cpu" and torch.cuda.is_available()
    if on_gpus:
        if local >= torch.cuda.device_count():
            raise UsageError(
                f"{local + 1} processes or more were started on a host with {torch.cuda.device_count()} GPUs; start "
                "one for each GPU, or add --device cpu"
            )
        torch.cuda.set_device(local)
    store, rank, size = next(rendezvous("env://"))
    distributed.init_process_group("nccl" if on_gpus else "gloo", store=store, rank=rank, world_size=size)
    try:
        talk = distributed.new_group(backend="gloo", timeout=_PATIENCE)
        yield World(rank, size, local, together, talk, PrefixStore("vidaccel", store))
    finally:
        distributed.destroy_process_group()
