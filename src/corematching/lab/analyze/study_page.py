"""The page and the tables of a study over many questions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from corematching.lab.analyze.chart import Chart
from corematching.lab.analyze.layer import CRITERIA
from corematching.lab.analyze.page import (
    build_page,
    draw_figure,
    draw_key,
    list_terms,
    write_percent,
    write_signed,
)

TITLE = "Do core tokens and core neurons reinforce each other?"
COLUMNS = {
    "tokens_kept": "core tokens, of the image tokens",
    "neurons_from_core": "core neurons found again from core tokens",
    "neurons_from_random": "… from random tokens",
    "neurons_gain": "difference",
    "tokens_from_core": "core tokens found again from core neurons",
    "tokens_from_random": "… from random neurons",
    "tokens_gain": "difference",
}
DIRECTIONS = (
    ("neurons_from_core", "neurons_from_random", "core tokens", "random tokens",
     "core neurons found again"),
    ("tokens_from_core", "tokens_from_random", "core neurons", "random neurons",
     "core tokens found again"),
)  # fmt: skip


def build_study_page(study: Mapping[str, Any], command: str = "") -> str:
    """One self-contained HTML page from what `corematching.lab.analyze.study.study_task` gave."""
    settings = study["settings"]
    facts = (
        f"{settings['model']} (weights {settings['weights']}, {settings['dtype']}) on "
        f"{settings['questions']} questions of {settings['task']}, seed {settings['seed']}."
    )
    body = [
        f"<h1>{TITLE}</h1>",
        INTRODUCTION,
        f'<p class="soft">{escape(facts)} Shaded: 95 % bootstrap intervals over pictures.</p>',
        "<h2>In short</h2>",
        _list_answers(study),
    ]
    for rule in study["rules"]:
        drawn = "".join(_draw_direction(study, rule["name"], way) for way in DIRECTIONS)
        body += [f"<h2>{escape(rule['title'])}</h2>", f'<div class="two">{drawn}</div>']
    body += [
        "<h2>Does the score stand for a token’s influence?</h2>",
        f'<div class="two">{"".join(_draw_correlations(study, rule) for rule in study["rules"])}'
        "</div>",
        AGAINST,
        "<h2>All figures</h2>",
        *(_draw_table(study, rule) for rule in study["rules"]),
        "<h2>What exactly is measured</h2>",
        list_terms(TERMS),
    ]
    return build_page(TITLE, "\n".join(body), command)


def write_tables(study: Mapping[str, Any], command: str = "") -> str:
    """The same figures as Markdown."""
    settings = study["settings"]
    parts = [f"# {TITLE}"]
    if command:
        parts.append(f"```\n{command}\n```")
    parts.append(
        f"{settings['model']} (weights {settings['weights']}, {settings['dtype']}), "
        f"{settings['questions']} questions of {settings['task']}, seed {settings['seed']}. "
        "Means over the questions in %, with 95 % bootstrap intervals over pictures."
    )
    head = ("layer", *COLUMNS.values())
    for rule in study["rules"]:
        lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * len(COLUMNS)}"]
        for name, figures in _rows(study, rule["name"]):
            cells = [name, *(_write_interval(figures[column]) for column in COLUMNS)]
            lines.append(f"| {' | '.join(cells)} |")
        parts += [f"## {rule['title']}", "\n".join(lines)]
    parts += ["## Rank correlation of the token score with influence on the last token"]
    head = ("layer", *(f"{r['title']}: {name}" for r in study["rules"] for name in CRITERIA))
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    tables = [_rows(study, rule["name"]) for rule in study["rules"]]
    for rows in zip(*tables, strict=True):
        cells = [_write_correlation(figures[name]) for _, figures in rows for name in CRITERIA]
        lines.append(f"| {' | '.join([rows[0][0], *cells])} |")
    return "\n\n".join([*parts, "\n".join(lines)]) + "\n"


def _rows(study: Mapping[str, Any], rule: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, figures) of each layer, the mean over the layers first."""
    layers = [(str(layer["layer"]), layer["rules"][rule]) for layer in study["layers"]]
    return [("all", study["mean"][rule]), *layers]


def _list_answers(study: Mapping[str, Any]) -> str:
    """One sentence for each rule and direction."""
    items = []
    for rule in study["rules"]:
        mean = study["mean"][rule["name"]]
        for core, other, source, control, found in DIRECTIONS:
            gain = mean["neurons_gain" if core.startswith("neurons") else "tokens_gain"]
            items.append(
                f"<li><b>{escape(rule['title'])}:</b> from {source}, "
                f"{write_percent(mean[core]['value'], 1)} of the {found}; from as many {control}, "
                f"{write_percent(mean[other]['value'], 1)}. {_judge(gain)}</li>"
            )
    return f"<ul>{''.join(items)}</ul>"


def _judge(gain: Mapping[str, float]) -> str:
    points = f"{abs(100 * gain['value']):.1f} points"
    between = f"({100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})".replace("-", "−")
    if gain["low"] > 0:
        return f"Core is ahead of random by {points} {between}."
    if gain["high"] < 0:
        return f"Core is behind random by {points} {between}."
    return f"No difference can be told {between}."


def _draw_direction(
    study: Mapping[str, Any], rule: str, direction: tuple[str, str, str, str, str]
) -> str:
    core, other, source, control, found = direction
    rows = [layer["rules"][rule] for layer in study["layers"]]
    least = min(row[name]["low"] for row in rows for name in (core, other))
    chart = _by_layer(study, (math.floor(10 * least) / 10, 1), found)
    chart.percent = True
    for name, kind in ((other, "gone"), (core, rule)):
        _add_line(chart, study, rule, name, kind)
    key = draw_key([(rule, f"from {source}"), ("gone", f"from as many {control}")])
    drawn = chart.render(f"Ratio of the {found}, from {source} and from {control}, by layer")
    return draw_figure(
        key + drawn, f"<b>{source.capitalize()} → {found.removesuffix(' found again')}.</b>"
    )


def _draw_correlations(study: Mapping[str, Any], rule: Mapping[str, Any]) -> str:
    chart = _by_layer(study, (-1, 1), "rank correlation")
    chart.mark_y(0, "plain")
    for criterion in CRITERIA:
        _add_line(chart, study, rule["name"], criterion, criterion)
    key = draw_key([(criterion, criterion) for criterion in CRITERIA])
    drawn = chart.render(f"Rank correlation of the score ({rule['title']}) with influence")
    return draw_figure(key + drawn, f"<b>{escape(rule['title'])}.</b>")


def _by_layer(study: Mapping[str, Any], y_range: tuple[float, float], label: str) -> Chart:
    last = max(1, study["settings"]["num_layers"] - 1)
    return Chart((0, last), y_range, "layer", label, width=480, height=250)


def _add_line(chart: Chart, study: Mapping[str, Any], rule: str, name: str, kind: str) -> None:
    """A mean by layer in its interval."""
    layers = [layer["layer"] for layer in study["layers"]]
    figures = [layer["rules"][rule][name] for layer in study["layers"]]
    whole = [(x, f) for x, f in zip(layers, figures, strict=True) if f is not None]
    if whole:
        xs = [x for x, _ in whole]
        chart.band(xs, [f["low"] for _, f in whole], [f["high"] for _, f in whole], kind)
    values = [None if f is None else f["value"] for f in figures]
    chart.line(layers, values, kind)
    hints = [
        "" if v is None else f"layer {x}: {v:.2f}" for x, v in zip(layers, values, strict=True)
    ]
    chart.hints(layers, values, hints)


def _draw_table(study: Mapping[str, Any], rule: Mapping[str, Any]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in ("layer", *COLUMNS.values()))
    rows = []
    for name, figures in _rows(study, rule["name"]):
        cells = "".join(f"<td>{_write_cell(figures[column])}</td>" for column in COLUMNS)
        kind = ' class="all"' if name == "all" else ""
        rows.append(f"<tr{kind}><td>{name}</td>{cells}</tr>")
    return (
        f'<h4>{escape(rule["title"])}, in %</h4><div class="wide"><table><thead><tr>{head}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _write_cell(figure: Mapping[str, float] | None) -> str:
    value, _, interval = _write_interval(figure).partition(" ")
    return f"{value} <small>{interval}</small>"


def _write_interval(figure: Mapping[str, float] | None) -> str:
    if figure is None:
        return "–"
    value, low, high = (f"{100 * figure[name]:.1f}" for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})".replace("-", "−")


def _write_correlation(figure: Mapping[str, float] | None) -> str:
    if figure is None:
        return "–"
    low, high = (write_signed(figure[name]) for name in ("low", "high"))
    return f"{write_signed(figure['value'])} ({low} to {high})"


INTRODUCTION = """<p class="lead">Core neurons are those that the tokens of a prompt use most; core
tokens are the image tokens that share neurons. If core tokens lead to the core neurons, and core
neurons to the core tokens, the two are said to reinforce each other.</p>
<p>Two experiments on every layer test it. <b>From tokens to neurons:</b> all image tokens but the
core tokens are hidden; how many of the core neurons of the whole prompt are chosen again?
<b>From neurons to tokens:</b> all neurons but the core neurons are hidden; how many of the core
tokens are chosen again? Beside each stands the control: as many tokens, or neurons, drawn at
random. A high ratio says little by itself, for most choices overlap much; what counts is whether
core beats random. That is a hard test: a fair sample of the tokens resembles them all.</p>"""

AGAINST = """<p class="soft">Spearman's rank correlation over the patches of a picture between the
token score and what each patch contributes to the last token's attention output: the attention
itself, the angle (cosine) to the whole, and the product of both. Lines are means over the
questions.</p>"""

TERMS = {
    "Core neurons": "The ratio β of the neurons that the rule's neuron score ranks highest over "
    "all tokens, in every layer (paper: those in most tokens' top 20 % of positive activations, "
    "40 % of the neurons).",
    "Core tokens": "The image tokens that the rule keeps when it scores the layer with all neurons "
    "(paper: those above the knee of the overlap with the core neurons).",
    "From core tokens": "The neuron score sees the text and the core tokens only; the ratio of the "
    "core neurons among the neurons that it then ranks highest, as many as before.",
    "From core neurons": "The token score sees the core neurons only; the ratio of the core tokens "
    "among the image tokens that it then ranks highest, as many as before.",
    "Random": "One draw for each question and layer, of as many image tokens or neurons.",
    "Interval": "95 % bootstrap interval over pictures; differences are paired by question.",
}
