"""The atlas of attention as a page and as a picture: a cell for each layer and head, by step."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import jinja2
from PIL import Image, ImageDraw, ImageFont

LOOKS = {
    "same_frame": "mass in the query's own frame",
    "same_place": "mass at the same place (one token around it) in other frames",
    "first_frame": "mass in the first frame",
    "text": "mass on text",
    "spread": "spread: exp(entropy) over the number of keys; 1 looks everywhere alike",
}
# Kinds of heads, as `lab.heads` names them.
COLOURS = {"local": "#3a78c9", "temporal": "#d9822b", "first frame": "#8e5bb5", "text": "#2e9e6b", "global": "#b9bec6"}
# Pixels of the picture: the key's line; of a panel, its least width, and the room around its maps.
_LINE, _LEAST, _WIDEST, _GAP, _LEFT, _TOP, _BOTTOM = 36, 420, 1000, 10, 62, 38, 34
_QUIET = "#667"

Rows = list[tuple[int, list[Any]]]
Maps = list[tuple[str, list[tuple[int, Rows]]]]

_HTML = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>attention atlas</title>
<style>
 body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
 table { border-collapse: collapse; margin: .5rem 0 1rem; } th, td { padding: .1rem .5rem; text-align: left; }
 .map { border-spacing: 1px; border-collapse: separate; } .map th { font-weight: 400; padding-right: 4px; }
 .map td, .map th { min-width: {{ cell }}px; height: {{ cell }}px; padding: 0; font-size: 10px; text-align: right; }
 .map caption { font-size: 12px; text-align: left; }
 .kind { white-space: nowrap; } .key { display: inline-block; width: 12px; height: 12px; margin: 0 .3rem 0 1rem; }
 .maps { display: flex; flex-wrap: wrap; gap: 1rem 2rem; overflow-x: auto; } pre, .wide { overflow-x: auto; }
 .panels { display: flex; flex-wrap: wrap; gap: 0 3rem; } section { max-width: 100%; }
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
<p>Heads are named by where they have most mass beyond chance; a head with less than 0.1 beyond it anywhere is global.
{% for kind in kinds %}<span class="kind"><span class="key" style="background: {{ colours[kind] }}"></span>{{ kind }}</span>
{% endfor %}</p>
<div class="panels"><section>
<h2>What heads look for</h2>
<div class="maps">{% for step, rows in kind_maps %}
<table class="map"><caption>step {{ step }}</caption>
 {% for layer, cells in rows %}
 <tr><th>{{ layer }}</th>{% for value in cells %}
 <td style="background: {{ colours[value] }}" title="step {{ step }}, layer {{ layer }}, head {{ loop.index0 }}: {{ value }}"></td>
 {% endfor %}</tr>
 {% endfor %}
</table>{% endfor %}</div>
</section>
{% for title, steps in maps %}
<section><h2>{{ title | capitalize }}</h2>
<div class="maps">{% for step, rows in steps %}
<table class="map"><caption>step {{ step }}</caption>
 {% for layer, cells in rows %}
 <tr><th>{{ layer }}</th>{% for value in cells %}
 <td style="background: hsl(215 60% {{ (96 - 66 * value) | round(1) }}%)" title="step {{ step }}, layer {{ layer }}, head {{ loop.index0 }}: {{ "%.3f" % value }}"></td>
 {% endfor %}</tr>
 {% endfor %}
</table>{% endfor %}</div>
</section>
{% endfor %}
</div>
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
        cell=_cell(data),
    )


def png(data: dict[str, Any]) -> bytes:
    """The same maps as one picture: a panel for each title, in it a map for each step."""
    maps: Maps = [("what heads look for", _kind_maps(data)), *_maps(data)]
    cell, (_, first) = _cell(data), maps[0][1][0]
    step_wide = cell * len(first[0][1]) + _LEFT
    wide = max(_LEAST, _GAP + step_wide * len(maps[0][1]))
    high = _TOP + cell * max(len(rows) for _, rows in maps[0][1]) + _BOTTOM
    columns = max(1, _WIDEST // wide)
    picture = Image.new("RGB", (columns * wide + _GAP, _LINE + -(-len(maps) // columns) * high), "white")
    draw = ImageDraw.Draw(picture)
    draw.font = ImageFont.load_default(12)
    _key(draw, _kinds(data))
    for number, (title, steps) in enumerate(maps):
        top, left = _LINE + number // columns * high, _GAP + number % columns * wide
        draw.text((left, top), title, fill="black")
        for step, rows in steps:
            _map(draw, left + _LEFT - _GAP, top + _TOP, f"step {step}", rows, cell)
            left += step_wide
    target = io.BytesIO()
    picture.quantize(64).save(target, "png", optimize=True)
    return target.getvalue()


def _key(draw: ImageDraw.ImageDraw, kinds: Sequence[str]) -> None:
    """What colours and shades mean."""
    left, shades = float(_GAP), {"0": 0.0, "0.5": 0.5, "1": 1.0}
    for name, value in {"heads:": None, **{kind: kind for kind in kinds}, "   mass:": None, **shades}.items():
        if value is not None:
            draw.rectangle((left, 8, left + 11, 19), fill=_fill(value), outline="#bbb")
            left += 15
        draw.text((left, 6), name, fill="black")
        left += draw.textlength(name) + _GAP


def _map(draw: ImageDraw.ImageDraw, left: int, top: int, title: str, rows: Rows, cell: int) -> None:
    """Layers down, heads across."""
    draw.text((left, top - 17), title, fill=_QUIET)
    ends = {0, len(rows) - 1}
    for y, (layer, cells) in enumerate(rows):
        if y in ends:
            draw.text((left - 5, top + (y + 0.5) * cell), f"layer {layer}", fill=_QUIET, anchor="rm")
        for x, value in enumerate(cells):
            corner = left + x * cell, top + y * cell
            draw.rectangle((*corner, corner[0] + cell - 2, corner[1] + cell - 2), fill=_fill(value))
    for x in {0, len(rows[0][1]) - 1}:
        draw.text((left + (x + 0.5) * cell, top + len(rows) * cell + 2), str(x), fill=_QUIET, anchor="ma")
    if len(rows[0][1]) > 1:
        draw.text((left - 5, top + len(rows) * cell + 2), "head", fill=_QUIET, anchor="ra")


def _cell(data: dict[str, Any]) -> int:
    """Pixels of a cell: few heads are shown large, forty on a page."""
    return 24 if len(data["rows"][0]["kind"]) <= 12 else 15


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
