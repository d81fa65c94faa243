"""The atlas of attention as a page and as a picture: a cell for each layer and head, by step."""

from __future__ import annotations

import io
import json
from typing import Any

import jinja2
from PIL import Image, ImageDraw

LOOKS = {
    "same_frame": "mass in the query's own frame",
    "same_place": "mass at the same place (one token around it) in other frames",
    "first_frame": "mass in the first frame",
    "text": "mass on text",
    "spread": "spread: exp(entropy) over the number of keys; 1 looks everywhere alike",
}
# Kinds of heads, as `lab.heads` names them.
COLOURS = {"local": "#3a78c9", "temporal": "#d9822b", "first frame": "#8e5bb5", "text": "#2e9e6b", "global": "#b9bec6"}
_CELL, _GAP, _TOP = 14, 10, 34

Maps = list[tuple[str, list[tuple[int, list[tuple[int, list[Any]]]]]]]

_HTML = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>attention atlas</title>
<style>
 body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
 table { border-collapse: collapse; margin: .5rem 0 1rem; } th, td { padding: .1rem .5rem; text-align: left; }
 .map { border-spacing: 1px; border-collapse: separate; } .map th { font-weight: 400; padding-right: 4px; }
 .map td, .map th { min-width: {{ cell }}px; height: {{ cell }}px; padding: 0; font-size: 10px; text-align: right; }
 .map caption { font-size: 12px; text-align: left; }
 .key { display: inline-block; width: 12px; height: 12px; margin: 0 .3rem 0 1rem; }
 .maps { display: flex; flex-wrap: wrap; gap: 1rem 2rem; overflow-x: auto; } pre, .wide { overflow-x: auto; }
 h1 { font-size: 1.3rem; } h2 { font-size: 1.1rem; margin: 1.5rem 0 .3rem; }
</style>
<h1>Attention mass by layer and head</h1>
<p>{{ data.samples }} sampled queries a layer. In the maps a row is a layer, a column a head; 1 (dark) keeps everything.</p>
<div class="wide"><table>
 <tr><th>pattern</th><th>density</th><th>mass kept</th>{% for kind in kinds %}<th>in {{ kind }} heads</th>{% endfor %}</tr>
 {% for name, found in data.patterns.items() %}
 <tr><td>{{ name }}</td>{% if found.reason %}<td colspan="{{ 2 + kinds | length }}">{{ found.reason }}</td>{% else %}
 <td>{{ "%.3f" % found.delivered }}</td><td>{{ "%.3f" % found.kept }}</td>
 {% for kind in kinds %}<td>{{ "%.3f" % found.kept_by_kind[kind] if kind in found.kept_by_kind }}</td>{% endfor %}
 {% endif %}</tr>
 {% endfor %}
</table></div>
<h2>What heads look for</h2>
<p>Named by where they have most mass beyond chance; a head with less than 0.1 beyond it anywhere is global.
{% for kind in kinds %}<span class="key" style="background: {{ colours[kind] }}"></span>{{ kind }}{% endfor %}</p>
<div class="maps">{% for step, rows in kind_maps %}
<table class="map"><caption>step {{ step }}</caption>
 {% for layer, cells in rows %}
 <tr><th>{{ layer }}</th>{% for value in cells %}
 <td style="background: {{ colours[value] }}" title="step {{ step }}, layer {{ layer }}, head {{ loop.index0 }}: {{ value }}"></td>
 {% endfor %}</tr>
 {% endfor %}
</table>{% endfor %}</div>
{% for title, steps in maps %}
<h2>{{ title | capitalize }}</h2>
<div class="maps">{% for step, rows in steps %}
<table class="map"><caption>step {{ step }}</caption>
 {% for layer, cells in rows %}
 <tr><th>{{ layer }}</th>{% for value in cells %}
 <td style="background: hsl(215 60% {{ (96 - 66 * value) | round(1) }}%)" title="step {{ step }}, layer {{ layer }}, head {{ loop.index0 }}: {{ "%.3f" % value }}"></td>
 {% endfor %}</tr>
 {% endfor %}
</table>{% endfor %}</div>
{% endfor %}
<div class="maps">
{% for name, found in data.patterns.items() if found.losses %}
<section><h2>Where {{ name }} loses most</h2>
<table>
 <tr><th>step</th><th>layer</th><th>head</th><th>which is</th><th>mass kept</th></tr>
 {% for loss in found.losses %}
 <tr><td>{{ loss.step }}</td><td>{{ loss.layer }}</td><td>{{ loss.head }}</td><td>{{ loss.kind }}</td>
 <td>{{ "%.3f" % loss.kept }}</td></tr>
 {% endfor %}
</table></section>
{% endfor %}
</div>
{% for title, sentences in (data.why or {}).items() if sentences %}
<h2>Why this {{ title }}</h2>
<ul>{% for sentence in sentences %}<li>{{ sentence }}</li>{% endfor %}</ul>
{% endfor %}
<h2>Settings</h2>
<pre>{{ about }}</pre>
</html>
"""  # noqa: E501
)


def html(data: dict[str, Any]) -> str:
    """One self-contained page from `lab.explain.Atlas.data()`, "why" and "about" beside it where they are known."""
    return _HTML.render(
        data=data,
        kinds=_kinds(data),
        colours=COLOURS,
        kind_maps=_kind_maps(data),
        maps=_maps(data),
        about=json.dumps(data.get("about"), indent=1),
        # Few heads are shown large, forty on a page.
        cell=24 if len(data["rows"][0]["kind"]) <= 12 else 15,
    )


def png(data: dict[str, Any]) -> bytes:
    """The same maps as one picture: a line of maps for each title, a map for each step."""
    kinds = _kinds(data)
    maps: Maps = [("what heads look for", _kind_maps(data)), *_maps(data)]
    widths = [sum(_CELL * len(rows[0][1]) + _GAP for _, rows in steps) for _, steps in maps]
    heights = [_TOP + _CELL * max(len(rows) for _, rows in steps) for _, steps in maps]
    picture = Image.new("RGB", (max(420, *widths) + _GAP, sum(heights) + _GAP), "white")
    draw, top = ImageDraw.Draw(picture), 0
    for number, ((title, steps), height) in enumerate(zip(maps, heights, strict=True)):
        text = f"{title} (steps {', '.join(str(step) for step, _ in steps)})"
        draw.text((_GAP, top + 6), text, fill="black")
        left = _GAP + draw.textlength(text) + _GAP
        for kind in kinds if number == 0 else ():
            draw.rectangle((left, top + 7, left + 9, top + 16), fill=COLOURS[kind])
            draw.text((left + 12, top + 6), kind, fill="black")
            left += 12 + draw.textlength(kind) + _GAP
        left = _GAP
        for _, rows in steps:
            for y, (_, cells) in enumerate(rows):
                for x, value in enumerate(cells):
                    corner = left + x * _CELL, top + _TOP - 8 + y * _CELL
                    draw.rectangle((*corner, corner[0] + _CELL - 2, corner[1] + _CELL - 2), fill=_fill(value))
            left += _CELL * len(rows[0][1]) + _GAP
        top += height
    target = io.BytesIO()
    picture.save(target, "png", optimize=True)
    return target.getvalue()


def _fill(value: float | str) -> Any:
    """A kind's colour, or a shade for a share."""
    if isinstance(value, str):
        return COLOURS[value]
    return tuple(int(255 - value * (255 - deep)) for deep in (20, 60, 140))


def _kinds(data: dict[str, Any]) -> list[str]:
    """Those that there are."""
    there = {kind for row in data["rows"] for kind in row["kind"]}
    return [kind for kind in COLOURS if kind in there]


def _kind_maps(data: dict[str, Any]) -> list[tuple[int, list[tuple[int, list[str]]]]]:
    """[(step, [(layer, kind of each head)])]."""
    steps = sorted({row["step"] for row in data["rows"]})
    return [(step, [(row["layer"], row["kind"]) for row in data["rows"] if row["step"] == step]) for step in steps]


def _maps(data: dict[str, Any]) -> Maps:
    """(title, [(step, [(layer, value of each head)])])."""
    steps = sorted({row["step"] for row in data["rows"]})
    judged = [name for name, found in data["patterns"].items() if "reason" not in found]
    shown = {f"mass that {name} keeps": ("kept", name) for name in judged}
    shown |= {title: (key, "") for key, title in LOOKS.items()}
    found: Maps = []
    for title, (key, name) in shown.items():
        rows = [(row["step"], row["layer"], row[key][name] if name else row[key]) for row in data["rows"]]
        # Text that is not there has no map.
        if max(max(cells) for _, _, cells in rows) > 0:
            found.append((title, [(s, [(layer, cells) for at, layer, cells in rows if at == s]) for s in steps]))
    return found
