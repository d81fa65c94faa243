"""`vidaccel render --model` on a saved pipeline of every family: found, previewed, rendered, with its own defaults."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
from typer.testing import CliRunner

from vidaccel.errors import PatternError, UsageError
from vidaccel.patterns import FreeSwim, Pattern, PerHead, PerLayer, Radial, SlidingWindow
from vidaccel.recipe import Recipe
from vidaccel.render import RenderJob, find, open_pipeline, preview, render
from vidaccel.schedule import Schedule

# Pipeline, size and frames, its grid, frames a second, and frames that do not fit with the nearest that do.
MODELS: dict[str, tuple[Callable[[], Any], tuple[int, int, int], str, float, tuple[int, str]]] = {
    "hunyuan": (tiny_pipelines.hunyuan, (64, 96, 9), "3x4x6", 24, (10, "9 and 13")),
    "hunyuan15": (tiny_pipelines.hunyuan15, (64, 96, 9), "3x4x6", 24, (10, "9 and 13")),
    "cogvideox": (tiny_pipelines.cogvideox, (64, 96, 9), "3x4x6", 8, (10, "9 and 13")),
    "cogvideox1.5": (lambda: tiny_pipelines.cogvideox("1.5"), (64, 96, 17), "3x4x6", 16, (21, "17 and 25")),
    "skyreels": (tiny_pipelines.skyreels, (64, 96, 9), "3x4x6", 24, (10, "9 and 13")),
    "ltx": (tiny_pipelines.ltx, (128, 192, 17), "3x4x6", 25, (19, "17 and 25")),
    "mochi": (tiny_pipelines.mochi, (64, 96, 13), "3x4x6", 30, (14, "13 and 19")),
}


@pytest.mark.parametrize("name", MODELS)
def test_found_previewed_and_rendered(name: str, tmp_path: Path) -> None:
    make, (height, width, frames), grid, fps, (wrong, nearest) = MODELS[name]
    make().save_pretrained(tmp_path)
    (tmp_path / "defaults.json").write_text(json.dumps({"max_sequence_length": 16}))
    model = find(str(tmp_path))
    assert model.defaults()["fps"] == fps
    recipe = Recipe(attention=Radial(block=16), density=0.5, schedule=Schedule(dense_layers=1))
    size = {"height": height, "width": width, "num_frames": frames, "num_inference_steps": 2}
    asked = RenderJob(prompt="a cat", model=str(tmp_path), recipe=recipe, seed=1, **size)
    job = asked.complete(model)
    seen = preview(job, model)
    assert (seen["grid"], seen["model"]["layers"]) == (grid, 2)
    pipe = open_pipeline(job, model)
    for text_setting in ("tokenizer_max_length", "tokenizer_2_max_length", "vision_num_semantic_tokens"):
        if hasattr(pipe, text_setting):  # HunyuanVideo-1.5 has 1985 text slots otherwise
            setattr(pipe, text_setting, 16)
    made = render(pipe, job)
    assert made.frames.shape == (frames, height, width, 3)
    assert {call["grid"] for call in made.report.data["calls"]} == {grid}
    assert made.report.summary["sparse_layer_calls"] == len(made.report.data["calls"])
    with pytest.raises(UsageError, match=f"{wrong} frames do not fit.*nearest: {nearest}"):
        model.grid(height, width, wrong)


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("hunyuan", (33, 45, 80)),
        ("hunyuan15", (31, 30, 53)),
        ("cogvideox", (13, 30, 45)),
        ("cogvideox1.5", (11, 48, 85)),
        ("skyreels", (25, 34, 60)),
    ],
)
def test_defaults_give_the_grid_of_the_real_model(name: str, grid: tuple[int, int, int], tmp_path: Path) -> None:
    """Tiny models have the VAE strides and patches of the real ones."""
    MODELS[name][0]().save_pretrained(tmp_path)
    model = find(str(tmp_path))
    known = model.defaults()
    assert {"fps", "height", "width", "num_frames", "num_inference_steps"} <= set(known)
    if name == "skyreels":  # this tiny one has a short RoPE
        model = type(model)(**{**vars(model), "transformer": {**model.transformer, "rope_max_seq_len": 1024}})
    assert model.grid(known["height"], known["width"], known["num_frames"]) == grid


def test_a_preview_plans_what_the_first_layer_runs(tmp_path: Path) -> None:
    tiny_pipelines.cogvideox().save_pretrained(tmp_path)
    model = find(str(tmp_path))

    def of(pattern: Pattern, density: float | None = None) -> dict[str, Any]:
        recipe = Recipe(attention=pattern, density=density)
        size = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 2}
        return preview(RenderJob("a cat", str(tmp_path), recipe, seed=1, **size).complete(model), model)

    radial, window = Radial(rule="ranked", block=16), FreeSwim((2, 4), block=16)
    # Windows that are there for quality run even where dense attention is as fast.
    assert of(window)["effective_density"] < 1
    assert of(PerLayer({0: window, 1: radial}))["effective_density"] == of(window)["effective_density"]
    with pytest.raises(PatternError, match="per-head was asked for with 3 heads, but the model has 2"):
        of(PerHead((radial, SlidingWindow(block=16)), (0, 1, 1)), 0.6)
    with pytest.raises(PatternError, match="this transformer has 2 layers"):
        of(PerLayer({0: radial, 5: SlidingWindow(block=16)}), 0.6)


def test_by_command(tmp_path: Path) -> None:
    from vidaccel.cli.main import app

    tiny_pipelines.cogvideox().save_pretrained(tmp_path / "model")
    out = tmp_path / "out.mp4"
    size = ["--height", "64", "--width", "96", "--frames", "9", "--steps", "2", "--max-sequence-length", "16"]
    sparse = ["--attention", "radial", "--density", "0.5", "--set", "attention.block=16"]
    model = ["--model", str(tmp_path / "model"), "--prompt", "a cat", "-o", str(out)]
    done = CliRunner().invoke(app, ["render", *model, *size, *sparse])
    assert done.exit_code == 0, done.output
    assert out.stat().st_size > 0
