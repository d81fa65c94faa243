"""The shipped model through the stock pipeline."""

from __future__ import annotations

import json

import pytest
import torch

from samples.models import path

PROMPT = "a red circle moves right"


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match="wan-tiny"):
        path("wan-large")


@pytest.mark.slow
def test_it_draws_what_it_is_told() -> None:
    from diffusers import WanPipeline

    from samples.models import checker

    pipe = WanPipeline.from_pretrained(path("wan-tiny"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    settings = json.loads((path("wan-tiny") / "defaults.json").read_text())
    settings.pop("fps")
    settings |= {"num_frames": 17, "num_inference_steps": 8}
    video = pipe(PROMPT, generator=torch.Generator().manual_seed(0), output_type="pt", **settings).frames[0]
    found = checker.read_objects(video.permute(0, 2, 3, 1))
    assert (found[0].colour, found[0].shape, found[0].direction) == ("red", "circle", "right")
