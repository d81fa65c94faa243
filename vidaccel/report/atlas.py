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
_CELL, _GAP, _TOP = 14, 10, 34

_HTML = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>attention atlas</title>
<style>
 body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
 table { border-collapse: collapse; margin: .5rem 0 1rem; } th, td { padding: .1rem .5rem; text-align: left; }
 .map td, .map th { padding: 0; min-width: 16px; height: 16px; font-size: 10px; text-align: center; }
 .maps { display: flex; flex-wrap: wrap; gap: 1rem; } pre { overflow: auto; }
</style>
<h1>Attention mass by layer and head</h1>
<p>{{ data.samples }} sampled queries a layer. A row is a layer, a column a head; 1 (dark) keeps everything.</p>
<table>
 <tr><th>pattern</th><th>density</th><th>mass kept</th><th>worst head</th></tr>
 {% for name, found in data.patterns.items() %}
 <tr><td>{{ name }}</td>{% if found.reason %}<td colspan="3">{{ found.reason }}</td>{% else %}
 <td>{{ "%.3f" % found.delivered }}</td><td>{{ "%.3f" % found.kept }}</td>
 <td>{{ "%.3f" % found.worst.kept }} in step {{ found.worst.step }}, layer {{ found.worst.layer }}, head {{ found.worst.head }}</td>
 {% endif %}</tr>
 {% endfor %}
</table>
{% for title, steps in maps %}
<h2>{{ title }}</h2>
<div class="maps">{% for step, rows in steps %}
<table class="map"><caption>step {{ step }}</caption>
 {% for layer, cells in rows %}
 <tr><th>{{ layer }}</th>{% for value in cells %}
 <td style="background: hsl(215 60% {{ (96 - 66 * value) | round(1) }}%)" title="step {{ step }}, layer {{ layer }}, head {{ loop.index0 }}: {{ "%.3f" % value }}"></td>
 {% endfor %}</tr>
 {% endfor %}
</table>{% endfor %}</div>
{% endfor %}
<h2>Run</h2>
<pre>{{ about }}</pre>
</html>
"""  # noqa: E501
)


def html(data: dict[str, Any]) -> str:
    """One self-contained page from `lab.explain.Atlas.data()`, with an `about` beside it."""
    return _HTML.render(data=data, maps=_maps(data), about=json.dumps(data.get("about"), indent=1))


def png(data: dict[str, Any]) -> bytes:
    """The same maps as one picture: a line of maps for each title, a map for each step."""
    maps = _maps(data)
    widths = [sum(_CELL * len(rows[0][1]) + _GAP for _, rows in steps) for _, steps in maps]
    heights = [_TOP + _CELL * max(len(rows) for _, rows in steps) for _, steps in maps]
    picture = Image.new("RGB", (max(420, *widths) + _GAP, sum(heights) + _GAP), "white")
    draw, top = ImageDraw.Draw(picture), 0
    for (title, steps), height in zip(maps, heights, strict=True):
        draw.text((_GAP, top + 6), f"{title} (steps {', '.join(str(step) for step, _ in steps)})", fill="black")
        left = _GAP
        for _, rows in steps:
            for y, (_, cells) in enumerate(rows):
                for x, value in enumerate(cells):
                    corner = left + x * _CELL, top + _TOP - 8 + y * _CELL
                    shade = tuple(int(255 - value * (255 - deep)) for deep in (20, 60, 140))
                    draw.rectangle((*corner, corner[0] + _CELL - 2, corner[1] + _CELL - 2), fill=shade)
            left += _CELL * len(rows[0][1]) + _GAP
        top += height
    target = io.BytesIO()
    picture.save(target, "png")
    return target.getvalue()


def _maps(data: dict[str, Any]) -> list[tuple[str, list[tuple[int, list[tuple[int, list[float]]]]]]]:
    """(title, [(step, [(layer, value of each head)])])."""
    steps = sorted({row["step"] for row in data["rows"]})
    judged = [name for name, found in data["patterns"].items() if "reason" not in found]
    shown = {f"mass that {name} keeps": ("kept", name) for name in judged}
    shown |= {title: (key, "") for key, title in LOOKS.items()}
    found = []
    for title, (key, name) in shown.items():
        rows = [(row["step"], row["layer"], row[key][name] if name else row[key]) for row in data["rows"]]
        # Text that is not there has no map.
        if max(max(cells) for _, _, cells in rows) > 0:
            found.append((title, [(s, [(layer, cells) for at, layer, cells in rows if at == s]) for s in steps]))
    return found
