"""Norms, rotations, and what is chosen from a prompt."""

from __future__ import annotations

import torch

from corematching.backends.cpu import native as n

from .base import F32, Case, Draw, norm64, rotate64


def normalized(draw: Draw) -> Case:
    rows, width, dtype = draw.size(1, 50), draw.size(1, 200), draw.dtype()
    tensors = {
        "x": draw.normal(rows, width, dtype=dtype),
        "weight": draw.normal(width, dtype=dtype),
        "norm_bias": draw.maybe(width, dtype=dtype) if width > 1 else None,
    }

    def call(x, weight, norm_bias):
        return [n.normalize(x, n.Norm(weight, 1e-3, norm_bias))]

    def reference(x, weight, norm_bias):
        if weight.shape != x.shape[-1:]:
            raise ValueError("shapes")
        return [norm64(x.double(), weight, norm_bias, 1e-3)]

    return Case("normalize", tensors, call, reference, dtype)


def rotated(draw: Draw) -> Case:
    batch, length, heads, kv_heads = (draw.size(1, most) for most in (3, 20, 4, 3))
    size, dtype = draw.size(1, 40, 2), draw.dtype()
    cos_sin = draw.random.choice([1, batch])
    tensors = {
        "x": draw.normal(batch, length, heads + 2 * kv_heads, size, dtype=dtype),
        "cos": draw.normal(cos_sin, length, size, dtype=dtype),
        "sin": draw.normal(cos_sin, length, size, dtype=dtype),
    }

    def call(x, cos, sin):
        x = x.clone() if x.is_contiguous() else x
        return list(n.apply_rope(x, cos, sin, kv_heads))

    def reference(x, cos, sin):
        if cos.shape != sin.shape or cos.shape[1:] != (x.shape[1], x.shape[3]):
            raise ValueError("shapes")
        x, c, s = x.double(), cos.double()[:, :, None], sin.double()[:, :, None]
        parts = x.split([x.shape[2] - 2 * kv_heads, kv_heads, kv_heads], 2)
        turned = [rotate64(parts[0], c, s), rotate64(parts[1], c, s), parts[2]]
        return [part.transpose(1, 2) for part in turned]

    return Case("rope", tensors, call, reference, dtype)


def sums(draw: Draw) -> Case:
    batch, length, width, dtype = draw.size(1, 4), draw.size(1, 30), draw.size(1, 90), draw.dtype()
    what = draw.random.choice(["values", "sizes", "unit squares"])
    tensors = {
        "values": draw.normal(batch, length, width, dtype=dtype),
        "tokens": draw.flags(batch, length),
    }

    def call(values, tokens):
        found = n.sum_rows(values, tokens, what)
        return None if found is None else [found]

    def reference(values, tokens):
        if tokens.dtype != torch.bool or tokens.shape != values.shape[:2]:
            raise ValueError("tokens")
        x = values.double()
        if what == "sizes":
            x = x.abs()
        elif what == "unit squares":
            x = x.square() / x.square().sum(-1, keepdim=True).clamp(min=1e-24)
        return [(x * tokens[..., None]).sum(1)]

    return Case("sum rows", tensors, call, reference, F32)


def weighed(draw: Draw) -> Case:
    batch, length, width = draw.size(1, 4), draw.size(1, 30), draw.size(1, 90)
    tensors = {"marks": draw.flags(batch, length, width), "weights": draw.normal(batch, width)}

    def call(**t):
        found = n.weigh_marks(**t)
        return None if found is None else [found]

    def reference(marks, weights):
        if weights.shape != (marks.shape[0], marks.shape[2]):
            raise ValueError("shapes")
        return [torch.einsum("btf,bf->bt", marks.double(), weights.double())]

    return Case("weigh marks", tensors, call, reference, F32)


def marked(draw: Draw) -> Case:
    batch, length, width, dtype = draw.size(1, 4), draw.size(1, 30), draw.size(1, 90), draw.dtype()
    absolute = draw.random.random() < 0.5
    counts = torch.randint(1, width + 1, (batch, length, 1), generator=draw._rng)
    tensors = {"values": draw.normal(batch, length, width, dtype=dtype), "counts": counts}

    def call(**t):
        found = n.mark_highest(**t, absolute=absolute)
        return None if found is None else [found]

    def reference(values, counts):
        if counts.dtype != torch.long or values.ndim != 3:
            raise ValueError("counts")
        ranked = (values.abs() if absolute else values).double()
        counts = counts.expand(*values.shape[:2], 1)
        cut = ranked.sort(-1, descending=True).values.gather(-1, counts - 1)
        return [(ranked >= cut) & (ranked > 0)]

    return Case("mark highest", tensors, call, reference, F32, exact=True)


def picked(draw: Draw) -> Case:
    batch, width = draw.size(1, 4), draw.size(1, 90)
    count = draw.random.randint(0, width)
    tensors = {"scores": draw.normal(batch, width).mul(9).round()}

    def call(scores):
        found = n.pick_highest(scores, count)
        return None if found is None else [found]

    def reference(scores):
        if scores.ndim != 2 or scores.shape[1] < count:
            raise ValueError("scores")
        order = scores.double().argsort(dim=-1, descending=True, stable=True)
        return [order[:, :count].sort(-1).values]

    return Case("pick highest", tensors, call, reference, F32, exact=True)


def ranked(draw: Draw) -> Case:
    batch, length, width, dtype = draw.size(1, 4), draw.size(1, 30), draw.size(1, 90), draw.dtype()
    tokens, neurons = draw.flags(batch, length), None
    if draw.random.random() < 0.5:
        neurons = draw.choice(batch, width)
    each = width if neurons is None else neurons.shape[1]
    ranks = torch.tensor([draw.random.randint(0, t * each) for t in tokens.sum(1).tolist()])
    tensors = {
        "values": draw.normal(batch, length, width, dtype=dtype),
        "tokens": tokens,
        "neurons": neurons,
        "ranks": ranks,
    }

    def call(**t):
        found = n.find_size(**t)
        return None if found is None else [found]

    def reference(values, tokens, neurons, ranks):
        if tokens.dtype != torch.bool or ranks.dtype != torch.long or len(ranks) != len(values):
            raise ValueError("dtypes")
        if len(tokens) != len(values) or (neurons is not None and len(neurons) != len(values)):
            raise ValueError("shapes")
        found = []
        for b, rank in enumerate(ranks.tolist()):
            rows = values[b, tokens[b]].double().abs()
            rows = rows if neurons is None else rows[:, neurons[b]]
            found.append(rows.flatten().sort().values[rank - 1] if rank else torch.tensor(0.0))
        return [torch.stack([x.double() for x in found])]

    return Case("find size", tensors, call, reference, F32, exact=True)
