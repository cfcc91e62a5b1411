"""Single tokens: linear layers, FFNs on chosen neurons, whole steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from corematching.backends.cpu import native as n
from corematching.backends.kernels import FFNWeights, NeuronSets, Thresholds

from .base import ACTIVATIONS, Case, Draw, double, norm64, rotate64


def linear_of_a_token(draw: Draw) -> Case:
    rows, inputs, outputs = draw.size(1, n.MAX_BATCH), draw.size(1, 200), draw.size(1, 150)
    dtype = draw.dtype()
    tensors = {
        "x": draw.normal(rows, inputs, dtype=dtype),
        "weight": draw.normal(outputs, inputs, dtype=dtype),
        "bias": draw.maybe(outputs, dtype=dtype),
    }

    def reference(x, weight, bias):
        return [F.linear(x.double(), weight.double(), double(bias))]

    return Case("linear", tensors, lambda **t: [n.linear(**t)], reference, dtype)


def ffn_of_a_token(draw: Draw) -> Case:
    (rows, sets), dtype = draw.rows(), draw.dtype()
    hidden, width, name = draw.size(1, 150), draw.size(1, 120), draw.activation(4)
    gated = draw.random.random() < 0.7
    tensors = {
        "x": draw.normal(rows, hidden, dtype=dtype),
        "up": draw.normal(width, hidden, dtype=dtype),
        "gate": draw.normal(width, hidden, dtype=dtype) if gated else None,
        "down_t": draw.normal(width, hidden, dtype=dtype),
        "up_bias": draw.maybe(width, dtype=dtype),
        "gate_bias": draw.maybe(width, dtype=dtype) if gated else None,
        "indices": draw.choice(sets, width),
        "bias": draw.maybe(draw.random.choice([1, sets]), hidden, dtype=dtype),
    }

    def values_of(x, up, gate, up_bias, gate_bias):
        values = F.linear(x, up, up_bias)
        if gate is None:
            return ACTIVATIONS[name](values)
        return ACTIVATIONS[name](F.linear(x, gate, gate_bias)) * values

    def reference(x, up, gate, down_t, up_bias, gate_bias, indices, bias, limits=None):
        x, up, gate, up_bias, gate_bias = map(double, (x, up, gate, up_bias, gate_bias))
        keep = torch.zeros(len(indices), len(up), dtype=torch.bool).scatter(1, indices, True)
        keep = keep.repeat_interleave(len(x) // len(indices), 0)
        if (gate is not None and gate.shape != up.shape) or down_t.shape != up.shape:
            raise ValueError("shapes")
        values = values_of(x, up, gate, up_bias, gate_bias) * keep
        if limits is not None:
            limits = limits.double().repeat_interleave(len(x) // len(limits))
            values = values * (values.abs() >= limits[:, None])
        out = values @ down_t.double()
        if bias is not None:
            out = out + bias.double().repeat_interleave(len(x) // len(bias), 0)
        return [out]

    limits = None
    if rows == sets and draw.random.random() < 0.5:
        some = [double(tensors[k]) for k in ("x", "up", "gate", "up_bias", "gate_bias")]
        limits = _find_gap(values_of(*some).gather(1, tensors["indices"]))
        tensors["limits"] = limits

    def call(x, indices, bias, limits=None, **weights):
        weights = FFNWeights(activation=name, **weights)
        sets = NeuronSets(indices, bias, Thresholds(output=limits))
        return [n.KERNEL.run(x, weights, n.KERNEL.prepare(weights, sets))]

    return Case("ffn", tensors, call, reference, dtype)


def _find_gap(values: Tensor) -> Tensor:
    """(B,) thresholds, each in the middle of the widest gap between a row's sizes."""
    sizes = values.abs().sort(1).values
    if sizes.shape[1] < 2:
        return torch.zeros(len(sizes))
    gaps = sizes.diff(dim=1)
    place = gaps.argmax(1, keepdim=True)
    return (sizes.gather(1, place) + gaps.gather(1, place) / 2)[:, 0].float()


def step_of_ragged_rows(draw: Draw) -> Case:
    return step(draw, ragged=True)


def step(draw: Draw, ragged: bool = False) -> Case:
    batch, dtype = draw.size(1, 6), draw.dtype()
    kv, size, hidden = draw.size(1, 3), draw.size(1, 20, 2), draw.size(1, 100)
    heads, width = kv * draw.size(1, 3), draw.size(1, 90)
    capacity = draw.size(2, 40)
    lengths = torch.tensor([draw.random.randint(1, capacity) for _ in range(batch)])
    lengths = lengths if ragged else lengths[:1].expand(batch)
    longest = int(lengths.max())
    columns = draw.random.randint(longest, capacity) if ragged else longest
    shapes = {
        "attention_norm": (hidden,), "ffn_norm": (hidden,), "q": (heads * size, hidden),
        "k": (kv * size, hidden), "v": (kv * size, hidden), "o": (hidden, heads * size),
    }  # fmt: skip
    tensors: dict[str, Any] = {k: draw.normal(*s, dtype=dtype) for k, s in shapes.items()}
    tensors |= {
        "q_bias": draw.maybe(heads * size, dtype=dtype), "q_norm": draw.maybe(size, dtype=dtype),
        "k_norm": draw.maybe(size, dtype=dtype), "o_bias": draw.maybe(hidden, dtype=dtype),
        "up": draw.normal(width, hidden, dtype=dtype),
        "gate": draw.normal(width, hidden, dtype=dtype),
        "down": draw.normal(hidden, width, dtype=dtype), "bias": draw.maybe(1, hidden, dtype=dtype),
        "final": draw.normal(hidden, dtype=dtype),
        "buffer": draw.normal(2, batch, kv, capacity, size, dtype=dtype),
        "x": draw.normal(batch, hidden, dtype=dtype),
        "cos": draw.normal(batch, size), "sin": draw.normal(batch, size),
        "valid": draw.flags(batch, columns).to(torch.uint8),
        "log_counts": draw.maybe(batch, draw.size(1, 50)),
    }  # fmt: skip
    tensors["valid"][torch.arange(batch), lengths - 1] = 1
    if ragged:
        tensors["lengths"] = lengths
    names = (*shapes, "q_bias", "q_norm", "k_norm", "o_bias")

    def call(
        up, gate, down, bias, final, buffer, x, cos, sin, valid, log_counts, lengths=longest, **w
    ):
        shape = n.Shape(heads, kv, size, 0.1, 0.4)
        one = n.DecodeStep([n.LayerWeights(**w)], final, shape)
        plan = n.KERNEL.prepare_dense(
            FFNWeights(up, down.mT if down.ndim > 1 else down, gate), down, bias
        )
        buffer = buffer.clone() if buffer.is_contiguous() else buffer
        one.set_plans([plan], x.shape[0])
        one.set_buffer(buffer)
        return [one.run(x, cos, sin, valid, lengths, log_counts), buffer]

    def reference(
        up, gate, down, bias, final, buffer, x, cos, sin, valid, log_counts, lengths=lengths, **w
    ):
        assert set(w) == set(names)
        w = {k: double(v) for k, v in w.items()}
        buffer, x = buffer.double().clone(), x.double()
        normed = norm64(x, w["attention_norm"], None, 0.1)
        q = F.linear(normed, w["q"], w["q_bias"]).unflatten(-1, (heads, size))
        k, v = (F.linear(normed, w[i]).unflatten(-1, (kv, size)) for i in "kv")
        q = q if w["q_norm"] is None else norm64(q, w["q_norm"], None, 0.1)
        k = k if w["k_norm"] is None else norm64(k, w["k_norm"], None, 0.1)
        q, k = (rotate64(part, cos.double()[:, None], sin.double()[:, None]) for part in (q, k))
        rows = torch.arange(batch)
        buffer[0, rows, :, lengths - 1], buffer[1, rows, :, lengths - 1] = k, v
        keys, values = buffer[:, :, :, :longest].repeat_interleave(heads // kv, 2)
        scores = torch.einsum("bhd,bhsd->bhs", q, keys) * 0.4
        if log_counts is not None:
            some = log_counts[:, :longest].double()
            scores[..., : some.shape[1]] += some[:, None]
        seen = valid[:, :longest].bool() & (torch.arange(longest) < lengths[:, None])
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
        mixed = torch.einsum("bhs,bhsd->bhd", scores.softmax(-1), values).flatten(1)
        x = x + F.linear(mixed, w["o"], w["o_bias"])
        normed = norm64(x, w["ffn_norm"], None, 0.1)
        active = F.silu(F.linear(normed, gate.double())) * F.linear(normed, up.double())
        x = x + F.linear(active, down.double())
        x = x if bias is None else x + bias.double().repeat_interleave(len(x) // len(bias), 0)
        return [norm64(x, final, None, 0.1), buffer]

    return Case("ragged decode step" if ragged else "decode step", tensors, call, reference, dtype)
