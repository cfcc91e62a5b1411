"""One layer's part of the page: heat maps, sorted scores, scatter plots, neuron counts."""

from __future__ import annotations

from html import escape

import numpy as np

from corematching.lab.analyze.chart import Chart, span, thin
from corematching.lab.analyze.heat import (
    encode_bar,
    encode_heat,
    lay_out,
    trace_dropped,
    trace_outline,
)
from corematching.lab.analyze.layer import CRITERIA, LayerFindings, Neurons, Scored
from corematching.lab.analyze.page import draw_figure, draw_key, write_percent, write_signed
from corematching.lab.analyze.picture import PictureAnalysis
from corematching.lab.analyze.rules import Rule

AXES = {
    "attention": "attention (root scale)",
    "cosine": "cosine",
    "product": "attention × cosine (root scale)",
}

POWERS = {"attention": 0.5, "cosine": 1.0, "product": 0.5}
"""Of the axes: attention has few large and many small values."""


def draw_panel(analysis: PictureAnalysis, findings: LayerFindings) -> str:
    """A section for one layer."""
    chosen = "".join(_draw_chosen(analysis, rule, findings) for rule in analysis.rules)
    scatters = "".join(
        _draw_scatter(rule, findings, criterion)
        for rule in analysis.rules
        for criterion in CRITERIA
    )
    kept = [(f"{rule.name} dot", f"kept, {rule.title.lower()}") for rule in analysis.rules]
    key = draw_key([*kept, ("gone dot", "below the knee")])
    return (
        f'<section class="layer" id="layer{findings.layer}">'
        f"<h3>Layer {findings.layer} (of 0 to {analysis.num_layers - 1})</h3>"
        f'<div class="two">{chosen}</div>'
        f"<h4>Score against influence on the last token</h4>{key}"
        f'<div class="three">{scatters}</div>'
        f"<h4>Neurons</h4>{_list_neurons(findings.neurons)}</section>"
    )


def _draw_chosen(analysis: PictureAnalysis, rule: Rule, findings: LayerFindings) -> str:
    scored = findings.rules[rule.name]
    total, above = len(scored.scores), int(scored.kept.sum())
    counts = f"{above} of {total} patches above the knee ({write_percent(scored.ratio)})"
    if scored.budgeted != above:
        counts += f"; its own budget keeps {scored.budgeted}"
    return (
        f'<div class="chosen {rule.name}"><h4>{escape(rule.title)}</h4>'
        f'<div class="soft">{counts}</div>'
        f"{_draw_heat(analysis, scored, rule)}{_draw_curve(scored, rule)}</div>"
    )


def _draw_heat(analysis: PictureAnalysis, scored: Scored, rule: Rule) -> str:
    rows, columns = lay_out(len(scored.scores), analysis.grid)
    over = 0.68 if analysis.grid else 1
    under = '<use href="#picture" filter="url(#grey)"/>' if analysis.grid else ""
    heat = (
        f'<svg class="heat" viewBox="0 0 {columns} {rows}" role="img" '
        f'aria-label="Heat map of the score: {escape(rule.title, quote=True)}">{under}'
        f'<image width="{columns}" height="{rows}" preserveAspectRatio="none" opacity="{over}" '
        f'style="image-rendering:pixelated" href="{encode_heat(scored.scores, (rows, columns))}"/>'
        f'<path d="{trace_dropped(scored.kept, (rows, columns))}" fill="url(#dropped)"/>'
        f'<path d="{trace_outline(scored.kept, (rows, columns))}" fill="none" stroke="#fff" '
        'stroke-width=".12" stroke-linecap="square"/></svg>'
    )
    low, high = (f"{value:.4g}" for value in (scored.scores.min(), scored.scores.max()))
    where = "" if analysis.grid else " (in the prompt's order: the tokens form no single grid)"
    return (
        f'{heat}<div class="scale">{low}<img alt="" src="{encode_bar()}">{high}'
        f"<span>score{where}</span></div>"
    )


def _draw_curve(scored: Scored, rule: Rule) -> str:
    order = np.argsort(-scored.scores, kind="stable")
    curve, kept = scored.scores[order], int(scored.kept.sum())
    ranks = np.arange(1, len(curve) + 1)
    chart = Chart(
        (1, max(2, len(curve))), span(curve), "patches, highest score first", "score", 480, 210
    )
    chart.line([1, len(curve)], [curve[0], curve[-1]], "plain dashed")
    points = thin(np.stack([ranks, curve], 1))
    ends = points[:, 0] <= kept
    chart.line(points[~ends, 0].tolist(), points[~ends, 1].tolist(), "gone")
    chart.line(points[ends, 0].tolist(), points[ends, 1].tolist(), rule.name)
    chart.mark_x(kept + 0.5, "plain", f"knee: {kept} kept")
    return chart.render(f"Sorted scores with chord and knee: {rule.title}")


def _draw_scatter(rule: Rule, findings: LayerFindings, criterion: str) -> str:
    scored, values = findings.rules[rule.name], findings.influence[criterion]
    score_label = f"score: {rule.title.lower()}"
    chart = Chart(span(values), span(scored.scores), AXES[criterion], score_label, 340, 240,
                  x_power=POWERS[criterion])  # fmt: skip
    chart.dots(values[~scored.kept], scored.scores[~scored.kept], "gone")
    chart.dots(values[scored.kept], scored.scores[scored.kept], rule.name)
    rank = write_signed(scored.correlations[criterion])
    drawn = chart.render(f"{rule.title}'s score against {criterion}, rank correlation {rank}")
    return draw_figure(drawn, f"{escape(rule.title)}, {criterion}: <b>ρ = {rank}</b>")


def _list_neurons(neurons: Neurons) -> str:
    width = neurons.width
    rows: list[tuple[str, str, float | None]] = [
        ("Neurons of the layer", f"{width:,}", None),
        ("Core neurons of the sentence", f"{neurons.core:,}", neurons.core / width),
        ("Among some token's own core neurons", f"{neurons.ever:,}", neurons.ever / width),
    ]
    for group, mean in neurons.activated.items():
        rows.append((f"Activated by {_article(group)} token, mean", f"{mean:,.0f}", mean / width))
    for group, ratio in neurons.inside.items():
        rows.append((f"Own core neurons of {_article(group)} token in the sentence's", "", ratio))
    rows.append(("Core neurons of the picture alone in the text's", "", neurons.shared))
    cells = "".join(
        f"<tr><td>{name}</td><td>{count}</td>"
        f"<td>{'' if ratio is None else write_percent(ratio)}</td></tr>"
        for name, count, ratio in rows
    )
    return (
        "<table><thead><tr><th></th><th>neurons</th><th>ratio</th></tr></thead>"
        f"<tbody>{cells}</tbody></table>"
    )


def _article(group: str) -> str:
    return f"an {group}" if group[0] in "aeiou" else f"a {group}"
