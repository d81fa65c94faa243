"""Goals become thresholds by what was measured, and by nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import vidaccel
from vidaccel.caching import POLICIES, CGTaylor, Placed
from vidaccel.caching.calibration import Calibration, Curve, Point, calibrated, knob, model_key
from vidaccel.errors import RecipeError

# The third threshold came out slower and better than the second: such noise must not turn a search round.
POINTS = (
    Point(0.0, 1.0, 100.0),
    Point(0.1, 2.0, 40.0),
    Point(0.2, 1.9, 41.0),
    Point(0.4, 3.0, 30.0),
)


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("VIDACCEL_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def made() -> Calibration:
    return Calibration("Model-3-2", 20, ("a cat",), (Curve("cg-taylor", POINTS),))


@pytest.mark.parametrize(
    ("goal", "threshold"),
    [
        ("auto:1x", 0.0),
        ("auto:1.5x", 0.05),
        ("auto:2x", 0.1),
        ("auto:2.5x", 0.3),
        ("auto:3x", 0.4),
        ("auto:psnr>=70", 0.05),
        ("auto:psnr>=40", 0.2),
        ("auto:psnr>=35", 0.3),
        ("auto:psnr>=20", 0.4),
    ],
)
def test_goals(made: Calibration, goal: str, threshold: float) -> None:
    assert made.policy_for(goal) == {"name": "cg-taylor", "threshold": pytest.approx(threshold), "steps": 20}


@pytest.mark.parametrize(
    ("goal", "name", "value"),
    [
        ("auto:1x", "cg-taylor", 0.0),
        ("auto:1.6x", "cg-taylor", 0.06),  # 64 dB; placed has 45 dB from there on
        ("auto:2x", "placed", 0.5),
        ("auto:2.5x", "cg-taylor", 0.3),  # 35.5 dB; placed, between 45 and 21 dB, has 34.2
        ("auto:2.6x", "cg-taylor", 0.32),
        ("auto:4x", "placed", 0.25),  # nobody else is that fast
        ("auto:3.2x", "placed", 1 / 3.2),
        ("auto:psnr>=44", "placed", 1 / 2.04),  # as fast as 2.04x, cg-taylor 1.93x
        ("auto:psnr>=31", "cg-taylor", 0.38),
    ],
)
def test_what_wins_at_a_goal_is_taken(goal: str, name: str, value: float) -> None:
    """For a speed who loses least, for a quality who is fastest."""
    placed = Curve("placed", (Point(0.5, 2.0, 45.0), Point(0.25, 4.0, 2.0)))
    both = Calibration("Model-3-2", 20, ("a cat",), (Curve("cg-taylor", POINTS), placed))
    found = both.policy_for(goal)
    assert found == {"name": name, str(knob(name)): pytest.approx(value, abs=0.01), "steps": 20}


def test_what_can_be_calibrated() -> None:
    assert [name for name in POLICIES if knob(name) is None] == ["replay", "taylorseer"]


@pytest.mark.parametrize(
    ("goal", "words"),
    [("auto:3.5x", "1x to 3.00x"), ("auto:0.5x", "1x to"), ("auto:fast", "no goal"), ("auto:psnr>=101", "at most 100")],
)
def test_goals_that_were_never_reached(made: Calibration, goal: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        made.policy_for(goal)


def test_a_calibration_is_kept_and_found(made: Calibration) -> None:
    path = made.save()
    assert Calibration.load("Model-3-2") == made
    path.write_text("{}")
    with pytest.raises(RecipeError, match="cannot be read"):
        Calibration.load("Model-3-2")
    path.write_text('{"schema": 2, "model": "Model-3-2"}')
    with pytest.raises(RecipeError, match=r"older vidaccel.*`vidaccel calibrate --model mine` again"):
        Calibration.load("Model-3-2", "mine")
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_accelerate_takes_a_goal(wan: Any, made: Calibration) -> None:
    with pytest.raises(RecipeError, match="vidaccel calibrate"):
        vidaccel.accelerate(wan, cache="auto:2.5x")
    with pytest.raises(RecipeError, match="'9' is no goal; write 2x"):
        vidaccel.accelerate(wan, cache="auto:9")
    key = model_key("WanTransformer3DModel", wan.transformer.config, 1)
    assert key == "WanTransformer3DModel-3-2-32-16-16"
    Calibration(key, 20, ("a cat",), (Curve("cg-taylor", POINTS), Curve("placed", (Point(0.25, 4.0, 20.0),)))).save()
    expected = CGTaylor(threshold=made.policy_for("auto:2.5x")["threshold"], steps=20)
    with vidaccel.accelerate(wan, cache="auto:2.5x") as run:
        assert run.recipe.cache == expected
    # What was found is what the recipe says, so that the run can be repeated elsewhere.
    assert vidaccel.Recipe.from_dict(run.recipe.to_dict()).cache == expected
    with vidaccel.accelerate(wan, cache="auto:4x") as run:
        assert run.recipe.cache == Placed(share=0.25, steps=20)


def test_two_experts_of_a_size_are_another_model(make_wan: Any, made: Calibration) -> None:
    """As Wan 2.2 A14B beside Wan 2.1 14B."""
    one, two = make_wan(), make_wan(experts=True)
    Calibration(model_key("WanTransformer3DModel", one.transformer.config, 1), 20, ("a cat",), made.curves).save()
    vidaccel.accelerate(one, cache="auto:2.5x").remove()
    with pytest.raises(RecipeError, match="2-experts"):
        vidaccel.accelerate(two, cache="auto:2.5x")
    with pytest.raises(RecipeError, match=r"but wan-tiny was never calibrated.*calibrate --model wan-tiny"):
        calibrated("auto:2x", "X", {}, 1, "wan-tiny")


def test_names_and_policies_pass_through() -> None:
    policy = CGTaylor()
    for cache in (None, "cg-taylor", policy):
        assert calibrated(cache, "X", {}) is cache
