"""Recipes: what to run, as data. Frozen, hashed, read from and written to YAML or JSON, merged and overridden by key.

    attention: {name: radial, block: 128}      # or just: radial
    density: 0.25
    schedule: {dense_steps: 0.24, dense_layers: 1}
    cache: {name: cg-taylor, threshold: 0.2}   # or just: cg-taylor

The keys below `attention` and `cache` are the fields of the pattern and of the caching policy, those below `schedule`
the fields of `Schedule`. A recipe is data: reading one never imports or runs anything.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, cast, get_type_hints

import yaml

from .caching import POLICIES, CachePolicy
from .errors import RecipeError
from .patterns import PATTERNS, Pattern, check_density
from .schedule import Schedule, check_schedule

# A recipe is a page of text; a larger file is something else, or an attempt to exhaust memory.
_MOST_BYTES = 64 * 1024


@dataclass(frozen=True)
class Recipe:
    """What to run.

    Attributes:
        attention: the pattern; None leaves attention alone.
        density: fraction of video-video pairs kept, in (0, 1]; None lets the pattern's own parameters decide.
        schedule: which steps and layers stay dense.
        cache: what is kept from step to step; None computes every step.
        about: what the recipe is for, in words.
        evidence: the report that justifies it; None where there is none, and then nobody should trust it blindly.
    """

    attention: Pattern | None = None
    density: float | None = None
    schedule: Schedule = field(default_factory=Schedule)
    cache: CachePolicy | None = None
    about: str = ""
    evidence: str | None = None

    def __post_init__(self) -> None:
        check_density(self.density)
        check_schedule(self.schedule)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Build a recipe from plain data.

        Raises:
            RecipeError: an unknown key, or a value of the wrong kind.
        """
        values = dict(_mapping(data, "a recipe"))
        _known(values, [f.name for f in fields(cls)], "a recipe")
        values["attention"] = pattern_from(values.get("attention"))
        values["cache"] = policy_from(values.get("cache"))
        values["schedule"] = _build(Schedule, values.get("schedule") or {}, "schedule")
        recipe: Recipe = _build(cls, values, "a recipe")
        return recipe

    @classmethod
    def load(cls, source: str | Path) -> Recipe:
        """Read a preset by its name, or a YAML or JSON file by its path.

        Raises:
            RecipeError: no such preset or file, or a file that is not a recipe.
        """
        path = Path(source)
        if path.suffix not in (".yaml", ".yml", ".json"):
            if str(source) not in presets():
                raise RecipeError(
                    f"recipe {str(source)!r} is neither a .yaml or .json file nor a preset; "
                    f"presets: {', '.join(presets())}"
                )
            return cls.from_text((_preset_folder() / f"{source}.yaml").read_text(encoding="utf-8"), str(source))
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise RecipeError(f"{path} has {path.stat().st_size} bytes; a recipe has at most {_MOST_BYTES}")
            return cls.from_text(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe {path} cannot be read: {error}") from None

    @classmethod
    def from_text(cls, text: str, where: str = "text") -> Recipe:
        """Read YAML (JSON is YAML too)."""
        try:
            # A few aliases of aliases are more values than any memory holds.
            if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=yaml.SafeLoader)):
                raise RecipeError(f"recipe {where} uses YAML anchors; write its values out")
            return cls.from_dict(yaml.safe_load(text) or {})
        except (yaml.YAMLError, RecursionError) as error:
            problem = str(error).splitlines()[0]
            raise RecipeError(f"recipe {where} is not plain YAML or JSON: {problem}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON and YAML; `from_dict` reads it back."""
        attention = (
            None if self.attention is None else {"name": self.attention.name, **asdict(cast(Any, self.attention))}
        )
        cache = None if self.cache is None else {"name": self.cache.name, **asdict(self.cache)}
        schedule = {f.name: _plain(getattr(self.schedule, f.name)) for f in fields(self.schedule)}
        return {
            "attention": attention,
            "density": self.density,
            "schedule": schedule,
            "cache": cache,
            "about": self.about,
            "evidence": self.evidence,
        }

    def to_yaml(self) -> str:
        """The recipe as a YAML file."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @property
    def hash(self) -> str:
        """12 hexadecimal digits that name what runs; words about it do not count."""
        data = {key: value for key, value in self.to_dict().items() if key not in ("about", "evidence")}
        if self.cache is None:
            del data["cache"]  # Recipes are older than these keys: without them their names stay what they were.
        else:
            data["cache"].pop("steps", None)  # Says where its numbers come from, and changes nothing that runs.
        if not self.schedule.even_if_slower:
            del data["schedule"]["even_if_slower"]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]

    def override(self, settings: Mapping[str, Any]) -> Recipe:
        """The recipe with single values changed by dotted keys, such as {"attention.block": 64, "density": 0.3}.

        Raises:
            RecipeError: a key that the recipe does not have.
        """
        data = self.to_dict()
        for key, value in settings.items():
            *parents, last = key.split(".")
            place: Any = data
            for name in parents:
                place = place.get(name) if isinstance(place, dict) else None
            if not isinstance(place, dict) or (
                last not in place and parents != ["schedule", "branch"] and parents != ["schedule", "expert"]
            ):
                raise RecipeError(f"{key!r} is not a setting of this recipe; it has {', '.join(_leaves(data))}")
            place[last] = value
        return Recipe.from_dict(data)._decided(settings)

    def merge(self, **changes: Any) -> Recipe:
        """The recipe with every field that is given and not None in place of its own."""
        given = {name: value for name, value in changes.items() if value is not None}
        return replace(self, **given)._decided(given)

    def _decided(self, given: Iterable[str]) -> Recipe:
        """What is given of density and the pattern's own knobs (a window, a decay) replaces the other of them.

        Where both were given, the pattern says so when it plans.
        """
        pattern, given = cast(Any, self.attention), set(given)
        knobs = [knob for knob in getattr(pattern, "knobs", ()) if getattr(pattern, knob) is not None]
        if self.density is None or not knobs:
            return self
        by_hand = bool(given & {"attention", *(f"attention.{knob}" for knob in knobs)})
        if "density" in given and not by_hand:
            return replace(self, attention=replace(pattern, **dict.fromkeys(knobs)))
        return replace(self, density=None) if by_hand and "density" not in given else self


def pattern_from(value: Any) -> Pattern | None:
    """A pattern from its name, from {"name": ..., fields...}, or itself.

    Raises:
        RecipeError: an unknown name or field.
    """
    if value is None or (not isinstance(value, (str, Mapping)) and hasattr(value, "plan")):
        return cast("Pattern | None", value)
    settings = {"name": value.strip()} if isinstance(value, str) else dict(_mapping(value, "attention"))
    name = settings.pop("name", None)
    if not isinstance(name, str) or name not in PATTERNS:
        raise RecipeError(f"attention pattern {name!r} is unknown; patterns: {', '.join(sorted(PATTERNS))}")
    return cast(Pattern, _build(PATTERNS[name], settings, f"attention {name}"))


def policy_from(value: Any) -> CachePolicy | None:
    """A caching policy from its name, from {"name": ..., fields...}, or itself.

    Raises:
        RecipeError: an unknown name or field.
    """
    if value is None or isinstance(value, CachePolicy):
        return value
    settings = {"name": value.strip()} if isinstance(value, str) else dict(_mapping(value, "cache"))
    name = settings.pop("name", None)
    if not isinstance(name, str) or name not in POLICIES:
        raise RecipeError(f"cache {name!r} is unknown; caches: {', '.join(sorted(POLICIES))}")
    return cast(CachePolicy, _build(POLICIES[name], settings, f"cache {name}"))


def presets() -> list[str]:
    """Names of the recipes that come with vidaccel."""
    return sorted(entry.name[: -len(".yaml")] for entry in _preset_folder().iterdir() if entry.name.endswith(".yaml"))


def _preset_folder() -> Any:
    return resources.files("vidaccel") / "presets"


def _build(cls: type[Any], settings: Any, what: str) -> Any:
    settings = dict(_mapping(settings, what))
    wanted = {f.name: f for f in fields(cls)}
    hints = get_type_hints(cls)
    _known(settings, wanted, what)
    for key, value in settings.items():
        settings[key] = tuple(value) if isinstance(value, list) else value
        kind = hints[key].__name__ if isinstance(hints[key], type) else str(hints[key]).replace("typing.", "")
        if not _fits(settings[key], kind):
            raise RecipeError(f"{what}: {key} is {value!r}; it takes {kind}")
    missing = [
        n for n, f in wanted.items() if n not in settings and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        part, _, name = what.partition(" ")
        how = (
            f"; give it in a recipe, {part}: {{name: {name}, {missing[0]}: ...}}, or with --set {part}.{missing[0]}=..."
        )
        raise RecipeError(f"{what} needs {', '.join(missing)}{how if part in ('attention', 'cache') else ''}")
    return cls(**settings)


def _fits(value: Any, annotation: str) -> bool:
    """A plain value against an annotation such as "float | None"; anything that is not plain is left to its class."""
    if value is None:
        return "None" in annotation
    kinds = {
        bool: ("bool",),
        int: ("int", "float"),
        float: ("float",),
        str: ("str", "Literal"),
        tuple: ("tuple",),
        dict: ("Mapping", "dict"),
    }
    # What stands in brackets is the kind of its parts: a number is no "tuple[int, ...]".
    outside = re.sub(r"\[.*?\]+", "", annotation)
    return type(value) not in kinds or any(kind in outside for kind in kinds[type(value)])


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise RecipeError(f"{what} is {value!r:.80}; it takes named values")
    return value


def _known(settings: Iterable[str], names: Iterable[str], what: str) -> None:
    names = list(names)
    for key in settings:
        if key not in names:
            raise RecipeError(f"{what} has no setting {key!r}; it has {', '.join(names)}")


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value


def _leaves(data: Mapping[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in data.items():
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [prefix + key]
    return found
