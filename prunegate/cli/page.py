"""The page of a run: one HTML file with its style, script and pictures inside; it loads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from prunegate.cli.page_parts import SCRIPT, STYLE, line_chart, table

__all__ = ["render"]

_CURVES = (
    ("Loss", "", (("train_loss", "training"), ("eval_loss", "validation"))),
    ("Accuracy", "% top-1", (("train_top1", "training"), ("eval_top1", "validation"))),
    ("Cost in the search", "million FLOPs", (("expected_flops", "expected"), ("target_flops", "target"))),
    ("Gates", "", (("tau", "temperature"), ("noise", "scale of the noise"))),
)


def render(found: Mapping[str, Any]) -> str:
    """The page.

    Args:
        found: What ``collect`` returned.
    """
    title = escape(f"{found['model']}: {found['name']}")
    body = "\n".join([
        f"<h1>{escape(found['model'])}</h1>",
        f"<p>Run <code>{escape(found['name'])}</code>. One multiply-add is one FLOP.</p>",
        _section("Asked and reached", _reached(found)),
        _section("Kept units, group by group", _picture(found["groups"]), "groups"),
        _section("Over the epochs", _curves(found["rows"])),
        _section("Where the FLOPs went", _parts(found["parts"]), "parts"),
        _section("What could not be pruned, and why", _frozen(found["frozen"]), "frozen"),
    ])  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style></head>\n<body><main>\n{body}\n</main>\n"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _section(title: str, content: str, name: str = "") -> str:
    return f'<section{f" id={name!r}" if name else ""}><h2>{title}</h2>\n{content}</section>'


def _reached(found: Mapping[str, Any]) -> str:
    rows: list[Sequence[Any]] = []
    for name, label in (("flops", "FLOPs"), ("params", "parameters")):
        dense, slim = found[name]
        asked = found["asked"].get(name)
        wanted = "" if asked is None else f"{asked:.1%}" if asked <= 1 else f"{asked / dense:.1%}"
        rows.append((label, wanted, f"{dense:,}", f"{slim:,}", f"{slim / max(dense, 1):.1%}"))
    measured = found["measured"]
    if {"dense", "slim"} <= set(measured):
        dense, slim = measured["dense"], measured["slim"]
        rows.append(("top-1 on the test split", "", f"{dense['top1']:.2f}%", f"{slim['top1']:.2f}%",
                     f"{slim['top1'] - dense['top1']:+.2f}"))  # fmt: skip
        for batch, before in dense.get("latency_ms", {}).items():
            after = slim["latency_ms"][batch]
            rows.append((f"latency, batch {batch}", "", f"{before:.3f} ms", f"{after:.3f} ms", f"{after / before:.1%}"))
        rows.append(("file", "", f"{dense['file_bytes']:,} bytes", f"{slim['file_bytes']:,} bytes",
                     f"{slim['file_bytes'] / dense['file_bytes']:.1%}"))  # fmt: skip
    others = {key: value for key, value in found["asked"].items() if key not in ("flops", "params")}
    said = f"<p>Asked besides: {escape(', '.join(f'{k} = {v}' for k, v in others.items()))}.</p>" if others else ""
    return table(("", "asked", "dense", "slim", "slim / dense"), rows, sortable=False) + said


def _picture(groups: Sequence[Mapping[str, Any]]) -> str:
    """Bars in a table: the picture is the table, so it sorts, and a screen reader can read it."""
    most = max((group["units"] for group in groups), default=1)
    rows = []
    for number, group in enumerate(groups):
        share = group["kept"] / max(group["units"], 1)
        label = f"{group['name']}: {group['kept']} of {group['units']} {group['kind']}s kept, {share:.0%}"
        width, kept = 100 * group["units"] / most, 100 * group["kept"] / most
        bar = (
            f'<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">'
            f"<title>{escape(label)}</title>"
            f'<rect class="gone" width="{width:.3f}" height="10"/>'
            f'<rect class="kept" width="{kept:.3f}" height="10"/></svg>'
        )
        rows.append((number, group["name"], group["kind"], group["units"], group["kept"], f"{share:.0%}", bar))
    total, kept_units = sum(g["units"] for g in groups), sum(g["kept"] for g in groups)
    head = ("#", "group", "kind", "units", "kept", "share", "")
    return (f"<p>{kept_units:,} of {total:,} units are kept. Groups stand in the order of the network; a click on a "
            f"heading sorts.</p>{table(head, rows)}")  # fmt: skip


def _curves(rows: Sequence[Mapping[str, Any]]) -> str:
    phases = [str(row.get("phase", "")) for row in rows]
    borders = [(i, phases[i]) for i in range(len(phases)) if i == 0 or phases[i] != phases[i - 1]]
    charts = []
    for title, unit, columns in _CURVES:
        scale = 1e6 if "million" in unit else 1.0
        series = {}
        for column, label in columns:
            points = [(i, row[column] / scale) for i, row in enumerate(rows) if isinstance(row.get(column), float)]
            if points:
                series[label] = points
        if series:
            charts.append(line_chart(title, unit, series, borders, len(rows)))
    return f'<div class="charts">{"".join(charts)}</div>'


def _parts(parts: Sequence[Mapping[str, Any]]) -> str:
    total = [max(1, sum(part[key] for part in parts)) for key in ("dense", "slim")]
    rows = [
        (part["name"], f"{part['dense']:,}", f"{part['dense'] / total[0]:.1%}", f"{part['slim']:,}",
         f"{part['slim'] / total[1]:.1%}", f"{part['slim'] / max(part['dense'], 1):.1%}")
        for part in parts if part["dense"]
    ]  # fmt: skip
    return table(("part", "dense", "share", "slim", "share", "slim / dense"), rows)


def _frozen(frozen: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for item in frozen:
        where = "; ".join(item["where"][:3]) + (f" and {len(item['where']) - 3} more" if len(item["where"]) > 3 else "")
        rows.append((item["why"], item["operation"], f"{item['positions']:,}", where))
    return table(("why", "operation", "positions", "where"), rows)
