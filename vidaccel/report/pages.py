"""The report as pages, from nothing but its data."""

from __future__ import annotations

import json
from typing import Any

import jinja2
from markupsafe import Markup

from . import plots

_HTML = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>vidaccel report</title>
<style>
 body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
 table { border-collapse: collapse; margin: 1rem 0; }
 th, td { border: 1px solid #8886; padding: .2rem .6rem; text-align: left; }
 pre { background: #8881; padding: 1rem; overflow: auto; }
 .plot { display: block; width: 100%; max-width: 40rem; font-size: 12px; } .plot text { fill: currentColor; }
 .plot .axis, .plot .name { text-anchor: end; } .plot polyline { fill: none; stroke: #36c; stroke-width: 1.5; }
 .plot circle { fill: #36c; }
</style>
<h1>{{ data.pipeline }}, recipe {{ data.recipe_hash }}</h1>
{{ plots }}
{% for title, rows in tables %}
<h2>{{ title }}</h2>
<table>
 <tr>{% for key in rows[0] %}<th>{{ key }}</th>{% endfor %}</tr>
 {% for row in rows %}
 <tr>{% for value in row.values() %}<td>{{ value }}</td>{% endfor %}</tr>
 {% endfor %}
</table>
{% endfor %}
<h2>Notes</h2>
<ul>{% for note in data.notes %}<li>{{ note }}</li>{% else %}<li>none</li>{% endfor %}</ul>
<h2>Recipe</h2>
<pre>{{ recipe }}</pre>
<h2>Environment</h2>
<pre>{{ environment }}</pre>
</html>
"""
)


def markdown(data: dict[str, Any]) -> str:
    """A page that pastes into a pull request or a model card."""
    lines = [f"# {data['pipeline']}, recipe {data['recipe_hash']}"]
    for title, rows in _tables(data):
        head = list(rows[0])
        lines += ["", f"## {title}", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        lines += [f"| {' | '.join(str(value) for value in row.values())} |" for row in rows]
    lines += ["", "## Notes", "", *(f"- {note}" for note in data["notes"] or ["none"])]
    lines += ["", "## Recipe and environment", "", "```json"]
    lines += [json.dumps({"recipe": data["recipe"], **data["environment"]}, indent=1), "```", ""]
    return "\n".join(lines)


def html(data: dict[str, Any]) -> str:
    """One self-contained page."""
    recipe, environment = (json.dumps(data[key], indent=1) for key in ("recipe", "environment"))
    drawn = Markup("\n").join(plots.steps({"": data["calls"]}))
    return _HTML.render(data=data, plots=drawn, tables=_tables(data), recipe=recipe, environment=environment)


def _tables(data: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    summary = [{"what": key.replace("_", " "), "value": _short(value)} for key, value in data["summary"].items()]
    plans = [{key: _short(value) for key, value in plan.items() if key != "notes"} for plan in data["plans"]]
    lost = [{"what": key.replace("_", " "), "value": _short(value)} for key, value in _lost(data).items()]
    calls = [{key: _short(value) for key, value in call.items()} for call in data["calls"]]
    titles = ("Summary", "Quality against the reference", "Plans", "Calls")
    return [(title, rows) for title, rows in zip(titles, (summary, lost, plans, calls), strict=True) if rows]


def _lost(data: dict[str, Any]) -> dict[str, Any]:
    quality = data.get("quality")
    return {} if quality is None else {**quality["mean"], "broken_frames": len(quality["broken_frames"])}


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, dict)):
        return (
            ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else ", ".join(map(str, value))
        )
    return "" if value is None else value
