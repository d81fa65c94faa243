"""Presets: one for every known model, each with what justifies it, none that claims more than was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from vidaccel import Recipe, presets
from vidaccel._samples import MODELS
from vidaccel.lab.estimate import planned
from vidaccel.pipelines.zoo import REAL_MODELS
from vidaccel.render import RenderJob, find, preview

ROOT = Path(__file__).parents[2]
UNMEASURED = "Quality was never measured with its real weights."
# Sizes beside the default one of each model; presets of other names are for special uses of these models.
SIZES = {
    "wan2.1-14b-480p": (480, 832, 81),
    "wan2.2-a14b-480p": (480, 832, 81),
    "hunyuan-video-540p": (544, 960, 129),
    "hunyuan-video-1.5-480p": (480, 832, 121),
}
SPECIAL = {"wan-4step", "wan-8step", "wan2.1-freeswim"}
SAMPLES = set(MODELS.values()) & set(presets())


def model_of(preset: str) -> str | None:
    """The known model that a preset is for, by its name."""
    return next((name for name in sorted(REAL_MODELS, key=len, reverse=True) if preset.startswith(name)), None)


def test_every_known_model_has_one() -> None:
    assert {model_of(name) for name in set(presets()) - SPECIAL - SAMPLES} == set(REAL_MODELS) - SAMPLES
    # A stream takes methods, and no recipe.
    assert set(MODELS.values()) - SAMPLES <= {"wan-causal-tiny"}


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_a_samples_preset_plans_at_its_size(name: str) -> None:
    model, recipe = find(name), Recipe.load(name)
    job = RenderJob("a red circle moves right", name, recipe, seed=0, device="cpu").complete(model)
    assert f"{job.height}x{job.width}, {job.num_frames} frames, {job.num_inference_steps} steps" in recipe.about
    assert preview(job, model)["plans"][0]["visited"] < 0.6


@pytest.mark.parametrize("name", sorted(set(presets()) - SPECIAL - SAMPLES))
def test_it_plans_at_its_size_and_gains(name: str) -> None:
    model, recipe = REAL_MODELS[str(model_of(name))], Recipe.load(name)
    size = SIZES.get(name, model.size)
    # A preset that says a size is for that size.
    if "p" in name.rpartition("-")[2]:
        assert f"{size[0]}x{size[1]}, {size[2]} frames" in recipe.about
    assert recipe.attention is not None
    assert planned(model, model.grid(*size), recipe.attention, recipe.density).visited < 0.6


@pytest.mark.parametrize("name", presets())
def test_it_names_its_report_or_says_that_there_is_none(name: str) -> None:
    recipe = Recipe.load(name)
    samples = "samples/models/"
    if recipe.evidence is not None:
        assert (ROOT / recipe.evidence).exists()
    real = recipe.evidence is not None and recipe.evidence.startswith(samples)
    assert real != (UNMEASURED in recipe.about), "weights that nobody rendered with are said to be such"


@pytest.mark.parametrize("name", sorted(set(presets()) - SPECIAL - SAMPLES))
def test_a_speed_that_was_measured_at_its_size_is_named_with_its_report(name: str) -> None:
    recipe, model = Recipe.load(name), REAL_MODELS[str(model_of(name))]
    found = {}
    for path in (ROOT / "pipelines/bench/results").glob("*.json"):
        record = json.loads(path.read_text())
        for row in record["rows"] if record["what"] == "model" else ():
            if (row["model"], row["variant"]) == (model.name, "radial 0.25") and row["ok"] and not row["compiled"]:
                found[path.name] = tuple(row["size"]), row["speedup"]
    if SIZES.get(name, model.size) in {size for size, _ in found.values()}:
        assert recipe.evidence is not None
    if said := re.search(r"([\d.]+) times that of the stock model", recipe.about):
        assert float(said[1]) == round(found[Path(str(recipe.evidence)).name][1], 2)
