"""Counting work, judging patterns on one run, and the decisions of a search."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vidaccel
from vidaccel.caching import CGTaylor, TaylorSeer
from vidaccel.caching.goal import Goal
from vidaccel.errors import RecipeError, UsageError
from vidaccel.grid import VideoGrid
from vidaccel.lab.candidates import Space, further, pair, turns
from vidaccel.lab.explain import AtSteps, Everything
from vidaccel.lab.judge import Candidate, Judge
from vidaccel.lab.trials import Trials, average, describe, settled
from vidaccel.lab.tune import Aim, Effort, Search
from vidaccel.lab.work import counted
from vidaccel.patterns import Radial, TopK
from vidaccel.pipelines.zoo import build
from vidaccel.recipe import Recipe
from vidaccel.render.job import ReadyJob
from vidaccel.schedule import Schedule


@pytest.mark.parametrize(
    ("text", "goal"),
    [
        ("2x", ("speedup", 2)),
        ("speedup>=1.5", ("speedup", 1.5)),
        ("psnr>=28.5", ("psnr", 28.5)),
        ("ssim>=0.9", ("ssim", 0.9)),
    ],
)
def test_goals_are_read(text: str, goal: tuple[str, float]) -> None:
    assert Goal.of(text) == goal
    assert Goal.of(str(Goal.of(text))) == goal


@pytest.mark.parametrize("text", ["2", "fast", "psnr>28", "ssim>=1", "lpips>=0.1", "speedup>=", "", "0x", "psnr>=0"])
def test_what_is_no_goal_says_so(text: str) -> None:
    with pytest.raises(RecipeError, match=r"goal|ssim"):
        Goal.of(text)


def test_work_is_what_torch_counts_and_attention(small: Callable[[str], Any]) -> None:
    model, grid = small("wan2.1-14b"), VideoGrid(4, 8, 8)
    found = {}
    for layers in (1, 2):
        deep = model.with_layers({"blocks": layers})
        transformer, inputs = build(deep, "cpu", torch.float32), deep.inputs(grid, "cpu", torch.float32)
        with FlopCounterMode(display=False) as counter, counted([transformer]) as work, torch.no_grad():
            transformer(**inputs)
        found[layers] = work.flops - counter.get_total_flops()
    # On a CPU torch does not count attention: of the video with itself, and with the 512 tokens of text.
    assert found[2] - found[1] == 4 * grid.tokens * (grid.tokens + 512) * model.width


def test_sparse_work_is_what_is_visited(wan: Any, render: Callable[..., torch.Tensor]) -> None:
    with counted([wan.transformer]) as dense:
        render(wan, steps=2)
    with (
        counted([wan.transformer]) as sparse,
        vidaccel.accelerate(wan, TopK(block=32), density=0.5, schedule=Schedule()) as run,
    ):
        render(wan, steps=2)
    report = run.report().data
    (plan,) = report["plans"]
    tokens, width = 7 * 8 * 8, 64
    layers = report["summary"]["sparse_layer_calls"]
    assert layers == 2 * 2 * len(wan.transformer.blocks)
    saved = layers * 4 * tokens**2 * (1 - plan["visited"]) * width
    assert dense.flops - sparse.flops == pytest.approx(saved)


def test_a_judge_sees_the_dense_run_and_leaves_no_mark(wan: Any, render: Callable[..., torch.Tensor]) -> None:
    candidates = [Candidate(TopK(block=32), density) for density in (0.9, 0.5, 0.2)]
    candidates += [Candidate(Radial(block=32), 0.4), Candidate(TopK(block=32), 0.0001)]
    judge = Judge(candidates, every=1)
    plain = render(wan)
    with (
        warnings.catch_warnings(),
        judge.watching([wan.transformer]),
        vidaccel.accelerate(wan, Everything(32), schedule=AtSteps(steps=(1, 3))) as run,
    ):
        warnings.simplefilter("ignore")
        seen = render(wan)
    torch.testing.assert_close(seen, plain, rtol=1e-3, atol=1e-4)
    assert not [note for note in run.report().data["notes"] if "did not run" in note]
    assert {name for call in run.trace.calls for name in call.kernels} == {"cpu"}
    rows = {row["key"]: row for row in judge.rows()}
    assert len(rows) == len(candidates)
    errors = [row["error"] for row in judge.rows()[:3]]
    assert 0 < errors[0] < errors[1] < errors[2] < 1
    # Two steps, the cond branch, every layer.
    assert len(judge.errors[candidates[0]]) == 2 * len(wan.transformer.blocks)
    refused = judge.rows()[-1]
    assert not refused["ok"]
    assert "0.0001" in refused["reason"]


def test_settled_leaves_out_what_only_first_calls_cost() -> None:
    def call(ms: float, forecast: bool) -> dict[str, Any]:
        kind = {"branch": "cond", "expert": None, "sparse_layers": 2, "dense_layers": 0}
        return {**kind, "forecast": forecast, "ms": ms}

    calls = [
        call(900.0, False),
        call(10.0, False),
        call(12.0, False),
        call(50.0, True),
        call(1.0, True),
        call(1.0, True),
    ]
    assert settled(calls) == pytest.approx((3 * 12 + 3 * 1) / 1e3)


def test_knobs_turn_one_at_a_time_and_back() -> None:
    recipe = Recipe(Radial(block=64), 0.4, Schedule(dense_steps=0.2), CGTaylor(threshold=0.2, warmup=3))
    faster = turns(recipe, True, 20)
    changed: dict[str, Any] = {name: (r.density, r.schedule.dense_steps, r.cache) for name, r in faster.items()}
    assert changed == {
        "threshold": (0.4, 0.2, CGTaylor(threshold=0.25, warmup=3)),
        "warmup": (0.4, 0.2, CGTaylor(threshold=0.2, warmup=2)),
        "density": (0.32, 0.2, recipe.cache),
        "dense_steps": (0.4, 0.15, recipe.cache),
    }
    for name, turned in faster.items():
        assert turns(turned, False, 20)[name].hash == recipe.hash
    assert turns(recipe, True, 20, 2)["dense_steps"].schedule.dense_steps == 0.1
    assert "warmup" not in turns(recipe, True, 20, 3)
    slower = turns(Recipe(cache=TaylorSeer(interval=2)), False, 20)
    assert slower == {"warmup": Recipe(cache=TaylorSeer(interval=2, warmup=2))}
    assert further(Recipe(cache=TaylorSeer(interval=3)), 2.0).cache == TaylorSeer(interval=6)
    both = pair(Recipe(Radial(), 0.4), Recipe(cache=CGTaylor(threshold=0.2)))
    assert (both.attention, both.density, both.cache) == (Radial(), 0.4, CGTaylor(threshold=0.2))
    assert describe(both).startswith("radial 0.4 (blocks of 128), cg-taylor (threshold 0.2")


def test_every_cache_begins_with_its_knobs_written_out() -> None:
    recipes = Space().cached("wan", 50)
    assert [recipe.cache.name for recipe in recipes if recipe.cache] == list(Space().caches)
    for recipe in recipes:
        assert turns(recipe, True, 50)
        assert Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(UsageError, match="radial"):
        Space(patterns=("raidal",))
    with pytest.raises(UsageError, match="no knob"):
        Space(caches=("replay",))


class Landscape:
    """Figures by a formula, so that the best recipe of all is known: what attention and cache lose adds up."""

    def __init__(self) -> None:
        self.job = ReadyJob("one", num_inference_steps=20)
        self.renders: list[tuple[str, str]] = []

    def measure(self, recipe: Recipe, prompt: str) -> dict[str, Any]:
        self.renders.append((recipe.hash, prompt))
        cache: Any = recipe.cache
        share = 1 - float(recipe.schedule.dense_steps) if recipe.density else 0.0
        figures = self.figures(recipe.density or 1.0, share, cache.threshold if cache else 0.0, prompt)
        return {"ok": True, "prompt": prompt, "hash": recipe.hash, "recipe": recipe.to_dict(), **figures}

    @staticmethod
    def figures(density: float, share: float, threshold: float, prompt: str) -> dict[str, Any]:
        loss = 1e-6 + 1e-4 * share * (1 / density**2 - 1) + 0.01 * threshold**2
        loss *= 1 if prompt == "one" else 1.3  # The second prompt is harder.
        speed = (1 + 4 * threshold) / (1 - 0.6 * share * (1 - density))
        return {"work_speedup": speed, "time_speedup": speed, "psnr": -10 * math.log10(loss), "ssim": 1 - loss}


BEGIN = [Recipe(Radial(), density, Schedule(dense_steps=0.2)) for density in (0.15, 0.25, 0.35, 0.5)]
CACHES = Space(caches=("cg-taylor",)).cached("wan", 20)


@pytest.mark.parametrize("target", ["psnr>=32", "ssim>=0.999", "3x"])
def test_a_search_comes_near_the_best_there_is(target: str) -> None:
    aim, trials = Aim(Goal.of(target)), Landscape()
    search = Search(cast(Trials, trials), ["one", "two"], aim, Effort(renders=40))
    winner = search.run(BEGIN, CACHES)
    assert winner is not None
    assert aim.reached(winner)
    assert winner["prompts"] == 2
    assert len({recipe for recipe, _ in trials.renders}) <= 40
    every = itertools.product(range(10, 91, 5), range(0, 19, 2), range(1, 100, 4))
    rows = [
        average([trials.figures(density / 100, 1 - dense / 20, threshold / 100, prompt) for prompt in ("one", "two")])
        for density, dense, threshold in every
    ]
    best = min((row for row in rows if aim.reached(row)), key=aim.rank)
    if aim.goal.what == "speedup":
        assert winner["psnr"] > best["psnr"] - 1.5
    else:
        assert winner["work_speedup"] > 0.85 * best["work_speedup"]
    front = search.front(search.tried)
    assert [row["psnr"] for row in front] == sorted(row["psnr"] for row in front)
    assert [row["work_speedup"] for row in front] == sorted((row["work_speedup"] for row in front), reverse=True)


def test_a_search_that_reaches_nothing_says_none() -> None:
    trials = Landscape()
    search = Search(cast(Trials, trials), ["one"], Aim(Goal.of("psnr>=90")), Effort(renders=7))
    assert search.run(BEGIN, CACHES) is None
    assert len(trials.renders) == 7
