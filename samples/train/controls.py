"""Patterns that should fail: as dense as a good one, without its idea. A model that survives them shows nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vidaccel.blocks import BlockMask
from vidaccel.grid import Site, TokenLayout, choose_tile
from vidaccel.patterns import Plan


@dataclass(frozen=True)
class RandomBlocks:
    """Each query block keeps itself and blocks drawn at random, the same in all layers and steps."""

    name: ClassVar[str] = "random"
    per_site: ClassVar[bool] = False

    block: int = 64
    seed: int = 0

    def plan(self, layout: TokenLayout, density: float | None, site: Site) -> Plan:
        """Plan all layers of one grid."""
        generator = torch.Generator().manual_seed(self.seed)
        tiled = _tiled(layout)
        cost = torch.rand(tiled.video_blocks, tiled.video_blocks, generator=generator)
        return _cheapest(cost, tiled, density).to(layout.device)


@dataclass(frozen=True)
class FirstFrames:
    """Each query block keeps itself and the first blocks of the clip: at a low density the first frame, no motion."""

    name: ClassVar[str] = "first-frame"
    per_site: ClassVar[bool] = False

    block: int = 64

    def plan(self, layout: TokenLayout, density: float | None, site: Site) -> Plan:
        """Plan all layers of one grid."""
        tiled = _tiled(layout)
        cost = torch.arange(tiled.video_blocks).float().expand(tiled.video_blocks, -1)
        return _cheapest(cost, tiled, density).to(layout.device)


CONTROLS: dict[str, RandomBlocks | FirstFrames] = {"random": RandomBlocks(), "first-frame": FirstFrames()}


def _tiled(layout: TokenLayout) -> TokenLayout:
    """Return tiles one frame thick, so that blocks of the first frame hold nothing of the second."""
    raster = layout.to("cpu")
    side = choose_tile(raster.grid._replace(t=1), layout.block)
    return raster.tiled(side)


def _cheapest(cost: Tensor, layout: TokenLayout, density: float | None) -> Plan:
    """Keep the own block and then the cheapest, as many in each row as the density allows."""
    wanted = 1.0 if density is None else density
    blocks = layout.video_blocks
    order = cost.clone().fill_diagonal_(-1).argsort(dim=1, stable=True)
    video = torch.zeros(blocks, blocks, dtype=torch.bool)
    video.scatter_(1, order[:, : max(1, round(wanted * blocks))], True)
    keep = torch.ones(layout.blocks, layout.blocks, dtype=torch.bool)
    keep[:blocks, :blocks] = video
    return Plan.of(BlockMask.of(keep, layout), density, "control")
