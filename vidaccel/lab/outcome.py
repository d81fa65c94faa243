"""What a search leaves behind: a recipe that `render --recipe` reads, the Pareto list, and a page that shows both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..files import replacing
from ..recipe import Recipe
from .rows import rounded
from .trials import Row, describe
from .tune import Aim

SCHEMA = 1


@dataclass(frozen=True)
class Outcome:
    """The end of a search.

    Attributes:
        aim: what was wanted.
        setting: model, size, steps and machine, in words.
        command: what makes it again.
        winner: figures over the tuning prompts, with "recipe" and "hash"; None where nothing reached the goal.
        pareto: rows of the first prompt that no other beats in both.
        check: from `checked`, where there were prompts to check on.
    """

    aim: Aim
    setting: str
    command: str
    winner: Row | None
    pareto: Sequence[Row]
    check: dict[str, Any] | None

    @property
    def recipe(self) -> Recipe:
        """The winner, with what it is for and what justifies it."""
        assert self.winner is not None
        found = Recipe.from_dict(self.winner["recipe"])
        held = (self.check or {}).get("means", {}).get("tuned")
        said = f"Tuned for {self.aim.goal} on {self.setting}: {_figures(self.winner)} on the prompts it was tuned on"
        said += f"; {_figures(held)} on {held['prompts']} others" if held else ""
        return replace(found, about=said + ".", evidence="evidence.json beside this file")

    def data(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {
            "schema": SCHEMA,
            "goal": str(self.aim.goal),
            "speed_by": self.aim.by,
            "setting": self.setting,
            "command": self.command,
            "winner": self.winner,
            "pareto": list(self.pareto),
            "check": self.check,
        }

    def save(self, folder: Path) -> list[Path]:
        """Write recipe.yaml (where there is a winner), result.json and report.md. Returns the files."""
        texts = {"result.json": json.dumps(rounded(self.data()), indent=1) + "\n", "report.md": self.markdown()}
        if self.winner is not None:
            texts = {"recipe.yaml": self.recipe.to_yaml(), **texts}
        for name, text in texts.items():
            with replacing(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return [folder / name for name in texts]

    def markdown(self) -> str:
        """A page for people."""
        lines = [f"# {self.aim.goal} on {self.setting}", ""]
        if self.winner is None:
            lines += ["No recipe that was tried reaches the goal on all tuning prompts.", ""]
        else:
            lines += [f"**{describe(self.recipe)}**", "", f"    {self.command}", ""]
        if self.check:
            lines += [
                "## On prompts that nothing was tuned on",
                "",
                *_table(_checked(self.check)),
                "",
                *_ahead(self.check),
            ]
        lines += ["## Best for each speed, first prompt", "", *_table([_cells(row) for row in self.pareto]), ""]
        return "\n".join([*lines, *_NOTES])


_NOTES = (
    "Work: floating-point operations of matrix products and attention that ran. Time: of the transformer's calls, what",
    "only first calls cost left out. PSNR and SSIM: against the dense video of the same prompt and seed.",
    "`evidence.json` has every render.",
    "",
)


def _checked(check: dict[str, Any]) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for name, means in check["means"].items():
        found.append({"recipe": name} | _numbers(means) | {"worst dB": f"{means['psnr_worst']:.1f}"})
    return found


def _ahead(check: dict[str, Any]) -> list[str]:
    """On how many of the prompts the result wins, prompt by prompt, against each recipe that it is to beat."""
    tuned = check["rows"].get("tuned", [])
    found = []
    for name in check["means"].keys() - {"tuned"}:
        pairs = list(zip(tuned, check["rows"][name], strict=False))
        won = sum(
            ours["ok"] and (not theirs["ok"] or all(ours[key] > theirs[key] for key in ("work_speedup", "psnr")))
            for ours, theirs in pairs
        )
        if pairs:
            found += [
                f"Less work than {name} and nearer to the dense video, both at once: {won} of {len(pairs)} prompts.",
                "",
            ]
    return found


def _cells(row: Row) -> dict[str, object]:
    return {"recipe": describe(Recipe.from_dict(row["recipe"]))} | _numbers(row)


def _numbers(row: Row) -> dict[str, object]:
    return {
        "times less work": f"{row['work_speedup']:.2f}",
        "times faster": f"{row['time_speedup']:.2f}",
        "dB": f"{row['psnr']:.1f}",
        "SSIM": f"{row['ssim']:.3f}",
        "motion": "" if row.get("motion") is None else f"{row['motion']:.2f}",
    }


def _table(rows: Sequence[dict[str, object]]) -> list[str]:
    if not rows:
        return ["Nothing ran."]
    head = list(rows[0])
    return [f"| {' | '.join(map(str, cells))} |" for cells in (head, ["---"] * len(head), *(r.values() for r in rows))]


def _figures(row: Row) -> str:
    speed = f"{row['work_speedup']:.2f} times less work, {row['time_speedup']:.2f} times faster"
    return f"{speed}, {row['psnr']:.1f} dB, SSIM {row['ssim']:.3f}"
