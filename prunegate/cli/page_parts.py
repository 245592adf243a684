"""The pieces of the page: its style and script, tables that sort, curves as pictures with a text beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

__all__ = ["SCRIPT", "STYLE", "line_chart", "table"]

STYLE = """
:root { --ink: #1c2733; --soft: #5b6b7a; --paper: #fff; --line: #d9dee3; --a: #2f6f9f; --b: #b8472f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6ebf0; --soft: #a0aebb; --paper: #14191f; --line: #37424d; --a: #6fb1e0; --b: #f08a70; }
}
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: auto; padding: 1rem; }
h2 { margin-top: 2rem; font-size: 1.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid var(--line); text-align: left; }
td.number, th.number { text-align: right; white-space: nowrap; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--a); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
tbody tr:hover { background: color-mix(in srgb, var(--a) 12%, transparent); }
.bar { width: 12rem; height: 0.8rem; display: block; }
.gone { fill: var(--line); } .kept { fill: var(--a); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { color: var(--soft); font-size: 0.85rem; }
.chart { width: 100%; height: auto; } .chart text { fill: var(--soft); font-size: 11px; }
.chart path { fill: none; stroke-width: 2; } .axis { stroke: var(--line); }
.s0 { stroke: var(--b); } .s1 { stroke: var(--a); } .key0 { color: var(--b); } .key1 { color: var(--a); }
"""

SCRIPT = """
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, body = head.closest("table").tBodies[0], at = head.cellIndex;
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = row => {
      const text = row.cells[at].textContent.trim(), number = parseFloat(text.replace(/[,%]/g, ""));
      return head.classList.contains("number") && !isNaN(number) ? number : text;
    };
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a), y = value(b);
      return typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
    });
    body.append(...(down ? rows.reverse() : rows));
  });
}
"""


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], sortable: bool = True) -> str:
    """A table; columns whose cells begin with digits stand right and sort by number.

    Args:
        head: Headings; one without text does not sort.
        rows: Cells: numbers, text, or markup that begins with ``<svg``.
        sortable: Whether headings are buttons.
    """
    numeric = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(head))]
    cells = []
    for name, number in zip(head, numeric, strict=True):
        label = f"<button>{escape(name)}</button>" if sortable and name else escape(name)
        cells.append(f'<th scope="col"{" class=number" * number}>{label}</th>')
    lines = [f'<div class="wide"><table><thead><tr>{"".join(cells)}</tr></thead><tbody>']
    for row in rows:
        cells = [_cell(value, number) for value, number in zip(row, numeric, strict=True)]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def _is_number(value: Any) -> bool:
    text = str(value).lstrip("+-")
    return not text or text[0].isdigit()


def _cell(value: Any, number: bool) -> str:
    text = str(value)
    shown = text if text.startswith("<svg ") else escape(f"{value:,}" if isinstance(value, int) else text)
    return f"<td{' class=number' * number}>{shown}</td>"


def line_chart(title: str, unit: str, series: Mapping[str, Sequence[tuple[int, float]]],
               borders: Sequence[tuple[int, str]], count: int) -> str:  # fmt: skip
    """Curves over epochs, with a text that says where each begins and ends.

    Args:
        title: What is shown.
        unit: Of the values.
        series: (epoch, value) points by name; at most two.
        borders: Epochs at which a phase begins, and its name.
        count: Number of epochs.
    """
    width, height, left, right, top, bottom = 420, 210, 48, 10, 22, 24
    values = [value for points in series.values() for _, value in points]
    low, high = min(values), max(values)
    low, high = (low - 0.5, high + 0.5) if high == low else (low, high)

    def x(epoch: float) -> float:
        return left + (width - left - right) * epoch / max(count - 1, 1)

    def y(value: float) -> float:
        return height - bottom - (height - top - bottom) * (value - low) / (high - low)

    said = "; ".join(f"{name} from {points[0][1]:.4g} to {points[-1][1]:.4g}" for name, points in series.items())
    text = escape(f"{title}{f', {unit}' if unit else ''}: {said}")
    drawn = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{text}"><title>{text}</title>']
    for epoch, phase in borders:
        drawn.append(f'<line class="axis" x1="{x(epoch):.1f}" x2="{x(epoch):.1f}" y1="{top}" y2="{height - bottom}"/>'
                     f'<text x="{x(epoch) + 3:.1f}" y="{top - 6}">{escape(phase)}</text>')  # fmt: skip
    for value in (low, high):
        drawn.append(f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    drawn.append(f'<text x="{width - right}" y="{height - 6}" text-anchor="end">epoch {count - 1}</text>')
    keys = []
    for number, (name, points) in enumerate(series.items()):
        steps = " ".join(f"{'L' if i else 'M'}{x(e):.1f} {y(v):.1f}" for i, (e, v) in enumerate(points))
        drawn.append(f'<path class="s{number}" d="{steps}"/>')
        keys.append(f'<span class="key{number}">{escape(name)}</span>')
    caption = f"{escape(title)}{f', {escape(unit)}' if unit else ''}: {', '.join(keys)}"
    return f"<figure>{''.join(drawn)}</svg><figcaption>{caption}</figcaption></figure>"
