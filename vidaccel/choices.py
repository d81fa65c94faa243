"""Choices of blocks that serve several steps, and how far what would have been chosen drifts from them.

Idea: what a layer looks at changes slowly from step to step, so a choice may serve a few, and selection is paid once.
Math: drift is the share of the blocks of a new choice that the one before it did not have. For choices that move tokens
    it is the share of key tokens, for a few queries.
Cost: the memory of the choices, until a video's last step: 14 MB a layer and guidance branch for 40 heads of 75,600
    tokens at density 0.25.
Source: SVG2 (arXiv 2505.18875) starts its clusters from those of the step before; VMoBA and others reselect each n-th
    step.
Limits: guidance branches must be told apart; each has its own choices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .blocks import BlockMask
from .patterns import Choice, Plan

_SAMPLES = 32


class _Kept(NamedTuple):
    plan: Plan
    choice: Choice
    step: int
    trajectory: int


class Choices:
    """The latest choice of each layer and guidance branch; two experts share one, as only one is at work."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], _Kept] = {}

    def held(self, plan: Plan, site: str, branch: str | None, step: int, trajectory: int) -> Choice | None:
        """What serves this call; None where it must choose.

        Args:
            plan: of the call; `reselect` says when it must.
            site: the layer.
            branch: its guidance branch; where it is unknown, every call chooses.
            step: denoising step.
            trajectory: which video.
        """
        kept = self._of(plan, site, branch, trajectory)
        if kept is None or plan.reselect == 1:
            return None
        if isinstance(plan.reselect, int):
            due = step - kept.step >= plan.reselect
        else:
            due = any(kept.step < each <= step for each in plan.reselect)
        return None if due else kept.choice

    def keep(
        self, plan: Plan, site: str, branch: str | None, step: int, trajectory: int, choice: Choice
    ) -> torch.Tensor | None:
        """Keep a new choice. Returns its drift from the one before, () fp32 on its device; None where there is none."""
        before = self._of(plan, site, branch, trajectory)
        if branch is not None and plan.reselect != 1:
            self._kept[site, branch] = _Kept(plan, choice, step, trajectory)
        return None if before is None else drift(before.choice, choice)

    def forget(self, branch: str | None = None) -> None:
        """Drop the choices of a guidance branch, or all."""
        self._kept = {key: kept for key, kept in self._kept.items() if branch is not None and key[1] != branch}

    def _of(self, plan: Plan, site: str, branch: str | None, trajectory: int) -> _Kept | None:
        kept = None if branch is None else self._kept.get((site, branch))
        return kept if kept is not None and kept.plan is plan and kept.trajectory == trajectory else None


def drift(before: Choice, after: Choice) -> torch.Tensor:
    """() fp32: the share of what one choice keeps that another did not. Waits for nothing."""
    if after.k_order is None:
        old, new = (choice.mask.video_map() > 0 for choice in (before, after))
    elif after.q_order is None:
        old, new = (_group_starts(choice) for choice in (before, after))
    else:
        old, new = (_sampled_keys(choice) for choice in (before, after))
    return 1 - (old & new).sum() / new.sum()


def kept_share(mask: BlockMask) -> torch.Tensor:
    """() fp32: video-video pairs kept by a mask of whole blocks over all pairs. Waits for nothing."""
    length = mask.layout.q_len[: mask.layout.video_blocks].float()
    kept = (mask.video_map() > 0).float() @ mask.video_lengths().float() @ length
    return kept.mean() / mask.layout.grid.tokens**2


def _group_starts(choice: Choice) -> torch.Tensor:
    """(h, tokens) bool: the keys at which groups of merged ones begin."""
    assert choice.k_order is not None
    start = choice.k_order[0].T
    return start.new_zeros(len(start), choice.mask.layout.grid.tokens, dtype=torch.bool).scatter(1, start, True)


def _sampled_keys(choice: Choice) -> torch.Tensor:
    """(h, samples, slots) bool: the keys of a few queries, wherever they were moved."""
    assert choice.q_order is not None
    assert choice.k_order is not None
    layout = choice.mask.layout
    token = torch.linspace(0, layout.grid.tokens - 1, _SAMPLES, device=choice.q_order.device).long()
    row = choice.q_order[0].argsort(dim=0)[token] // layout.block
    kinds = choice.mask.block_map() > 0
    rows = kinds.gather(1, row.T[..., None].expand(-1, -1, kinds.shape[2]))
    keys = rows.repeat_interleave(layout.block, 2)[..., : layout.slots]
    place = choice.k_order[0].T[:, None].expand_as(keys)
    return torch.zeros_like(keys).scatter(2, place, keys)
