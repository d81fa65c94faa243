"""Finds the fastest recipe for a quality, or the best for a speed: cheap tests first, full renders for what is left.

Idea: (1) one dense run judges every pattern at every density by the error of attention's output (`judge.py`). (2) The
    best of each density render one prompt, and so does every cache, its threshold doubled or halved towards the goal.
    (3) Pairs of both are foreseen from these, and those that promise to beat all are rendered. (4) From the best, and
    from the nearest miss, knobs are turned one at a time while that helps. (5) What is best on one prompt must hold on
    the mean of all tuning prompts. (6) The winner, and the recipe that it is to beat, render prompts that it was not
    tuned on.
Math: errors of attention and of a cache are taken for independent, so their powers add: with losses 10^(-PSNR/10), or
    1 - SSIM, loss(a + c) = loss(a) + loss(c); speed-ups multiply.
Cost: counted in renders of one prompt, `Effort.renders`; everything is kept, and goes on where it was stopped.
Limits: likeness to the dense video is what is searched for; a video that differs and is as good counts as lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..caching.goal import Goal
from ..recipe import Recipe
from .candidates import Space, further, pair, turns
from .explain import AtSteps, Everything
from .judge import Candidate, Judge
from .trials import Row, Trials, average

_MOST_VISITED = 1.3


@dataclass(frozen=True)
class Effort:
    """How much to spend.

    Attributes:
        renders: of the first prompt.
        doublings: of a cache's threshold, before it is paired.
        pairs: of attention and cache that are rendered before knobs are turned.
        finalists: recipes that may render all tuning prompts, one after the other.
    """

    renders: int = 40
    doublings: int = 2
    pairs: int = 4
    finalists: int = 4


@dataclass(frozen=True)
class Aim:
    """What is wanted, and how speed is judged.

    Attributes:
        goal: the limit.
        by: "work" that was counted, or "time" that was measured.
        margin: by which factor the goal must be more than reached.
    """

    goal: Goal
    by: str = "work"
    margin: float = 1.0

    def speed(self, row: Row) -> float:
        """How many times less work or time."""
        return float(row[f"{self.by}_speedup"])

    def loss(self, row: Row) -> float:
        """How unlike the dense video, from 0."""
        return 1 - row["ssim"] if self.goal.what == "ssim" else float(10 ** (-row["psnr"] / 10))

    def short(self, speed: float, loss: float) -> float:
        """By which factor the goal is missed; at most 1 where it is reached."""
        if self.goal.what == "speedup":
            return self.margin * self.goal.least / speed
        least = self.goal.least
        return self.margin * loss / (1 - least if self.goal.what == "ssim" else 10 ** (-least / 10))

    def missed(self, row: Row) -> float:
        """`short` of a row."""
        return self.short(self.speed(row), self.loss(row))

    def reached(self, row: Row) -> bool:
        """Whether a row meets the goal."""
        return self.missed(row) <= 1

    def wants_speed(self, row: Row) -> bool:
        """Which way to go from a row: towards speed, or towards quality."""
        return self.reached(row) != (self.goal.what == "speedup")

    def cost(self, speed: float, loss: float) -> tuple[float, float]:
        """What to make small: the goal first, as far as it is missed, then the other of quality and speed."""
        return max(1.0, self.short(speed, loss)), loss if self.goal.what == "speedup" else 1 / speed

    def rank(self, row: Row) -> tuple[float, float]:
        """`cost` of a row."""
        return self.cost(self.speed(row), self.loss(row))


class Search:
    """One search.

    Args:
        trials: measures.
        prompts: to tune on; the first of them serves for everything but the last choice.
        aim: what is wanted.
        effort: how much to spend.

    Attributes:
        tried: rows of the first prompt.
    """

    def __init__(self, trials: Trials, prompts: Sequence[str], aim: Aim, effort: Effort) -> None:
        self.trials = trials
        self.aim = aim
        self.effort = effort
        self._prompts = list(prompts)
        self.tried: list[Row] = []

    def run(self, begin: Sequence[Recipe], caches: Sequence[Recipe]) -> Row | None:
        """Search.

        Args:
            begin: recipes to begin with: those of `judged`, the preset that is to be beaten.
            caches: caches alone, likewise.

        Returns:
            Figures of the winner over all tuning prompts, with "recipe" and "hash"; None where nothing reached it.
        """
        for recipe in begin:
            self._try(recipe)
        for recipe in caches:
            self._cross(recipe)
        for recipe in self._pairs():
            self._try(recipe)
        return self._confirmed() if self.tried else None

    def front(self, rows: Sequence[Row]) -> list[Row]:
        """Rows that no other beats in both quality and speed, fastest first."""
        found: list[Row] = []
        for row in sorted(rows, key=lambda row: (-self.aim.speed(row), self.aim.loss(row))):
            if not found or self.aim.loss(row) < self.aim.loss(found[-1]):
                found.append(row)
        return found

    def _try(self, recipe: Recipe) -> Row | None:
        """Figures on the first prompt; None where they fail, or the effort is spent."""
        known = next((row for row in self.tried if row["hash"] == recipe.hash), None)
        if known is not None:
            return known
        if len(self.tried) >= self.effort.renders:
            return None
        row = self.trials.measure(recipe, self._prompts[0])
        if not row["ok"]:
            return None
        row = {**row, "recipe": recipe.to_dict()}
        self.tried.append(row)
        return row

    def _cross(self, recipe: Recipe) -> None:
        """Double a cache's threshold, or halve it, until the goal lies between two of its rows; at most so often."""
        row = self._try(recipe)
        for _ in range(self.effort.doublings):
            if row is None:
                return
            faster = self.aim.wants_speed(row)
            recipe = further(recipe, 2.0 if faster else 0.5)
            row = self._try(recipe)
            if row is not None and self.aim.wants_speed(row) != faster:
                return

    def _alone(self, part: str) -> list[Row]:
        other = "attention" if part == "cache" else "cache"
        return [row for row in self.tried if row["recipe"][part] and not row["recipe"][other]]

    def _pairs(self) -> list[Recipe]:
        """The pairs that promise most, where they promise more than what is there."""
        foreseen, best = [], min((self.aim.rank(row) for row in self.tried), default=(float("inf"), 0.0))
        for one in self._alone("attention"):
            for other in self._alone("cache"):
                speed, loss = self.aim.speed(one) * self.aim.speed(other), self.aim.loss(one) + self.aim.loss(other)
                both = pair(Recipe.from_dict(one["recipe"]), Recipe.from_dict(other["recipe"]))
                foreseen.append((self.aim.cost(speed, loss), both))
        promising = sorted((each for each in foreseen if each[0] < best), key=lambda each: each[0])
        return [recipe for _, recipe in promising[: self.effort.pairs]]

    def _climb(self, aim: Aim) -> None:
        """Turn knobs one at a time, on both sides of the goal, until that helps no more."""
        turned: set[str] = set()
        while rows := [row for row in self._beside(aim) if row["hash"] not in turned]:
            for row in rows:
                turned.add(row["hash"])
                self._turn(row, faster=aim.wants_speed(row))

    def _turn(self, row: Row, faster: bool) -> None:
        """Turn each knob; a threshold where nothing changes further: few steps leave a gate few choices."""
        recipe, steps = Recipe.from_dict(row["recipe"]), self.trials.job.num_inference_steps
        for knob in turns(recipe, faster, steps):
            for times in (1, 2, 4, 8) if knob == "threshold" else (1,):
                changed = turns(recipe, faster, steps, times).get(knob)
                found = None if changed is None else self._try(changed)
                if found is None or any(found[name] != row[name] for name in ("psnr", "work_speedup")):
                    break

    def _beside(self, aim: Aim) -> list[Row]:
        """The best row, and the nearest miss that would be better than it, did it reach the goal."""
        best = min(self.tried, key=aim.rank)
        misses = [row for row in self.tried if not aim.reached(row) and aim.rank(row)[1] < aim.rank(best)[1]]
        return [best, *sorted(misses, key=aim.missed)[:1]]

    def _confirmed(self) -> Row | None:
        """The best recipe that reaches the goal on the mean of all tuning prompts.

        Where they are harder than the first one, it must be better on that by as much, and the search goes on.
        """
        aim = self.aim
        for _ in range(self.effort.finalists):
            self._climb(aim)
            row = min(self.tried, key=aim.rank)
            if not aim.reached(row):
                return None
            recipe = Recipe.from_dict(row["recipe"])
            rows = [found for prompt in self._prompts if (found := self.trials.measure(recipe, prompt))["ok"]]
            figures = average(rows)
            if len(rows) == len(self._prompts) and self.aim.reached(figures):
                return figures | {"recipe": row["recipe"], "hash": row["hash"]}
            aim = replace(aim, margin=max(1.01 * aim.margin, self.aim.missed(figures) / self.aim.missed(row)))
        return None


def judged(trials: Trials, space: Space, prompt: str) -> list[Candidate]:
    """At each density, the pattern whose attention comes nearest to the dense one, on one dense run."""
    candidates, rows = space.attention(), trials.rows
    judge = Judge(candidates)
    if any(rows.find(row["key"]) is None for row in judge.rows()):
        steps = trials.job.num_inference_steps
        # Early steps stay dense in every recipe.
        looked = AtSteps(steps=tuple(sorted({steps * 35 // 100, steps * 3 // 4})))
        with judge.watching(trials.transformers):
            trials.render(Recipe(attention=Everything(), schedule=looked), prompt)
        for row in judge.rows():
            if rows.find(row["key"]) is None:
                rows.add(row)
    best: dict[float, tuple[float, Candidate]] = {}
    for candidate, row in zip(candidates, judge.rows(), strict=True):
        found = rows.find(row["key"])
        # What visits much more than was asked for is fast in name only.
        if found is not None and found["ok"] and found["visited"] < _MOST_VISITED * candidate.density:
            score = found["error"] * found["visited"] / candidate.density
            if candidate.density not in best or score < best[candidate.density][0]:
                best[candidate.density] = score, candidate
    return [candidate for _, candidate in best.values()]


def checked(trials: Trials, prompts: Sequence[str], recipes: dict[str, Recipe]) -> dict[str, Any]:
    """Recipes on prompts that none was tuned on, prompt by prompt beside each other.

    Args:
        trials: measures.
        prompts: the prompts.
        recipes: by name.

    Returns:
        Means by name, and every prompt's figures.
    """
    rows: dict[str, list[Row]] = {name: [] for name in recipes}
    for prompt in prompts:
        for name, recipe in recipes.items():
            rows[name].append(trials.measure(recipe, prompt))
    good = {name: [row for row in found if row["ok"]] for name, found in rows.items()}
    return {
        "prompts": list(prompts),
        "means": {name: average(found) for name, found in good.items() if found},
        "rows": {
            name: [{k: v for k, v in row.items() if k != "recipe"} for row in found] for name, found in rows.items()
        },
    }
