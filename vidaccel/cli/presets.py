"""`vidaccel presets`: the recipes that come with vidaccel."""

from __future__ import annotations

from typing import Annotated

import typer

from .output import Format, FormatOption, Screen


def presets(
    name: Annotated[
        str | None, typer.Argument(help="Print this one as YAML, ready to be changed and given to --recipe.")
    ] = None,
    format: FormatOption = Format.human,
) -> None:
    """List the recipes that come with vidaccel, or print one."""
    from .. import recipe

    screen = Screen(format)
    if name is not None:
        found = recipe.Recipe.load(name)
        if not screen.json({"name": name, "hash": found.hash, **found.to_dict()}):
            typer.echo(found.to_yaml(), nl=False)
        return
    recipes = {each: recipe.Recipe.load(each) for each in recipe.presets()}
    if screen.json([{"name": each, "hash": r.hash, **r.to_dict()} for each, r in recipes.items()]) or screen.names(
        recipes
    ):
        return
    screen.table(
        [
            {
                "preset": each,
                "attention": r.attention.name if r.attention else None,
                "density": r.density,
                "dense steps": r.schedule.dense_steps,
                "dense layers": r.schedule.dense_layers,
                "evidence": r.evidence or "none",
                "for": r.about,
            }
            for each, r in recipes.items()
        ]
    )
