"""The cost of a run in FLOPs and bytes, and its report."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from corematching.model.linear import is_linear, linear_shape
from corematching.model.spec import ModelSpec
from corematching.report import Report, SampleReport
from corematching.runtime.choices import TokenReader
from corematching.runtime.record import Record, seconds_between


@dataclass
class LayerCost:
    """The cost of one decoder layer.

    Attributes
    ----------
    attention, ffn : int
        Multiply-adds of the linear layers per token.
    pair : int
        Multiply-adds per query-key pair: scores and weighted sum of values, all heads.
    kv_bytes : int
        Bytes of keys and values per token.
    window : int or None
        The sliding window in tokens; None for full attention.
    """

    attention: int
    ffn: int
    pair: int
    kv_bytes: int
    window: int | None


def layer_costs(parts: ModelSpec) -> list[LayerCost]:
    """The cost of each decoder layer, from the sizes of its weights."""
    config = parts.config
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    costs = []
    for index, (attention, ffn) in enumerate(zip(parts.attentions, parts.ffns, strict=True)):
        heads, groups, size = _count_heads(attention, config)
        sliding = kinds[index] == "sliding_attention" if kinds else window is not None
        costs.append(
            LayerCost(
                attention=_linear_macs(attention),
                ffn=_linear_macs(ffn),
                pair=2 * heads * size,
                kv_bytes=2 * groups * size * _dtype_of(parts).itemsize,
                window=window if sliding else None,
            )
        )
    return costs


def _count_heads(attention: Any, config: Any) -> tuple[int, int, int]:
    """Query heads, key-value heads and head dimension of one layer, from its projections."""
    heads = config.num_attention_heads
    size = getattr(attention, "head_dim", None) or config.hidden_size // heads
    query, key = (getattr(attention, name, None) for name in ("q_proj", "k_proj"))
    if query is None or key is None:
        return heads, getattr(config, "num_key_value_heads", None) or heads, size
    return linear_shape(query)[1] // size, linear_shape(key)[1] // size, size


def _linear_macs(module: nn.Module) -> int:
    shapes = [linear_shape(m) for m in module.modules() if is_linear(m)]
    return sum(inputs * outputs for inputs, outputs in shapes)


def _dtype_of(parts: ModelSpec) -> torch.dtype:
    weight = next(parts.layers[0].parameters())
    return weight.dtype if weight.is_floating_point() else torch.float16


def text_flops(
    costs: list[LayerCost], tokens: list[int], contexts: list[int], ratios: list[float]
) -> int:
    """FLOPs of one pass through the decoder layers.

    Parameters
    ----------
    costs : list of LayerCost
        Per layer.
    tokens, contexts : list of int
        Per layer: tokens of this pass, and tokens in its cache before.
    ratios : list of float
        Per layer: computed neurons / neurons.
    """
    total = 0
    for cost, n, before, kept in zip(costs, tokens, contexts, ratios, strict=True):
        total += n * (cost.attention + round(cost.ffn * kept)) + n * (n + before) * cost.pair
    return 2 * total


def build_report(record: Record, parts: ModelSpec, method: Any, model: nn.Module) -> Report:
    """The report of a record; waits for the device."""
    config: Any = model.config
    vision = sum(seconds_between(a, b) for a, b in record.vision)
    prefill = seconds_between(record.start, record.filled)
    weight = next(parts.layers[0].parameters())
    report = Report(
        method=method.to_dict(),
        model=config.name_or_path or type(model).__name__,
        model_type=config.model_type,
        dtype=str(_dtype_of(parts)).removeprefix("torch."),
        device=str(weight.device),
        attention=str(parts.config._attn_implementation),
        num_layers=len(parts.layers),
        drop_layers=[stage.layer for stage in record.chooser.selection.stages],
        neurons=list(record.counts),
        widths=parts.widths,
        prefill_seconds=max(prefill - vision, 0.0) if record.vision_inside else prefill,
        vision_seconds=vision,
        vision_flops=record.vision_flops,
        decode_seconds=seconds_between(record.filled, record.last),
        decode_steps=record.steps,
        kernel=record.kernel,
        decode_bytes=record.decode_bytes,
        dense_decode_bytes=record.dense_decode_bytes,
        continued=record.continued,
        memory=None if record.memory is None else record.memory.report(),
        path=replace(record.path),
    )
    counter = _SampleCounter(record, parts, model)
    rows = range(0, record.valid.shape[0], record.expand)
    report.samples = [counter.sample(row) for row in rows]
    return report


class _SampleCounter:
    """Builds the samples' reports; moves the record's tensors to the CPU once."""

    def __init__(self, record: Record, parts: ModelSpec, model: nn.Module) -> None:
        self.record = record
        self.costs = layer_costs(parts)
        self.depth = len(parts.layers)
        self.counts, self.widths = record.counts, parts.widths
        self.tokens = TokenReader(record)
        self.own_valid = record.valid.cpu()
        self.context = record.context.cpu()
        self.new = _count_new_tokens(record)
        head = model.get_output_embeddings()  # type: ignore[operator]
        self.head_macs = 0 if head is None else math.prod(linear_shape(head))

    def sample(self, row: int) -> SampleReport:
        """The report of one row of the batch."""
        tokens = self.tokens.read(row)
        image = tokens.image
        present = {-1: int(self.tokens.valid[row].sum())}
        present |= {cut.layer: int(cut.prompt_mask.sum()) for cut in tokens.cuts}
        kept_after = [int((cut.prompt_mask & image).sum()) for cut in tokens.cuts]
        layers = [cut.layer for cut in tokens.cuts]
        left = dict(zip((-2, *layers), (int(image.sum()), *kept_after), strict=True))
        kept = tokens.prompt_mask[image].tolist()
        cuts = [_finite(cut.lowest) for cut in tokens.cuts]
        costs = self._costs(row, present)
        return SampleReport(
            image_tokens=len(kept),
            kept_tokens=sum(kept),
            keep_mask=kept,
            scores=[_finite(x) for x in tokens.scores[image].tolist()],
            cut=cuts[-1] if cuts else None,
            cut_layers=layers,
            cuts=cuts,
            kept_after=kept_after,
            prompt_tokens=int(self.own_valid[row].sum()),
            new_tokens=self.new[row],
            layer_tokens=[
                left[max(cut for cut in left if cut < layer)] for layer in range(self.depth)
            ],
            **costs,
        )

    def _costs(self, row: int, present: dict[int, int]) -> dict[str, int]:
        """FLOPs and KV bytes; ``present`` maps each cut to its number of kept tokens."""
        record, ones = self.record, [1.0] * self.depth
        seen, stored = (int(x) for x in self.context[row])
        prompt = int(self.own_valid[row].sum())
        if record.continued:
            tokens = [prompt] * self.depth
        else:
            left, tokens = present[-1], []
            for layer in range(self.depth):
                left = present.get(layer - 1, left)
                tokens.append(left)
        final = tokens[-1] if record.continued else min(present.values())
        dense, sparse = [prompt] * self.depth, tokens
        heads = prompt if record.logit_rows > 1 else 1, final if record.logit_rows > 1 else 1
        ratios = [k / f for k, f in zip(self.counts, self.widths, strict=True)]
        contexts = [seen] * self.depth, [stored] * self.depth
        after = [seen + prompt] * self.depth, [stored + final] * self.depth
        step = [1] * self.depth
        head = 2 * self.head_macs
        return {
            "prefill_flops": text_flops(self.costs, sparse, contexts[1], ones) + head * heads[1],
            "dense_prefill_flops": text_flops(self.costs, dense, contexts[0], ones)
            + head * heads[0],
            "decode_flops": text_flops(self.costs, step, after[1], ratios) + head,
            "dense_decode_flops": text_flops(self.costs, step, after[0], ones) + head,
            "kv_bytes": self._kv_bytes(stored + final),
            "dense_kv_bytes": self._kv_bytes(seen + prompt),
        }

    def _kv_bytes(self, tokens: int) -> int:
        if not self.record.cached:
            return 0
        return sum(c.kv_bytes * min(tokens, c.window or tokens) for c in self.costs)


def _finite(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None


def _count_new_tokens(record: Record) -> list[int]:
    """Per row: generated tokens up to and including the first end-of-sequence token."""
    rows = record.valid.shape[0]
    generated = record.steps + 1
    if record.sequences is None:
        return [generated if record.steps or record.logit_rows == 1 else 0] * rows
    new = record.sequences[:, record.prompt_width :].cpu()
    out = []
    for row in range(rows):
        line = new[row * len(new) // rows].tolist()
        stops = [i for i, token in enumerate(line) if token in record.ends]
        out.append(stops[0] + 1 if stops else len(line))
    return out
