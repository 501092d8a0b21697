"""Runs as one HTML page that needs nothing else: no script, no font, no address."""

from __future__ import annotations

import jinja2

from baton.bench.plots import plots
from baton.bench.result import Result
from baton.bench.table import rows

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>baton {{ result.kind }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
         color: #1a1a1a; background: #fff; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
  th, td { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
  th:first-child, td:first-child { text-align: left; }
  .scroll { overflow-x: auto; }
  svg { max-width: 100%; height: auto; }
  h2 { margin-top: 2.5rem; font-size: 1.1rem; }
</style>
</head>
<body>
<h1>baton {{ result.kind }}</h1>
<p>{{ result.created }}
{%- for name, version in result.versions.items() %}, {{ name }} {{ version }}{% endfor %}</p>
<p>Latencies count from when a request was due. A failed request is infinitely late in every percentile.</p>
<div class="scroll"><table>
<tr><th></th>{% for run in result.runs %}<th>{{ run.label }}</th>{% endfor %}</tr>
{% for name, values in rows -%}
<tr><td>{{ name }}</td>{% for value in values %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% for title, svg in plots.items() %}<h2>{{ title }}</h2>
<div class="scroll">{{ svg | safe }}</div>
{% endfor %}<h2>Settings</h2>
<table>
{% for name, value in result.settings.items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}</table>
</body>
</html>
"""


def page(result: Result) -> str:
    """The report of a result."""
    template = jinja2.Environment(autoescape=True).from_string(_PAGE)
    return template.render(result=result, rows=rows(result.runs), plots=plots(result.runs))
