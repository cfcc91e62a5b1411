"""Calls of the C kernels with random shapes, and what they give in float64.

Shared by the fuzz tests: of the Python boundary (test_boundary_fuzz.py) and of the C code under
sanitizers (fuzz_native.py). A case has tensors by name, so that one can be changed.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from corematching.kernels import FFNWeights, NeuronSets, Thresholds
from corematching.kernels import native as n

BF16, F32 = torch.bfloat16, torch.float32
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
ERRORS = {F32: 2e-4, BF16: 3e-2}


@dataclass
class Case:
    """One call.

    Attributes
    ----------
    name : str
        Of the kernel.
    tensors : dict
        What it gets, by name; None where there is none.
    call, reference : callable
        Of the tensors: a list of what comes out, from the kernel and in float64.
    dtype : torch.dtype
        Of the numbers, which decides how far apart the two may be.
    exact : bool
        Whether they must be the same.
    """

    name: str
    tensors: dict[str, Tensor | None]
    call: Callable[..., list[Tensor] | None]
    reference: Callable[..., list[Tensor]]
    dtype: torch.dtype = F32
    exact: bool = False


def is_close(case: Case, ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Whether a kernel's results are those of the reference, but for roundings."""
    if len(ours) != len(theirs):
        return False
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape or (case.exact and not torch.equal(a, b.to(a.dtype))):
            return False
        if not case.exact:
            error, scale = (a.double() - b.double()).norm(), b.double().norm()
            if not error <= ERRORS[case.dtype] * scale + 1e-6:
                return False
    return True


class Draw:
    """Random numbers, tensors and shapes from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._rng = torch.Generator().manual_seed(seed)

    def size(self, least: int, most: int, multiple: int = 1) -> int:
        """A whole number; small ones and powers of 2 are likely."""
        n = self.random.choice(
            [least, self.random.randint(least, most), 1 << most.bit_length() - 1]
        )
        return max(least, min(n, most)) * multiple

    def dtype(self) -> torch.dtype:
        return self.random.choice([F32, BF16])

    def normal(self, *shape: int, dtype: torch.dtype = F32) -> Tensor:
        return (torch.randn(*shape, generator=self._rng) / max(shape[-1], 1) ** 0.5).to(dtype)

    def maybe(self, *shape: int, dtype: torch.dtype = F32) -> Tensor | None:
        return self.normal(*shape, dtype=dtype) if self.random.random() < 0.5 else None

    def flags(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._rng) < 0.7

    def choice(self, sets: int, width: int) -> Tensor:
        count = self.size(1, width)
        order = torch.rand(sets, width, generator=self._rng).argsort(1)
        return order[:, :count].sort(1).values

    def activation(self, known: int = len(ACTIVATIONS)) -> str:
        return self.random.choice(list(ACTIVATIONS)[:known])

    def rows(self) -> tuple[int, int]:
        """Rows, and sets that they share."""
        sets = self.random.choice([1, 1, 2, 3, 5, 8])
        return sets * self.random.randint(1, n.MAX_BATCH // sets), sets


def _double(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


def _find_gap(values: Tensor) -> Tensor:
    """(B,) thresholds, each in the middle of the widest gap between a row's sizes."""
    sizes = values.abs().sort(1).values
    if sizes.shape[1] < 2:
        return torch.zeros(len(sizes))
    gaps = sizes.diff(dim=1)
    place = gaps.argmax(1, keepdim=True)
    return (sizes.gather(1, place) + gaps.gather(1, place) / 2)[:, 0].float()


def linear_of_a_token(draw: Draw) -> Case:
    rows, inputs, outputs = draw.size(1, n.MAX_BATCH), draw.size(1, 200), draw.size(1, 150)
    dtype = draw.dtype()
    tensors = {
        "x": draw.normal(rows, inputs, dtype=dtype),
        "weight": draw.normal(outputs, inputs, dtype=dtype),
        "bias": draw.maybe(outputs, dtype=dtype),
    }

    def reference(x, weight, bias):
        return [F.linear(x.double(), weight.double(), _double(bias))]

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
        x, up, gate, up_bias, gate_bias = map(_double, (x, up, gate, up_bias, gate_bias))
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
        some = [_double(tensors[k]) for k in ("x", "up", "gate", "up_bias", "gate_bias")]
        limits = _find_gap(values_of(*some).gather(1, tensors["indices"]))
        tensors["limits"] = limits

    def call(x, indices, bias, limits=None, **weights):
        weights = FFNWeights(activation=name, **weights)
        sets = NeuronSets(indices, bias, Thresholds(output=limits))
        return [n.KERNEL.run(x, weights, n.KERNEL.prepare(weights, sets))]

    return Case("ffn", tensors, call, reference, dtype)


def _norm(x, weight, shift, epsilon):
    if shift is None:
        return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight.double()
    return F.layer_norm(x, x.shape[-1:], weight.double(), shift.double(), epsilon)


def products(draw: Draw, unit: str) -> Case:
    tiled = unit == n.TILES
    dtype = BF16 if tiled else draw.dtype()
    step = n.STEP if tiled else 1
    rows, inputs = draw.size(1, 70), draw.size(1, 300 // step, step)
    outputs = draw.size(1, 200 // step, step)
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
        "shift": draw.maybe(inputs, dtype=dtype) if normed else None,
    }

    def call(x, weight, bias, residual, norm, shift):
        norm = None if norm is None else n.Norm(norm, 1e-3, shift)
        return [n.Products(unit).linear(x, weight, bias, residual, name, norm)]

    def reference(x, weight, bias, residual, norm, shift):
        x = x.double() if norm is None else _norm(x.double(), norm, shift, 1e-3)
        out = F.linear(x, weight.double(), _double(bias))
        out = out if name is None else ACTIVATIONS[name](out)
        if residual is not None and residual.shape != out.shape:
            raise ValueError("shapes")
        return [out if residual is None else out + residual.double()]

    return Case(f"linear on {unit}", tensors, call, reference, dtype)


def gated(draw: Draw, unit: str) -> Case:
    dtype = BF16 if unit == n.TILES else draw.dtype()
    step = n.STEP if unit == n.TILES else 1
    rows, inputs = draw.size(1, 70), draw.size(1, 200 // step, step)
    outputs, name = draw.size(1, 150 // step, step), draw.activation()
    places = torch.full((rows,), -1, dtype=torch.int32)
    some = draw.flags(rows)
    places[some] = torch.arange(int(some.sum()), dtype=torch.int32)
    tensors = {
        "x": draw.normal(1, rows, inputs, dtype=dtype),
        "gate": draw.normal(outputs, inputs, dtype=dtype),
        "up": draw.normal(outputs, inputs, dtype=dtype),
        "gate_bias": draw.maybe(outputs, dtype=dtype),
        "up_bias": draw.maybe(outputs, dtype=dtype),
        "places": places,
        "gates": torch.zeros(max(int(some.sum()), 1), outputs, dtype=dtype),
    }

    def call(x, gate, up, gate_bias, up_bias, places, gates):
        gates = gates.clone() if gates.is_contiguous() else gates
        kept = places, gates
        out = n.Products(unit).gated(x, gate, up, gate_bias, up_bias, name, kept)
        return [out, gates]

    def reference(x, gate, up, gate_bias, up_bias, places, gates):
        x = x.double()
        if gate.shape != up.shape or places.shape != (x[..., 0].numel(),):
            raise ValueError("shapes")
        act = ACTIVATIONS[name](F.linear(x, gate.double(), _double(gate_bias)))
        kept = gates.double().clone().view(-1, len(up))
        for row, place in enumerate(places.tolist()):
            if place >= 0:
                kept[place] = act.reshape(-1, act.shape[-1])[row]
        return [act * F.linear(x, up.double(), _double(up_bias)), kept.view(gates.shape)]

    return Case(f"gated on {unit}", tensors, call, reference, dtype)


def several(draw: Draw, unit: str) -> Case:
    dtype = BF16 if unit == n.TILES else draw.dtype()
    step = n.STEP if unit == n.TILES else 1
    rows, inputs, count = draw.size(1, 70), draw.size(1, 200 // step, step), draw.size(1, 4)
    tensors: dict[str, Any] = {"x": draw.normal(1, rows, inputs, dtype=dtype)}
    for i in range(count):
        outputs = draw.size(1, 96 // step, step)
        tensors[f"w{i}"] = draw.normal(outputs, inputs, dtype=dtype)
        tensors[f"b{i}"] = draw.maybe(outputs, dtype=dtype)

    def split(more):
        return [more[f"w{i}"] for i in range(count)], [more[f"b{i}"] for i in range(count)]

    def call(x, **more):
        return [n.Products(unit).several(x, *split(more))]

    def reference(x, **more):
        pairs = zip(*split(more), strict=True)
        return [torch.cat([F.linear(x.double(), w.double(), _double(b)) for w, b in pairs], -1)]

    return Case(f"several on {unit}", tensors, call, reference, dtype)


def _make_mask(draw: Draw, batch: int, length: int, stored: int) -> Tensor | None:
    kind = draw.random.choice(["none", "bool", "summands"])
    shape = (draw.random.choice([1, batch]), 1, draw.random.choice([1, length]), stored)
    if kind == "bool":
        mask = draw.flags(*shape)
        mask[..., 0] = True
        return mask
    return None if kind == "none" else (3 * draw.normal(*shape)).to(BF16)


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
    batch, groups, size = draw.size(1, 3), draw.size(1, 3), draw.size(1, 3, n.STEP)
    heads, length, stored = groups * draw.size(1, 3), draw.size(1, 80), draw.size(1, 80)
    causal = draw.random.random() < 0.5
    x = draw.normal(batch, length, heads, size, dtype=BF16)
    tensors = {
        "query": x.transpose(1, 2),
        "key": draw.normal(batch, groups, stored, size, dtype=BF16),
        "value": draw.normal(batch, groups, stored, size, dtype=BF16),
        "mask": _make_mask(draw, batch, length, stored),
    }

    def call(**t):
        return [n.TiledAttention().attend(**t, scaling=1.5, causal=causal)]

    def reference(query, key, value, mask):
        if mask is not None and mask.ndim != 4:
            raise ValueError("shapes")
        return [_attend(query, key, value, mask, 1.5, causal)]

    return Case("attention", tensors, call, reference, BF16)


def _rotate(x, cos, sin):
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


def prompt_layer(draw: Draw) -> Case:
    batch, length, groups, size = draw.size(1, 2), draw.size(1, 70), draw.size(1, 2), n.STEP
    heads, hidden = groups * draw.size(1, 2), draw.size(1, 4, n.STEP)
    width, causal, name = draw.size(1, 5, n.STEP), draw.random.random() < 0.5, draw.activation()
    rotated, inner = draw.random.random() < 0.7, heads * size
    shapes = {
        "q": (inner, hidden), "k": (groups * size, hidden), "v": (groups * size, hidden),
        "o": (hidden, inner), "gate": (width, hidden), "up": (width, hidden),
        "down": (hidden, width),
    }  # fmt: skip
    tensors: dict[str, Any] = {k: draw.normal(*s, dtype=BF16) for k, s in shapes.items()}
    tensors |= {f"{k}_bias": draw.maybe(s[0], dtype=BF16) for k, s in shapes.items()}
    if draw.random.random() < 0.3:
        tensors["gate"] = tensors["gate_bias"] = None
    if draw.random.random() < 0.5:
        tensors["down"] = tensors["down"].t().contiguous().t()
    tensors |= {
        "first": 1 + draw.normal(hidden, dtype=BF16),
        "second": 1 + draw.normal(hidden, dtype=BF16),
        "shift": draw.maybe(hidden, dtype=BF16),
        "x": draw.normal(batch, length, hidden, dtype=BF16),
        "cos": draw.normal(draw.random.choice([1, batch]), length, size, dtype=BF16),
        "sin": draw.normal(1, length, size, dtype=BF16),
        "mask": _make_mask(draw, batch, length, length),
    }
    tensors["sin"] = torch.sin(tensors["cos"].float()).to(BF16)
    if not rotated:
        tensors["cos"] = tensors["sin"] = None

    def call(first, second, shift, x, cos, sin, mask, **weights):
        norms = n.Norm(first, 1e-3, shift), n.Norm(second, 1e-3, shift)
        layer = n.PromptLayer(weights, norms, size, name, 0.3, n.Scratch())
        angles = (cos, sin) if cos is not None else None
        done = layer.run(x, angles, mask, causal)
        return [done.middle, done.active, done.out]

    def reference(first, second, shift, x, cos, sin, mask, **w):
        w, x = {k: _double(v) for k, v in w.items()}, x.double()
        normed = _norm(x, first, shift, 1e-3)
        q, k, v = (
            F.linear(normed, w[i], w[f"{i}_bias"]).unflatten(-1, (-1, size)).transpose(1, 2)
            for i in "qkv"
        )
        if cos is not None:
            c, s = cos.double()[:, None], sin.double()[:, None]
            q, k = _rotate(q, c, s), _rotate(k, c, s)
        mixed = _attend(q, k, v, mask, 0.3, causal).flatten(2)
        middle = x + F.linear(mixed, w["o"], w["o_bias"])
        normed = _norm(middle, second, shift, 1e-3)
        active = F.linear(normed, w["up"], w["up_bias"])
        if w["gate"] is None:
            active = ACTIVATIONS[name](active)
        else:
            active = ACTIVATIONS[name](F.linear(normed, w["gate"], w["gate_bias"])) * active
        return [middle, active, middle + F.linear(active, w["down"], w["down_bias"])]

    return Case("prompt layer", tensors, call, reference, BF16)


def step(draw: Draw) -> Case:
    batch, dtype = draw.size(1, 6), draw.dtype()
    kv, size, hidden = draw.size(1, 3), draw.size(1, 20, 2), draw.size(1, 100)
    heads, width = kv * draw.size(1, 3), draw.size(1, 90)
    capacity = draw.size(2, 40)
    length = draw.random.randint(1, capacity)
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
        "valid": draw.flags(batch, length).to(torch.uint8),
        "logarithms": draw.maybe(batch, draw.size(1, 50)),
    }  # fmt: skip
    tensors["valid"][:, -1] = 1
    names = (*shapes, "q_bias", "q_norm", "k_norm", "o_bias")

    def call(up, gate, down, bias, final, buffer, x, cos, sin, valid, logarithms, **w):
        shape = n.Shape(heads, kv, size, 0.1, 0.4)
        one = n.DecodeStep([n.LayerWeights(**w)], final, shape)
        plan = n.KERNEL.prepare_dense(FFNWeights(up, down.mT, gate), down, bias)
        buffer = buffer.clone() if buffer.is_contiguous() else buffer
        one.set_plans([plan], x.shape[0])
        one.set_buffer(buffer)
        return [one.run(x, cos, sin, valid, length, logarithms), buffer]

    def reference(up, gate, down, bias, final, buffer, x, cos, sin, valid, logarithms, **w):
        assert set(w) == set(names)
        w = {k: _double(v) for k, v in w.items()}
        buffer, x = buffer.double().clone(), x.double()
        normed = _norm(x, w["attention_norm"], None, 0.1)
        q = F.linear(normed, w["q"], w["q_bias"]).unflatten(-1, (heads, size))
        k, v = (F.linear(normed, w[i]).unflatten(-1, (kv, size)) for i in "kv")
        q = q if w["q_norm"] is None else _norm(q, w["q_norm"], None, 0.1)
        k = k if w["k_norm"] is None else _norm(k, w["k_norm"], None, 0.1)
        q, k = (_rotate(part, cos.double()[:, None], sin.double()[:, None]) for part in (q, k))
        buffer[0, :, :, length - 1], buffer[1, :, :, length - 1] = k, v
        keys, values = buffer[:, :, :, :length].repeat_interleave(heads // kv, 2)
        scores = torch.einsum("bhd,bhsd->bhs", q, keys) * 0.4
        if logarithms is not None:
            some = logarithms[:, :length].double()
            scores[..., : some.shape[1]] += some[:, None]
        scores = scores.masked_fill(valid.bool().logical_not()[:, None], -torch.inf)
        mixed = torch.einsum("bhs,bhsd->bhd", scores.softmax(-1), values).flatten(1)
        x = x + F.linear(mixed, w["o"], w["o_bias"])
        normed = _norm(x, w["ffn_norm"], None, 0.1)
        active = F.silu(F.linear(normed, gate.double())) * F.linear(normed, up.double())
        x = x + F.linear(active, down.double())
        x = x if bias is None else x + bias.double()
        return [_norm(x, final, None, 0.1), buffer]

    return Case("decode step", tensors, call, reference, dtype)


def normalised(draw: Draw) -> Case:
    rows, width, dtype = draw.size(1, 50), draw.size(1, 200), draw.dtype()
    tensors = {
        "x": draw.normal(rows, width, dtype=dtype),
        "weight": draw.normal(width, dtype=dtype),
        "shift": draw.maybe(width, dtype=dtype) if width > 1 else None,
    }

    def call(x, weight, shift):
        return [n.normalise(x, n.Norm(weight, 1e-3, shift))]

    def reference(x, weight, shift):
        if weight.shape != x.shape[-1:]:
            raise ValueError("shapes")
        return [_norm(x.double(), weight, shift, 1e-3)]

    return Case("normalise", tensors, call, reference, dtype)


def rotated(draw: Draw) -> Case:
    batch, length, heads, groups = (draw.size(1, most) for most in (3, 20, 4, 3))
    size, dtype = draw.size(1, 40, 2), draw.dtype()
    angles = draw.random.choice([1, batch])
    tensors = {
        "x": draw.normal(batch, length, heads + 2 * groups, size, dtype=dtype),
        "cos": draw.normal(angles, length, size, dtype=dtype),
        "sin": draw.normal(angles, length, size, dtype=dtype),
    }

    def call(x, cos, sin):
        x = x.clone() if x.is_contiguous() else x
        return list(n.rotate_apart(x, cos, sin, groups))

    def reference(x, cos, sin):
        if cos.shape != sin.shape or cos.shape[1:] != (x.shape[1], x.shape[3]):
            raise ValueError("shapes")
        x, c, s = x.double(), cos.double()[:, :, None], sin.double()[:, :, None]
        parts = x.split([x.shape[2] - 2 * groups, groups, groups], 2)
        turned = [_rotate(parts[0], c, s), _rotate(parts[1], c, s), parts[2]]
        return [part.transpose(1, 2) for part in turned]

    return Case("rotate apart", tensors, call, reference, dtype)


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


PORTABLE = [
    linear_of_a_token,
    ffn_of_a_token,
    step,
    functools.partial(products, unit=n.VECTORS),
    functools.partial(gated, unit=n.VECTORS),
    functools.partial(several, unit=n.VECTORS),
    normalised,
    rotated,
    sums,
    weighed,
    marked,
    picked,
    ranked,
]
TILED = [
    functools.partial(products, unit=n.TILES),
    functools.partial(gated, unit=n.TILES),
    functools.partial(several, unit=n.TILES),
    attention,
    prompt_layer,
]


def list_makers() -> list[Callable[[Draw], Case]]:
    """What makes the cases that this machine's library can run."""
    return [*PORTABLE, *(TILED if n.has_tiles() else [])]
