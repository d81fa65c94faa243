"""Pictures show what patterns keep, and those that are committed are the ones that the command draws."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from vidaccel.grid import Site, TokenLayout
from vidaccel.lab import pictures
from vidaccel.lab.explain import _kept
from vidaccel.patterns import PATTERNS, Pyramid

SITE = Site("blocks.0.attn1.processor", 0, "self", "wan")


@pytest.mark.parametrize("name", ["radial", "neighborhood", "topk", "ann"])
def test_a_share_is_one_where_a_pair_is_kept(name: str) -> None:
    pattern, density, heads = pictures.PICTURES[name]
    plan = pattern.plan(TokenLayout.of(pictures.GRID, 0, pictures.BLOCK), density, SITE)
    qkv = pictures.world(heads)
    every = torch.arange(plan.layout.tokens)
    kept = _kept(plan, qkv, every).numpy()
    assert (pictures.shares(plan, *qkv) > 0).tolist() == kept.tolist()
    assert set(pictures.shares(plan, *qkv).round(6).flatten()) == {0.0, 1.0}


def test_merged_keys_are_shared() -> None:
    plan = Pyramid(block=16, levels=(0.25, 0.25, 0.25, 0.25)).plan(TokenLayout.of((4, 8, 8), 0, 16), None, SITE)
    generator = torch.Generator().manual_seed(0)
    found = pictures.shares(plan, *(torch.randn(1, 256, 1, 16, generator=generator) for _ in range(3)))
    # So few tiles as 16 are not worth level 8: a quarter each at levels 1 and 2, the rest at level 4.
    assert "50% at level 4" in plan.rule
    for share, count in ((1.0, 64), (0.5, 64), (0.25, 128)):
        assert ((found.round(6) == share).sum(-1) == count).all()


def test_committed_pictures_are_up_to_date(tmp_path: Path) -> None:
    assert pictures.stale() == []
    changed = Image.open(pictures.FOLDER / "radial.png").convert("RGB").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    changed.save(tmp_path / "radial.png")
    assert pictures.stale(tmp_path, ["radial", "sliding-window"]) == ["radial", "sliding-window"]


def test_every_pattern_is_described_beside_its_picture() -> None:
    text = (pictures.FOLDER.parent / "README.md").read_text(encoding="utf-8")
    described = dict(re.findall(r"^\| `([a-z-]+)` \| .* \| (.*) \|$", text, re.MULTILINE))
    assert set(described) == set(PATTERNS)
    assert {name for name, cell in described.items() if f"(pictures/{name}.png)" in cell} == set(pictures.PICTURES)
    assert {path.stem for path in pictures.FOLDER.glob("*.png")} == set(pictures.PICTURES)
