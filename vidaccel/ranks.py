"""The ranks that make one video together: who they are, which heads each has, and how they swap.

Collectives are torch's functional ones: torch.compile can trace them, and between the beginning of one and `wait` a GPU
computes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .errors import InstallError


@dataclass(frozen=True)
class Ranks:
    """The ranks that hold one video together.

    Attributes:
        group: their process group.
        rank: of this process among them.
        count: how many.
        uneven: tokens and heads need not divide by `count`.
    """

    group: torch.distributed.ProcessGroup
    rank: int
    count: int
    uneven: bool

    @classmethod
    def of(cls, transformer: Any) -> Ranks | None:
        """Those of a transformer under diffusers' context parallelism; None where it runs alone.

        Raises:
            InstallError: a kind of parallelism that sparse attention does not know.
        """
        config = getattr(transformer, "_parallel_config", None)
        if config is None:
            return None
        context = config.context_parallel_config
        if context is None:
            raise InstallError(
                "tensor parallelism is on, which sparse attention does not know; use context parallelism: "
                "vidaccel.enable_parallelism(pipe, 2)"
            )
        if context.ring_degree > 1:
            raise InstallError(
                f"ring_degree {context.ring_degree} was asked for: in a ring every rank meets the keys part by part, "
                "and masks of the whole video would have to be cut anew for each; use ulysses_degree instead, which "
                "gives every rank all tokens of its heads"
            )
        return cls(
            context._ulysses_mesh.get_group(),
            context._ulysses_local_rank,
            context.ulysses_degree,
            context.ulysses_anything,
        )

    def parts(self, many: int, what: str) -> tuple[int, ...]:
        """How many of `many` tokens each rank holds.

        Raises:
            InstallError: parts that diffusers does not make.
        """
        if many % self.count and not self.uneven:
            raise InstallError(
                f"{many} {what} were given to {self.count} ranks, which does not divide; take a size that does, or "
                f"ContextParallelConfig(ulysses_degree={self.count}, ulysses_anything=True)"
            )
        return tuple(many // self.count + (rank < many % self.count) for rank in range(self.count))

    def heads(self, total: int) -> HeadPart:
        """Which of a layer's heads this rank attends with.

        Raises:
            InstallError: parts that diffusers does not make, or a rank without a head.
        """
        self.parts(total, "attention heads")
        each = -(-total // self.count)
        if each * (self.count - 1) >= total:
            raise InstallError(
                f"{total} attention heads were given to {self.count} ranks, {each} to each, which leaves none for the "
                f"last; use {-(-total // each)} ranks or fewer"
            )
        return HeadPart(self.rank * each, min(total, (self.rank + 1) * each), total, each, self)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of what all ranks hold. torch.compile can trace it."""
        return wait(torch.ops._c10d_functional.all_reduce(x, "sum", self.group.group_name))

    def check_same(self, latents: torch.Tensor) -> None:
        """Look whether all ranks were given the same video to make; waits for all of them.

        Args:
            latents: the noise of this rank's call, of one shape on all.

        Raises:
            InstallError: they were not; every rank is told.
        """
        x = latents.double()
        sums = torch.stack([x.sum(), x.square().sum()])
        both = torch.cat([sums, -sums])
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX, group=self.group)
        most, least = both.chunk(2)
        # GPUs may round differently; other noise is another sum altogether.
        if not torch.allclose(most, -least, rtol=1e-2, atol=1e-2):
            raise InstallError(
                f"the {self.count} ranks of this video were given different noise; pass a generator of the same seed "
                "on every rank: generator=torch.Generator().manual_seed(0)"
            )


@dataclass(frozen=True)
class HeadPart:
    """The heads of a layer that one rank attends with; `whole` are all of them, where no ranks share.

    Attributes:
        first: the first.
        end: one past the last.
        total: of the layer.
        each: of every rank, empty ones included.
        ranks: all of them; None where there is one.
    """

    first: int
    end: int
    total: int
    each: int
    ranks: Ranks | None

    @classmethod
    def whole(cls, total: int) -> HeadPart:
        """All heads of a layer."""
        return cls(0, total, total, total, None)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """(samples * own heads, ...) -> (samples * all heads, ...), from all ranks."""
        if self.ranks is None:
            return x
        own = self.end - self.first
        x = x.unflatten(0, (-1, own))
        filled = x.new_zeros(self.ranks.count, x.shape[0], self.each, *x.shape[2:])
        filled[:, :, :own] = x
        sizes = [x[:, :1].numel() * self.each] * self.ranks.count
        found = wait(all_to_all(filled.flatten(), sizes, sizes, self.ranks)).view_as(filled)
        whole: torch.Tensor = found.movedim(0, 1).flatten(1, 2)[:, : self.total]
        return whole.flatten(0, 1)

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """(samples * all heads, ...) -> (samples * own heads, ...)."""
        mine: torch.Tensor = x.unflatten(0, (-1, self.total))[:, self.first : self.end]
        return mine.flatten(0, 1)


def all_to_all(x: torch.Tensor, received: list[int], sent: list[int], ranks: Ranks) -> torch.Tensor:
    """Begin to swap elements of a flat tensor; `wait` gives the result.

    Args:
        x: (sum of sent,), contiguous, what goes to one rank after what goes to the one before it.
        received: elements that come from each rank.
        sent: elements that go to each.
        ranks: who.

    Returns:
        (sum of received,), not to be read before `wait`.
    """
    moving: torch.Tensor = torch.ops._c10d_functional.all_to_all_single(x, received, sent, ranks.group.group_name)
    return moving


def stopped(error: BaseException) -> str | None:
    """What to tell the user where `error` is torch.distributed's, of another process that has gone; else None."""
    distributed = torch.distributed
    # NCCL and stores raise errors of their own, gloo a RuntimeError that names its source file.
    theirs = distributed.is_available() and isinstance(error, distributed.DistError)
    if not (theirs or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))):
        return None
    return (
        "another process of this command has stopped, so this one cannot go on; that one says why. The same command "
        f"goes on from the videos that are finished ({str(error).strip().splitlines()[0][:120]})"
    )


def wait(moving: torch.Tensor) -> torch.Tensor:
    """The result of what was begun. On a GPU its stream waits, not this process."""
    found: torch.Tensor = torch.ops._c10d_functional.wait_tensor(moving)
    return found
