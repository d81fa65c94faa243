"""The checker against clips whose content is known: it must be right on them, and wrong on others' captions."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from samples.models import checker, world
from samples.models.world import Scene, Thing
from samples.train.clips import render

FRAMES = 13


def clip(scene: Scene, seed: int) -> Tensor:
    return render([scene], [seed], FRAMES)[0]


def blurred(video: Tensor) -> Tensor:
    """What an autoencoder leaves: soft edges and a little noise."""
    soft = F.avg_pool2d(video.permute(0, 3, 1, 2), 5, 1, 2, count_include_pad=False).permute(0, 2, 3, 1)
    noise = torch.randn(soft.shape, generator=torch.Generator().manual_seed(0))
    return (soft + 0.03 * noise).clamp(0, 1)


def scenes(things: int, count: int) -> list[Scene]:
    rng = random.Random(10 + things)
    return [world.draw(rng, things=things) for _ in range(count)]


@pytest.mark.parametrize("place", range(8))
@pytest.mark.parametrize("things", [1, 2])
def test_right_on_clips_of_every_kind(things: int, place: int) -> None:
    scene = scenes(things, 8)[place]
    video = clip(scene, place)
    for frames in (video, blurred(video)) if place % 2 else (video,):
        verdict = checker.check(frames, scene)
        assert verdict.right, scene.caption()
        assert verdict.speed
        assert verdict.camera in (True, None)


@pytest.mark.parametrize("texture", world.TEXTURES)
def test_textures_are_told_apart(texture: str) -> None:
    scene = Scene((Thing("green", "square", "left", texture=texture),), tone="white")
    assert checker.read_objects(blurred(clip(scene, 3)))[0].texture == texture


def test_every_aspect_can_be_wrong() -> None:
    thing = Thing("red", "star", "right", "slowly", "plain")
    scene = Scene((thing,), "grey", "cloudy", "left")
    video = clip(scene, 0)
    assert checker.check(video, scene).right
    for change in (
        {"colour": "orange"},
        {"shape": "cross"},
        {"direction": "up-right"},
        {"speed": "quickly"},
        {"texture": "striped"},
    ):
        verdict = checker.check(video, replace(scene, things=(replace(thing, **change),)))
        assert not getattr(verdict, next(iter(change))), change
    assert checker.check(video, replace(scene, camera="right")).camera is False


def test_shuffled_captions_score_at_chance() -> None:
    drawn = scenes(1, 12)
    readings = [checker.read_objects(clip(scene, seed))[0] for seed, scene in enumerate(drawn)]
    pairs = [(r, s.things[0]) for i, r in enumerate(readings) for j, s in enumerate(drawn) if i != j]
    right = sum((r.colour, r.shape, r.direction) == (t.colour, t.shape, t.direction) for r, t in pairs)
    assert right / len(pairs) < 0.05
    assert sum(r.colour == t.colour for r, t in pairs) / len(pairs) < 0.35


def test_a_still_or_turning_or_missing_object_has_no_direction() -> None:
    scene = Scene((Thing("blue", "ring", "right", "quickly"),))
    video = clip(scene, 1)
    assert checker.read_objects(video[:1].expand(FRAMES, -1, -1, -1))[0].direction is None
    there_and_back = torch.cat((video, video.flip(0)))
    assert checker.read_objects(there_and_back)[0].direction is None
    assert checker.read_objects(torch.full_like(video, 0.4)) == []
    assert not checker.check(torch.full_like(video, 0.4), scene).right


def test_a_second_object_spoils_the_colour() -> None:
    one = Scene((Thing("blue", "square", "up"),))
    two = Scene((Thing("blue", "square", "up"), Thing("yellow", "square", "left")))
    assert not checker.check(clip(two, 0), one).colour


def test_frames_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="frames must be"):
        checker.check(torch.zeros(5, 64, 64, 3), scenes(1, 1)[0])
