"""The page about one picture and one question."""

from __future__ import annotations

import re
from collections.abc import Callable
from html import escape

from corematching.lab.analyze.chart import Chart
from corematching.lab.analyze.heat import encode_heat, encode_picture, lay_out
from corematching.lab.analyze.layer import CRITERIA, LayerFindings
from corematching.lab.analyze.layer_panel import draw_panel
from corematching.lab.analyze.page import build_page, draw_figure, draw_key, list_terms
from corematching.lab.analyze.picture import PictureAnalysis
from corematching.lab.analyze.rules import Rule

TITLE = "Core tokens and core neurons, layer by layer"
GROUPS = {"image": "ours", "text": "paper"}


def build_picture_page(analysis: PictureAnalysis, command: str = "") -> str:
    """One self-contained HTML page."""
    body = "\n".join(
        [
            define_picture(analysis),
            f"<h1>{TITLE}</h1>",
            _introduce(analysis),
            "<h2>All layers at a glance</h2>",
            _draw_summary(analysis),
            "<h2>One layer at a time</h2>",
            _explain_panels(analysis),
            _draw_strip(analysis),
            *(draw_panel(analysis, findings) for findings in analysis.layers),
            "<h2>What exactly is measured</h2>",
            list_terms(TERMS),
        ]
    )
    return build_page(f"{analysis.question} – {TITLE}", body, command, _switch(analysis))


def define_picture(analysis: PictureAnalysis) -> str:
    """The definitions that all heat maps use: picture, filter and hatching, in units of patches."""
    image = ""
    if analysis.grid is not None:
        rows, columns = analysis.grid
        image = (
            f'<image id="picture" width="{columns}" height="{rows}" preserveAspectRatio="none" '
            f'href="{encode_picture(analysis.picture)}"/>'
        )
    return (
        f'<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs>{image}'
        '<filter id="grey"><feColorMatrix type="saturate" values="0"/></filter>'
        '<pattern id="dropped" width=".5" height=".5" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><path d="M0 0V.5" stroke="#000" stroke-opacity=".34" '
        'stroke-width=".13"/></pattern></defs></svg>'
    )


def _introduce(analysis: PictureAnalysis) -> str:
    shape = f" ({analysis.grid[0]} × {analysis.grid[1]} patches)" if analysis.grid else ""
    facts = {
        "Question": escape(analysis.question),
        **{name: escape(text) or "(nothing)" for name, text in analysis.answers.items()},
        "Model": escape(analysis.model),
        "Prompt": f"{analysis.image_tokens} image tokens{shape} and {analysis.text_tokens} of text",
        "Decoder": f"{analysis.num_layers} layers of {analysis.layers[0].neurons.width:,} neurons",
        "Dropped after": ", ".join(
            f"layer {' and '.join(map(str, analysis.cuts_of(rule)))} ({escape(rule.title.lower())})"
            for rule in analysis.rules
        ),
    }
    said = {"Question", *analysis.answers}
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd{' class=said' if name in said else ''}>{text}</dd>"
        for name, text in facts.items()
    )
    if analysis.grid is None:
        return f'{INTRODUCTION}<div style="margin:28px 0"><dl>{rows}</dl></div>'
    rows_, columns = analysis.grid
    picture = (
        f'<svg viewBox="0 0 {columns} {rows_}" role="img" aria-label="The picture">'
        '<use href="#picture"/></svg>'
    )
    return f'{INTRODUCTION}<div class="scene">{picture}<dl>{rows}</dl></div>'


def _draw_summary(analysis: PictureAnalysis) -> str:
    figures = [_draw_kept(analysis), _draw_neurons(analysis)]
    figures += [_draw_correlations(analysis, rule.name, rule.title) for rule in analysis.rules]
    return f'<div class="two">{"".join(figures)}</div>'


def _by_layer(analysis: PictureAnalysis, y_range: tuple[float, float], label: str) -> Chart:
    last = max(1, analysis.num_layers - 1)
    return Chart((0, last), y_range, "layer", label, width=480, height=250)


Read = Callable[[LayerFindings], float | None]


def _add_line(chart: Chart, analysis: PictureAnalysis, kind: str, text: str, read: Read) -> None:
    layers = [findings.layer for findings in analysis.layers]
    values = [read(findings) for findings in analysis.layers]
    chart.line(layers, values, kind)
    if len(layers) == 1 and values[0] is not None:
        chart.dots(layers, [values[0]], kind.split()[0])
    hints = [
        "" if value is None else f"layer {layer}: {value:.2f} ({text})"
        for layer, value in zip(layers, values, strict=True)
    ]
    chart.hints(layers, values, hints)


def _draw_kept(analysis: PictureAnalysis) -> str:
    chart = _by_layer(analysis, (0, 1), "image tokens above the knee")
    chart.percent = True
    for rule in analysis.rules:
        for cut in analysis.cuts_of(rule):
            chart.mark_x(cut, rule.name, f"{rule.title.lower()} drops here")

        def read(findings: LayerFindings, name: str = rule.name) -> float:
            return findings.rules[name].ratio

        _add_line(chart, analysis, rule.name, rule.title, read)
    key = draw_key([(rule.name, rule.title) for rule in analysis.rules])
    return draw_figure(key + chart.render("Ratio of image tokens above the knee, by layer"), KEPT)


def _draw_neurons(analysis: PictureAnalysis) -> str:
    chart = _by_layer(analysis, (0, 1), "ratio of neurons")
    chart.percent = True
    key = []
    for group, kind in GROUPS.items():

        def fired(findings: LayerFindings, name: str = group) -> float:
            return findings.neurons.activated[name] / findings.neurons.width

        def inside(findings: LayerFindings, name: str = group) -> float:
            return findings.neurons.inside[name]

        _add_line(chart, analysis, f"{kind} dashed", f"{group} token activates", fired)
        _add_line(chart, analysis, kind, f"{group} token, own within core", inside)
        key += [(kind, f"{group}: in core"), (f"{kind} dashed", f"{group}: activated")]
    label = "How a token's neurons relate to the sentence's core neurons, by layer"
    return draw_figure(draw_key(key) + chart.render(label), NEURONS)


def _draw_correlations(analysis: PictureAnalysis, name: str, title: str) -> str:
    chart = _by_layer(analysis, (-1, 1), "rank correlation")
    chart.mark_y(0, "plain")
    for criterion in CRITERIA:

        def read(findings: LayerFindings, criterion: str = criterion) -> float | None:
            return findings.rules[name].correlations[criterion]

        _add_line(chart, analysis, criterion, criterion, read)
    key = draw_key([(criterion, criterion) for criterion in CRITERIA])
    drawn = chart.render(f"Rank correlation of the score ({title}) with influence, by layer")
    first = name == analysis.rules[0].name
    caption = AGAINST if first else "Read it like its neighbour."
    return draw_figure(key + drawn, f"<b>{escape(title)}’s score against influence.</b> {caption}")


def _explain_panels(analysis: PictureAnalysis) -> str:
    named = "".join(
        f'<p class="soft"><b>{escape(rule.title)}</b>, '
        f"<code>{escape(rule.token_score.name)}</code>: {_describe(rule)}</p>"
        for rule in analysis.rules
    )
    return PANELS + named


def _describe(rule: Rule) -> str:
    """The first line of what the score's class says about itself."""
    text = (type(rule.token_score).__doc__ or "").strip().partition("\n")[0]
    return re.sub(r"``(.+?)``", r"<code>\1</code>", escape(text))


def _draw_strip(analysis: PictureAnalysis) -> str:
    """The layers to choose from, each with its two heat maps."""
    grid = lay_out(analysis.image_tokens, analysis.grid)
    opened, labels = _opened(analysis), []
    for findings in analysis.layers:
        layer = findings.layer
        maps = "".join(
            f'<img alt="" src="{encode_heat(findings.rules[rule.name].scores, grid)}">'
            for rule in analysis.rules
        )
        checked = " checked" if layer == opened else ""
        labels.append(
            f'<label title="layer {layer}"><input type="radio" name="layer" id="pick{layer}" '
            f'aria-label="layer {layer}"{checked}>{maps}{layer}</label>'
        )
    return f'<div class="strip" role="radiogroup" aria-label="Layer">{"".join(labels)}</div>'


def _opened(analysis: PictureAnalysis) -> int:
    """The layer that is open at first: the one after which the last rule drops, if it is shown."""
    shown = [findings.layer for findings in analysis.layers]
    cuts = [cut for cut in analysis.cuts_of(analysis.rules[-1]) if cut in shown]
    return cuts[0] if cuts else shown[len(shown) // 2]


def _switch(analysis: PictureAnalysis) -> str:
    """CSS that shows the panel of the layer that is picked."""
    pairs = (
        f"main:has(#pick{findings.layer}:checked) #layer{findings.layer}"
        for findings in analysis.layers
    )
    return ",".join(pairs) + "{display:block}"


INTRODUCTION = """<p class="lead">A vision-language model reads a picture as a row of image tokens,
one for each patch, and sends them through its decoder layers together with the question. Each layer
has a feed-forward network of some thousand neurons, of which every token activates a part. The
neurons that the tokens of a sentence use most are its <em>core neurons</em>; image tokens that
share them are <em>core tokens</em>, and the others may be dropped.</p>
<p>This page asks two things of every layer. <b>Which patches would be kept?</b> By the rule as
published, which counts how many of the sentence's core neurons a patch activates; and by our
default, whose score is described below. <b>And are those the patches that matter?</b> A score
costs little; what a token really contributes to the last position, from which the answer is read,
costs attention maps. If the one shall stand for the other, the two must rank the patches
alike.</p>"""

KEPT = """<b>What the knee keeps.</b> Scores sorted from high to low often fall steeply and then
flatten; the knee is where the curve is farthest from the straight line between its ends. The curves
show the ratio of patches above it. A rule whose knee moves much from layer to layer has no clear
border between core and rest."""

NEURONS = """<b>Whose are the core neurons?</b> Solid: of the neurons that a token uses most, the
ratio that are the sentence's core neurons. Dashed: the ratio of all neurons that a token activates.
Where the image line is near 100 % and the text line is far below, the core neurons are those of the
patches, which outnumber the words."""

AGAINST = """Spearman's rank correlation over the patches with the last token's attention to
them, with the angle (cosine) between what they add and the whole, and with the product of both.
+1: ranks them alike; 0: unrelated; −1: the other way round."""

PANELS = """<p>Pick a layer by its two small heat maps, the paper's above ours (arrow keys step
through them). <b>Heat map:</b> the score of each patch over the greyed picture, from the lowest to
the highest of this layer; what the knee drops is hatched. <b>Sorted scores:</b> the same numbers
in falling order with the chord between the ends; the dashed line is the knee, kept patches are in
colour. <b>Scatter plots:</b> each dot is a patch, its score against what it contributes.
<b>Table:</b> the layer's neurons.</p>"""

TERMS = {
    "Activated neurons, Γ(x)": "A token's intermediate activations a(x) are what enters the second "
    "projection of the feed-forward network, act(gate) · up. Γ(x) = {n : a<sub>n</sub>(x) &gt; 0}.",
    "Core neurons, C(s)": "A token's own core neurons are the top 20 % of its positive "
    "activations. The sentence's are the 40 % of all neurons that are the own ones of most tokens, "
    "picture and text together (CoreInfer, arXiv:2410.18311; CoreMatching, arXiv:2505.19235).",
    "Paper’s score": "|Γ(x) ∩ C(s)|, how many of the sentence's core neurons the image token "
    "activates.",
    "Knee": "Maximum geometric distance: the point of the sorted scores farthest from the chord "
    "between the first and the last; tokens above it are kept.",
    "Attention": "The last token's attention to an image token, averaged over the heads.",
    "Cosine": "With c<sub>j</sub> token j's term of the last token's attention output, through the "
    "value and output projections, and o their sum over all tokens: cos(c<sub>j</sub>, o).",
    "Product": "Attention × cosine, the paper's projection-guided criterion.",
    "Dropped or not": "Nothing is dropped while the layers are measured: each sees all tokens.",
}
