"""Whole prompts: products, attention, layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from corematching.backends.cpu import native as n

from .base import ACTIVATIONS, Case, Draw, double, norm64, rotate64


def linear(draw: Draw) -> Case:
    dtype = draw.dtype()
    rows, inputs, outputs = draw.size(1, 70), draw.inputs(300), draw.inputs(200)
    by_input = draw.random.random() < 0.4
    name = None if by_input or draw.random.random() < 0.5 else draw.activation()
    normed = not by_input and draw.random.random() < 0.4
    weight = draw.normal(outputs, inputs, dtype=dtype)
    tensors = {
        "x": draw.normal(1, rows, inputs, dtype=dtype),
        "weight": weight.t().contiguous().t() if by_input else weight,
        "bias": draw.maybe(outputs, dtype=dtype),
        "residual": draw.maybe(1, rows, outputs, dtype=dtype),
        "norm": draw.normal(inputs, dtype=dtype) + 1 if normed else None,
        "norm_bias": draw.maybe(inputs, dtype=dtype) if normed else None,
    }

    def call(x, weight, bias, residual, norm, norm_bias):
        norm = None if norm is None else n.Norm(norm, 1e-3, norm_bias)
        return [n.Gemm().linear(x, weight, bias, residual, name, norm)]

    def reference(x, weight, bias, residual, norm, norm_bias):
        x = x.double() if norm is None else norm64(x.double(), norm, norm_bias, 1e-3)
        out = F.linear(x, weight.double(), double(bias))
        out = out if name is None else ACTIVATIONS[name](out)
        if residual is not None and residual.shape != out.shape:
            raise ValueError("shapes")
        return [out if residual is None else out + residual.double()]

    return Case("prefill linear", tensors, call, reference, dtype)


def gated(draw: Draw) -> Case:
    dtype, name = draw.dtype(), draw.activation()
    rows, inputs, outputs = draw.size(1, 70), draw.inputs(200), draw.inputs(150)
    slots = torch.full((rows,), -1, dtype=torch.int32)
    some = draw.flags(rows)
    slots[some] = torch.arange(int(some.sum()), dtype=torch.int32)
    tensors = {
        "x": draw.normal(1, rows, inputs, dtype=dtype),
        "gate": draw.normal(outputs, inputs, dtype=dtype),
        "up": draw.normal(outputs, inputs, dtype=dtype),
        "gate_bias": draw.maybe(outputs, dtype=dtype),
        "up_bias": draw.maybe(outputs, dtype=dtype),
        "slots": slots,
        "gates": torch.zeros(max(int(some.sum()), 1), outputs, dtype=dtype),
    }

    def call(x, gate, up, gate_bias, up_bias, slots, gates):
        gates = gates.clone() if gates.is_contiguous() else gates
        kept = slots, gates
        out = n.Gemm().gated(x, gate, up, gate_bias, up_bias, name, kept)
        return [out, gates]

    def reference(x, gate, up, gate_bias, up_bias, slots, gates):
        x = x.double()
        if gate.shape != up.shape or slots.shape != (x[..., 0].numel(),):
            raise ValueError("shapes")
        act = ACTIVATIONS[name](F.linear(x, gate.double(), double(gate_bias)))
        kept = gates.double().clone().view(-1, len(up))
        for row, slot in enumerate(slots.tolist()):
            if slot >= 0:
                kept[slot] = act.reshape(-1, act.shape[-1])[row]
        return [act * F.linear(x, up.double(), double(up_bias)), kept.view(gates.shape)]

    return Case("gated", tensors, call, reference, dtype)


def joint(draw: Draw) -> Case:
    dtype, count = draw.dtype(), draw.size(1, 4)
    rows, inputs = draw.size(1, 70), draw.inputs(200)
    tensors: dict[str, Any] = {"x": draw.normal(1, rows, inputs, dtype=dtype)}
    for i in range(count):
        outputs = draw.inputs(96)
        tensors[f"w{i}"] = draw.normal(outputs, inputs, dtype=dtype)
        tensors[f"b{i}"] = draw.maybe(outputs, dtype=dtype)

    def split(more):
        return [more[f"w{i}"] for i in range(count)], [more[f"b{i}"] for i in range(count)]

    def call(x, **more):
        return [n.Gemm().joint(x, *split(more))]

    def reference(x, **more):
        pairs = zip(*split(more), strict=True)
        return [torch.cat([F.linear(x.double(), w.double(), double(b)) for w, b in pairs], -1)]

    return Case("joint", tensors, call, reference, dtype)


def _make_mask(draw: Draw, batch: int, length: int, keys: int, dtype: torch.dtype) -> Tensor | None:
    kind = draw.random.choice(["none", "bool", "added"])
    shape = (draw.random.choice([1, batch]), 1, draw.random.choice([1, length]), keys)
    if kind == "bool":
        mask = draw.flags(*shape)
        mask[..., 0] = True
        return mask
    return None if kind == "none" else (3 * draw.normal(*shape)).to(dtype)


def _attend(query, key, value, mask, scaling, causal):
    """(B, H, T, D) to (B, T, H, D) in float64."""
    heads = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(heads, 1) for x in (key, value))
    scores = query.double() @ key.transpose(2, 3) * scaling
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.double()
    if causal:
        ones = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~ones, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def attention(draw: Draw) -> Case:
    dtype, causal = draw.dtype(), draw.random.random() < 0.5
    batch, kv_heads, size = draw.size(1, 3), draw.size(1, 3), draw.size(1, 12, n.HEAD_DIM_STEP)
    heads, length, keys = kv_heads * draw.size(1, 3), draw.size(1, 80), draw.size(1, 300)
    x = draw.normal(batch, length, heads, size, dtype=dtype)
    tensors = {
        "query": x.transpose(1, 2),
        "key": draw.normal(batch, kv_heads, keys, size, dtype=dtype),
        "value": draw.normal(batch, kv_heads, keys, size, dtype=dtype),
        "mask": _make_mask(draw, batch, length, keys, dtype),
    }

    def call(**t):
        return [n.PrefillAttention().attend(**t, scaling=1.5, causal=causal)]

    def reference(query, key, value, mask):
        if mask is not None and mask.ndim != 4:
            raise ValueError("shapes")
        return [_attend(query, key, value, mask, 1.5, causal)]

    return Case("attention", tensors, call, reference, dtype)


def prefill_layer(draw: Draw) -> Case:
    dtype, size = draw.dtype(), draw.random.choice([n.HEAD_DIM_STEP, 24, 32, 64])
    batch, length, kv_heads = draw.size(1, 2), draw.size(1, 70), draw.size(1, 2)
    heads, hidden = kv_heads * draw.size(1, 2), max(8, draw.inputs(128))
    width = draw.inputs(160)
    causal, name = draw.random.random() < 0.5, draw.activation()
    rotated, inner = draw.random.random() < 0.7, heads * size
    shapes = {
        "q": (inner, hidden), "k": (kv_heads * size, hidden), "v": (kv_heads * size, hidden),
        "o": (hidden, inner), "gate": (width, hidden), "up": (width, hidden),
        "down": (hidden, width),
    }  # fmt: skip
    tensors: dict[str, Any] = {k: draw.normal(*s, dtype=dtype) for k, s in shapes.items()}
    tensors |= {f"{k}_bias": draw.maybe(s[0], dtype=dtype) for k, s in shapes.items()}
    if draw.random.random() < 0.3:
        tensors["gate"] = tensors["gate_bias"] = None
    if draw.random.random() < 0.5:
        tensors["down"] = tensors["down"].t().contiguous().t()
    tensors |= {
        "first": 1 + draw.normal(hidden, dtype=dtype),
        "second": 1 + draw.normal(hidden, dtype=dtype),
        "norm_bias": draw.maybe(hidden, dtype=dtype),
        "x": draw.normal(batch, length, hidden, dtype=dtype),
        "cos": draw.normal(draw.random.choice([1, batch]), length, size, dtype=dtype),
        "sin": draw.normal(1, length, size, dtype=dtype),
        "mask": _make_mask(draw, batch, length, length, dtype),
    }
    tensors["sin"] = torch.sin(tensors["cos"].float()).to(dtype)
    if not rotated:
        tensors["cos"] = tensors["sin"] = None

    def call(first, second, norm_bias, x, cos, sin, mask, **weights):
        norms = n.Norm(first, 1e-3, norm_bias), n.Norm(second, 1e-3, norm_bias)
        layer = n.PrefillLayer(weights, norms, size, name, 0.3, n.Scratch())
        cos_sin = (cos, sin) if cos is not None else None
        done = layer.run(x, cos_sin, mask, causal)
        return [done.middle, done.active, done.out]

    def reference(first, second, norm_bias, x, cos, sin, mask, **w):
        w, x = {k: double(v) for k, v in w.items()}, x.double()
        normed = norm64(x, first, norm_bias, 1e-3)
        q, k, v = (
            F.linear(normed, w[i], w[f"{i}_bias"]).unflatten(-1, (-1, size)).transpose(1, 2)
            for i in "qkv"
        )
        if cos is not None:
            c, s = cos.double()[:, None], sin.double()[:, None]
            q, k = rotate64(q, c, s), rotate64(k, c, s)
        mixed = _attend(q, k, v, mask, 0.3, causal).flatten(2)
        middle = x + F.linear(mixed, w["o"], w["o_bias"])
        normed = norm64(middle, second, norm_bias, 1e-3)
        active = F.linear(normed, w["up"], w["up_bias"])
        if w["gate"] is None:
            active = ACTIVATIONS[name](active)
        else:
            active = ACTIVATIONS[name](F.linear(normed, w["gate"], w["gate_bias"])) * active
        return [middle, active, middle + F.linear(active, w["down"], w["down_bias"])]

    return Case("prefill layer", tensors, call, reference, dtype)
