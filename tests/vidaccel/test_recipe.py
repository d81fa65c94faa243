"""Recipes as data: round trips, overrides, and files that mean harm."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vidaccel import Recipe, Schedule, presets
from vidaccel.errors import PatternError, RecipeError
from vidaccel.patterns import PATTERNS, Neighborhood, Radial, SlidingWindow

recipes = st.builds(
    Recipe,
    attention=st.one_of(st.none(), st.builds(Radial, block=st.sampled_from([16, 64, 128]))),
    density=st.one_of(st.none(), st.floats(0.01, 1)),
    schedule=st.builds(
        Schedule,
        dense_steps=st.one_of(st.integers(0, 50), st.floats(0, 1)),
        dense_layers=st.one_of(st.integers(0, 40), st.lists(st.integers(-40, 40), max_size=3).map(tuple)),
        branch=st.dictionaries(st.sampled_from(["cond", "uncond"]), st.floats(0.01, 1)),
    ),
    about=st.text(max_size=20),
)


@given(recipes)
@example(Recipe(about="a *sign* & another"))
@settings(max_examples=50, deadline=None)
def test_round_trip(recipe: Recipe) -> None:
    again = Recipe.from_text(recipe.to_yaml())
    assert again == recipe
    assert again.hash == recipe.hash


def test_hash_names_what_runs() -> None:
    base = Recipe(Radial(), 0.25)
    assert base.hash == Recipe(Radial(), 0.25, about="words").hash
    assert base.hash != Recipe(Radial(), 0.3).hash
    assert base.hash != Recipe(Radial(block=64), 0.25).hash


@pytest.mark.parametrize("name", presets())
def test_presets_load_and_explain_themselves(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.attention is not None
    assert recipe.about


def test_a_bare_name_is_a_pattern() -> None:
    assert Recipe.from_text("attention: radial\ndensity: 0.3") == Recipe(PATTERNS["radial"](), 0.3)


def test_override_and_merge() -> None:
    recipe = Recipe(Radial(), 0.25)
    changed = recipe.override(
        {"attention.block": 64, "schedule.dense_steps": 2, "schedule.expert.low": 0.2, "density": 0.5}
    )
    assert changed == Recipe(Radial(block=64), 0.5, Schedule(dense_steps=2, expert={"low": 0.2}))
    assert recipe.merge(density=None, schedule=Schedule(dense_steps=1)) == Recipe(
        Radial(), 0.25, Schedule(dense_steps=1)
    )
    with pytest.raises(RecipeError, match=r"'attention.windw' is not a setting.*attention\.block"):
        recipe.override({"attention.windw": 3})
    with pytest.raises(RecipeError, match="is not a setting"):
        Recipe().override({"attention.block": 64})


def test_density_and_a_knob_of_the_pattern_replace_each_other() -> None:
    """Whichever of them was given last, by hand; both by hand are for the pattern to refuse."""
    kept, asked = Recipe.from_text("{attention: radial, density: 0.3}"), {"attention.decay": 0.2}
    assert kept.override(asked).density is None
    assert kept.override(asked | {"density": 0.4}).density == 0.4
    assert kept.merge(attention=Neighborhood((3, 5, 5))).density is None
    assert kept.merge(attention=Neighborhood()).density == 0.3
    decay = Recipe.load("wan2.1-14b-720p")
    assert decay.merge(density=0.2).attention == Radial(rule="released")
    assert decay.override({"density": 0.2}).attention == Radial(rule="released")
    assert decay.override({"attention.block": 64}).attention == Radial(rule="released", decay=0.2, block=64)
    window = Recipe(attention=SlidingWindow((3, 1, 1)))
    assert window.merge(density=0.2).attention == SlidingWindow()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attention: spiral", r"'spiral' is unknown; patterns: ann, dense, f"),
        ("attention: {block: 64}", "None is unknown"),
        ("attention: {name: radial, blok: 64}", "no setting 'blok'"),
        ("attention: {name: radial, block: many}", "block is 'many'; it takes int"),
        ("density: dense", "density is 'dense'"),
        ("density: [0.1]", "density is"),
        ("densty: 0.5", "no setting 'densty'; it has attention, density"),
        ("schedule: {dense_steps: lots}", "dense_steps is 'lots'"),
        ("schedule: 3", "takes named values"),
        ("schedule: {dense_steps: .nan}", "dense_steps=nan"),
        ("schedule: {branch: {uncond: little}}", "branch 'uncond' has density 'little'"),
        ("schedule: {expert: {high: null}}", "expert 'high' has density None"),
        ("schedule: {branch: 0.3}", "branch is 0.3; it takes"),
        ("schedule: {branch: cond}", "branch is 'cond'; it takes"),
        ("- 1\n- 2", "takes named values"),
        ("a: b: c", "not plain YAML"),
        ("attention: !!python/object/apply:os.system ['true']", "not plain YAML"),
        ("attention: my_module:MyPattern", "is unknown"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "anchors"),
    ],
)
def test_bad_recipes(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_text(text)


def test_bad_density_is_named() -> None:
    with pytest.raises(PatternError, match=r"density 1.5 was asked for.*\(0, 1\]"):
        Recipe.from_text("attention: radial\ndensity: 1.5")


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("attention: radial\n")
    assert Recipe.load(path).attention == Radial()
    with pytest.raises(RecipeError, match="presets: "):
        Recipe.load("no-such-preset")
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load(tmp_path / "none.yaml")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load(path)
    path.write_text("#" * 70_000)
    with pytest.raises(RecipeError, match="at most"):
        Recipe.load(path)
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load(tmp_path.with_suffix(".yaml"))


def test_where_a_threshold_comes_from_is_no_part_of_the_name() -> None:
    one, other = (Recipe.from_dict({"cache": {"name": "teacache", "threshold": 0.1, "steps": n}}) for n in (None, 20))
    assert one.hash == other.hash
    assert other.cache is not None
    assert other.cache.steps == 20
