"""Policies as data: published parameters, recipes, estimates of memory, and refusals."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidaccel import Recipe
from vidaccel.caching import (
    POLICIES,
    CachePolicy,
    CGTaylor,
    EasyCache,
    FirstBlock,
    MagCache,
    Replay,
    TaylorSeer,
    TeaCache,
    placed,
)
from vidaccel.caching.gate import Accumulated, Below, Magnitude
from vidaccel.caching.indicator import Sizes
from vidaccel.caching.magcache import Ratios
from vidaccel.caching.published import MAGCACHE_RATIOS, TEACACHE, published
from vidaccel.errors import RecipeError
from vidaccel.recipe import policy_from
from vidaccel.schedule import Step

GIB = 1e9


def parts(policy: CachePolicy, model: str = "wan-t2v-14b", trait: str = "720p") -> Any:
    return policy.parts(model, trait)


def test_published_parameters_are_found_from_special_to_general() -> None:
    table = {"wan-i2v-14b/720p": 1, "wan-i2v-14b": 2, "wan": 3, "": 4}
    assert published(table, "wan-i2v-14b", "720p") == 1
    assert published(table, "wan-i2v-14b", "480p") == 2
    assert published(table, "wan-t2v-1.3b", "480p") == 3
    assert published(table, "mochi", "480p") == 4
    assert published({"wan": 3}, "mochi") is None
    assert published({"wan-t2v-14b/experts": 5}, "wan-t2v-14b", "experts:low") == 5


@pytest.mark.parametrize(
    ("model", "threshold", "warmup", "gate_order"), [("wan-t2v-14b", 0.18, 6, 4), ("hunyuan", 0.08, 6, 3)]
)
def test_cg_taylor_of_a_model(model: str, threshold: float, warmup: int, gate_order: int) -> None:
    built = parts(CGTaylor(), model)
    assert built.rule.threshold == threshold
    assert (built.caps.warmup, built.caps.last) == (warmup, 1)
    assert built.indicator().estimate(Sizes(1, 10, 4, 0, 0, 2)) == gate_order * 10 * 4 * 2
    assert not built.notes
    own = parts(CGTaylor(threshold=0.3, warmup=2, gate_order=1, order=2, max_skips=4), model)
    assert (own.rule.threshold, own.caps.warmup, own.ladder().order, own.caps.max_skips) == (0.3, 2, 2, 4)


def test_what_nobody_published_is_said() -> None:
    for policy in (CGTaylor(), TeaCache(), MagCache(), EasyCache()):
        (note,) = parts(policy, "mochi").notes
        assert "nobody has published" in note
        assert policy.name in note


def test_nothing_is_said_where_all_was_given() -> None:
    own = CGTaylor(threshold=0.1, warmup=2, gate_order=1, order=1)
    for policy in (own, TeaCache(coefficients=(1.0, 0.0)), EasyCache(threshold=0.1, warmup=2)):
        assert not parts(policy, "mochi").notes
    assert parts(CGTaylor(threshold=0.1), "mochi").notes


def test_teacache_computes_the_last_step_where_its_authors_do() -> None:
    for model in ("hunyuan", "cogvideox-2b", "cogvideox-5b", "cogvideox1.5-t2v-5b", "cogvideox1.5-i2v-5b"):
        assert parts(TeaCache(), model).caps.last == 1
    assert parts(TeaCache(), "wan-t2v-14b").caps.last == 0


def test_experts_have_no_polynomial_of_another_model() -> None:
    assert parts(TeaCache(), "wan-t2v-14b", "experts:low").rule.coefficients == (1.0, 0.0)


def test_teacache_polynomials_belong_to_their_checkpoint() -> None:
    rules = [parts(TeaCache(), "wan-i2v-14b", size).rule for size in ("480p", "720p")]
    assert all(isinstance(rule, Accumulated) for rule in rules)
    assert rules[0].coefficients != rules[1].coefficients
    # The changes of the time embedding from one step to the next are a few percent; a polynomial of another range
    # would make nonsense of them.
    for name, known in TEACACHE.items():
        values = []
        for change in (0.02, 0.05):
            value = 0.0
            for coefficient in known["coefficients"]:
                value = value * change + coefficient
            values.append(value)
        assert any(0 < value < 2 for value in values), name


@pytest.mark.parametrize(
    ("model", "trait", "threshold", "skips", "warmup"),
    [
        ("wan-t2v-1.3b", "480p", 0.12, 4, 0.2),
        ("wan-t2v-14b", "720p", 0.24, 6, 0.2),
        ("wan-t2v-14b", "experts:high", 0.06, 2, 0.2),
        ("wan-i2v-14b", "experts:high", 0.06, 2, 1.0),
        ("wan-i2v-14b", "experts:low", 0.06, 2, 0.05),
    ],
)
def test_magcache_of_a_model(model: str, trait: str, threshold: float, skips: int, warmup: float) -> None:
    built = parts(MagCache(), model, trait)
    assert isinstance(built.rule, Magnitude)
    assert built.rule.threshold == threshold
    assert (built.caps.max_skips, built.caps.warmup) == (skips, warmup)
    assert built.learn is None


def test_a_warmup_of_ones_own_counts_for_every_expert() -> None:
    for expert in ("high", "low"):
        assert parts(MagCache(warmup=0.5), "wan-i2v-14b", f"experts:{expert}").caps.warmup == 0.25


def test_published_ratios_are_whole_tables() -> None:
    for name, ratios in MAGCACHE_RATIOS.items():
        assert len(ratios) in (40, 50), name
        assert ratios[0] == 1
        assert all(0.5 < ratio < 1.5 for ratio in ratios), name


def test_ratios_are_resampled_to_other_numbers_of_steps() -> None:
    ratios = Ratios([1.0, 0.9, 0.8, 0.7, 0.6])
    assert [ratios(Step(n, 5, 0.5, False)) for n in range(5)] == [1.0, 0.9, 0.8, 0.7, 0.6]
    assert [ratios(Step(n, 3, 0.5, False)) for n in range(3)] == [1.0, 0.8, 0.6]
    assert [ratios(Step(n, 9, 0.5, False)) for n in (0, 8)] == [1.0, 0.6]
    assert Ratios([1.0])(Step(7, 50, 0.5, False)) == 1.0


def test_measured_ratios_count_from_the_next_trajectory_on() -> None:
    ratios = Ratios([])

    def run(total: int, slope: float = 0.1) -> list[float | None]:
        found = []
        for n in range(total):
            step = Step(n, total, 0.5, n == 0)
            found.append(ratios(step))
            if n:
                ratios.learn(step, 1 - n * slope)
        return found

    assert run(4) == [None] * 4
    for slope in (0.2, 0.3):
        assert run(4, slope) == [None, 0.9, 0.8, 0.7], "what another video would measure is not taken in"
    assert run(5) == [None] * 5


# u of the specification: one hidden tensor in bf16, in GB.
@pytest.mark.parametrize(
    ("tokens", "width", "policy", "expected"),
    [
        (75_600, 5120, CGTaylor(), 6.2),
        (75_600, 5120, CGTaylor(gate_order=1), 4.6),
        (32_760, 1536, CGTaylor(), 0.81),
        (32_760, 5120, FirstBlock(), 1.0),
        (75_600, 5120, TeaCache(), 1.5),
        (75_600, 5120, MagCache(), 1.5),
        (75_600, 5120, EasyCache(), 0.048),
        (75_600, 5120, TaylorSeer(), 3.1),
        (75_600, 5120, TaylorSeer(site="output"), 0.039),
    ],
)
def test_memory_of_real_models(tokens: int, width: int, policy: CachePolicy, expected: float) -> None:
    sizes = Sizes(1, tokens, width, 6 * width, 64 * tokens, 2)
    assert parts(policy).estimate(sizes, 2) / GIB == pytest.approx(expected, rel=0.05)


policies = st.one_of(
    st.builds(
        CGTaylor,
        threshold=st.one_of(st.none(), st.floats(0, 1)),
        form=st.sampled_from(["newton", "taylor"]),
        axis=st.sampled_from(["step", "sigma"]),
        storage=st.sampled_from(["auto", "bfloat16", "float32"]),
        max_skips=st.one_of(st.none(), st.integers(0, 9)),
        reach=st.one_of(st.none(), st.floats(0, 4)),
    ),
    st.builds(TeaCache, coefficients=st.one_of(st.none(), st.lists(st.floats(-9, 9), min_size=1).map(tuple))),
    st.builds(Replay, computed=st.lists(st.integers(0, 49), min_size=1).map(tuple)),
    *(st.builds(POLICIES[name]) for name in sorted(set(POLICIES) - {"replay"})),
)


@given(policies)
@settings(max_examples=60, deadline=None)
def test_recipes_hold_every_policy(policy: CachePolicy) -> None:
    recipe = Recipe(cache=policy)
    again = Recipe.from_text(recipe.to_yaml())
    assert again == recipe
    assert again.hash == recipe.hash != Recipe().hash


def test_a_bare_name_and_single_values() -> None:
    recipe = Recipe.from_text("cache: cg-taylor")
    assert recipe.cache == CGTaylor()
    changed = recipe.override({"cache.threshold": 0.25, "cache.axis": "sigma"})
    assert changed.cache == CGTaylor(threshold=0.25, axis="sigma")
    assert recipe.override({"cache": "easycache"}).cache == EasyCache()
    assert Recipe().override({"cache": {"name": "replay", "computed": [0, 4]}}).cache == Replay(computed=(0, 4))
    assert Recipe().merge(cache=FirstBlock()).cache == FirstBlock()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cache: taylor", "'taylor' is unknown; caches: cg-taylor, easycache, first-block"),
        ("cache: {threshold: 0.1}", "None is unknown"),
        ("cache: {name: cg-taylor, treshold: 0.1}", "no setting 'treshold'; it has last, max_skips"),
        ("cache: {name: cg-taylor, threshold: much}", "threshold is 'much'; it takes float"),
        ("cache: {name: cg-taylor, threshold: -1}", "threshold is -1; it is a number from 0"),
        ("cache: {name: cg-taylor, threshold: .nan}", "threshold is nan"),
        ("cache: {name: cg-taylor, reach: -0.5}", "reach is -0.5; it is a number from 0"),
        ("cache: {name: cg-taylor, order: 9}", "order is 9; it is a whole number from 0 to 4"),
        ("cache: {name: cg-taylor, form: spline}", "form 'spline' is unknown; possible: newton, taylor"),
        ("cache: {name: cg-taylor, axis: time}", "axis 'time' is unknown"),
        ("cache: {name: cg-taylor, site: logits}", "site 'logits' is unknown; possible: layer, output"),
        ("cache: {name: cg-taylor, storage: int8}", "storage 'int8' is unknown; possible: auto, bfloat16, float32"),
        ("cache: {name: cg-taylor, gate_stride: 0}", "gate_stride is 0"),
        ("cache: {name: taylorseer, interval: 0}", "interval is 0"),
        ("cache: {name: teacache, coefficients: [a]}", "coefficients is"),
        ("cache: {name: teacache, coefficients: []}", "coefficients is"),
        ("cache: {name: teacache, coefficients: 0.1}", "coefficients is 0.1; it takes tuple"),
        ("cache: {name: magcache, ratios: 1}", "ratios is 1; it takes tuple"),
        ("cache: {name: magcache, warmup: 6}", "warmup is 6; it is a share of the steps, from 0 to 1"),
        ("cache: {name: replay, computed: 3}", "computed is 3; it takes tuple"),
        ("cache: {name: replay}", "cache replay needs computed"),
        ("cache: {name: replay, computed: []}", "it lists step numbers"),
        ("cache: {name: replay, computed: [x]}", "it lists step numbers"),
        ("cache: {name: placed, share: 0}", "share is 0; it lies between 0 and 1"),
        ("cache: 3", "takes named values"),
    ],
)
def test_bad_caches(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_text(text)


def test_an_infinite_threshold_survives_a_file() -> None:
    recipe = Recipe(cache=CGTaylor(threshold=math.inf))
    assert Recipe.from_text(recipe.to_yaml()) == recipe
    assert isinstance(parts(CGTaylor(threshold=math.inf)).rule, Below)


def test_policy_from_gives_a_policy_back() -> None:
    policy = CGTaylor(order=2)
    assert policy_from(policy) is policy
    assert policy_from(None) is None


def test_placed_steps_come_first_and_then_ever_farther_apart() -> None:
    steps = placed(50)
    assert steps == (0, 1, 2, 3, 4, 5, 6, 10, 17, 25, 34, 44)
    gaps = [after - before for before, after in pairwise(steps)]
    assert gaps == sorted(gaps)
    assert placed(50, first=6)[:7] == (0, 1, 2, 3, 4, 5, 8)
    assert placed(30, 9, first=3, end=1.0)[-1] == 29
    assert placed(20, 20, end=1.0) == tuple(range(20))
    for many in range(8, 80):
        for few in range(1, many // 2):
            assert len({*placed(many, few)}) == few


@pytest.mark.parametrize(
    ("steps", "computed", "first", "end"), [(8, 9, None, 1), (8, 2, 3, 0), (50, 12, 0, 0.9), (10, 9, None, 0.5)]
)
def test_steps_that_cannot_be_placed(steps: int, computed: int, first: int | None, end: float) -> None:
    with pytest.raises(RecipeError, match="cannot be placed"):
        placed(steps, computed, first=first, end=end)
