"""Prompts of the sample world are read back as the scenes that they say; others are nobody's business."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from vidaccel._samples import world
from vidaccel.lab.shown import scene_of, shows


def test_every_caption_is_read_back() -> None:
    rng = random.Random(0)
    for _ in range(300):
        scene = world.draw(rng)
        assert scene_of(scene.caption()) == scene
        for omit in itertools.combinations(world.PARTS, 2):
            found = scene_of(scene.caption(omit))
            assert found is not None
            assert found.caption(omit) == scene.caption(omit)


@pytest.mark.parametrize(
    "prompt",
    ["a cat playing piano", "", "a red circle", "a red circle moves right and then stops", "a red circle moves"],
)
def test_other_prompts(prompt: str) -> None:
    assert scene_of(prompt) is None
    assert shows(prompt, np.zeros((9, 256, 256, 3), np.uint8)) is None


def test_a_clip_is_read() -> None:
    y, x = np.mgrid[0:256, 0:256]
    discs = [(x - 60 - 5 * t) ** 2 + (y - 128) ** 2 < 46**2 for t in range(17)]
    red = np.uint8([230, 31, 31])
    clip = np.where(np.stack(discs)[..., None], red, np.uint8(26))
    assert shows("a red circle moves right", clip) is True
    assert shows("a red circle moves left", clip) is False
    assert shows("a blue circle moves right", clip) is False
    assert shows("a red circle moves right", clip[:, :128]) is None
