"""A recipe from command-line options."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from ..api import DEFAULT_SCHEDULE
from ..caching import CachePolicy
from ..caching.calibration import calibrated
from ..errors import UsageError, VidaccelError
from ..patterns import PATTERNS, Pattern
from ..recipe import Recipe, pattern_from, policy_from, presets
from ..render import DENSE, Model

T = TypeVar("T")


def build_recipe(
    model: Model,
    *,
    recipe: str | None = None,
    attention: str | None = None,
    density: float | None = None,
    cache: str | None = None,
    schedule: Mapping[str, str | None] | None = None,
    settings: Sequence[str] = (),
) -> Recipe:
    """The recipe that a command's options describe; the later of these wins: preset or file, options, `--set`.

    A sample model starts from the preset of its own name, because patterns made for large videos do not fit its size.

    Raises:
        UsageError: options that do not go together, or cannot be read.
        RecipeError: an unknown pattern, preset or setting.
        PatternError: a density outside (0, 1].
    """
    cache = calibrated(cache, model.index["transformer"][1], model.transformer, model.experts, model.reference)
    of_cache = all(setting.startswith("cache.") for setting in settings)
    if attention == "dense":
        if recipe or density not in (None, 1) or not of_cache or any((schedule or {}).values()):
            raise UsageError(
                "attention dense leaves nothing for density, schedule, --set (but of the cache) or a recipe to decide; "
                "drop them"
            )
        values = scalars(settings)
        policy = guard("--set", lambda: _policy(cache, values))
        return guard("--set", lambda: _override(DENSE.merge(cache=policy), values))
    own = model.reference if model.kind == "sample" and model.reference in presets() else None
    sparse = attention or density is not None or any((schedule or {}).values()) or not of_cache
    if recipe or own:
        name = cast(str, recipe or own)
        base = guard(f"recipe {name}", lambda: Recipe.load(name))
    elif not sparse:
        base = DENSE
    elif attention is None:
        raise UsageError("no attention pattern was named; add --attention, such as --attention radial, or a --recipe")
    else:
        base = Recipe(schedule=DEFAULT_SCHEDULE)
    values = {
        f"schedule.{name}": _schedule_value(name, value)
        for name, value in (schedule or {}).items()
        if value is not None
    }
    values |= scalars(settings)
    values |= {} if density is None else {"density": density}
    base = base.merge(cache=guard("--set", lambda: _policy(cache, values)))
    if attention and not (base.attention and base.attention.name == attention):
        base = guard("--set", lambda: _renamed(base, attention, values))
    return guard("--set", lambda: _override(base, values))


def _policy(cache: Any, values: dict[str, Any]) -> CachePolicy | None:
    """The policy that was named, built with the values that are its own; these are taken out of `values`."""
    if cache is None:
        return None
    mine = {key.partition(".")[2]: values.pop(key) for key in list(values) if key.startswith("cache.")}
    return policy_from({**({"name": cache} if isinstance(cache, str) else cache), **mine})


def _renamed(recipe: Recipe, attention: str, values: dict[str, Any]) -> Recipe:
    """The recipe with another pattern, built from the values that are its own; these are taken out of `values`.

    A density that stands beside them goes with them, so that what was given by hand decides together.
    """
    mine = {key.partition(".")[2]: values.pop(key) for key in list(values) if key.startswith("attention.")}
    pattern = load_pattern(attention, mine) if ":" in attention else pattern_from({"name": attention, **mine})
    return recipe.merge(attention=pattern, density=values.pop("density") if values.get("density") else None)


def guard(where: str, read: Callable[[], T]) -> T:
    """Read or plan a recipe that somebody else may have written: whatever is wrong in it becomes an error in one line.

    Raises:
        UsageError: values of a kind that no recipe has.
    """
    try:
        return read()
    except VidaccelError:
        raise
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UsageError(f"{where} holds values that no recipe has: {type(error).__name__}: {error}") from None


def read_factor(text: str | None) -> int | None:
    """2 from "2x" or "2"; None from None.

    Raises:
        UsageError: anything else.
    """
    if text is None:
        return None
    number = text.strip().lower().removesuffix("x")
    if not number.isdecimal() or int(number) not in (2, 3, 4):
        raise UsageError(f"--upscale {text} was asked for; give 2x, 3x or 4x")
    return int(number)


def load_pattern(name: str, values: Mapping[str, Any] | None = None) -> Pattern:
    """A pattern of the user's own, `module:Class`, with these fields. Only for names that were typed by the user."""
    module, _, attribute = name.partition(":")
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise UsageError(
            f"attention {name} could not be imported from here: {type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.remove(folder)
    if not (isinstance(cls, type) and is_dataclass(cls) and all(hasattr(cls, part) for part in ("name", "plan"))):
        raise UsageError(
            f"attention {name} is not a pattern: a frozen dataclass with `name`, `per_site`, `block` and `plan`"
        )
    names = [f.name for f in fields(cls)]
    if unknown := sorted(set(values or {}) - set(names)):
        raise UsageError(f"'attention.{unknown[0]}' is not a setting of {name}; it has {', '.join(names)}")
    try:
        return cast(Pattern, cls(**(values or {})))
    except TypeError as error:
        raise UsageError(f"attention {name} could not be built: {error}") from None


def _override(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    pattern = recipe.attention
    if not values or pattern is None or type(pattern) in PATTERNS.values():
        return recipe.override(values) if values else recipe
    # A pattern of the user's own has no place in the table of names, by which recipes are read.
    return replace(replace(recipe, attention=None).override(values), attention=pattern)


def _schedule_value(name: str, text: str) -> Any:
    try:
        if name == "dense_layers" and "," in text:
            return [int(part) for part in text.split(",")]
        return float(text) if "." in text and name != "dense_layers" else int(text)
    except ValueError:
        kind = "a count, or numbers such as 0,1,-1" if name == "dense_layers" else "a count, or a fraction such as 0.25"
        raise UsageError(f"--{name.replace('_', '-')} {text!r} is not {kind}") from None


def scalars(settings: Sequence[str]) -> dict[str, Any]:
    """Values of "key=value" settings.

    Raises:
        UsageError: a setting of another form.
    """
    found: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting} is not key=value, such as --set attention.block=64")
        found[key.strip()] = _scalar(key, text)
    return found


def _scalar(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"--set {key}={text}: the value is not plain YAML") from None
