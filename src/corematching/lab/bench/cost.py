"""The least bytes and FLOPs of one request."""

from __future__ import annotations

from typing import Any

from torch import nn


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights, each counted once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def decode_bytes(report: Any) -> int:
    """Bytes that one decode step of a batch reads: weights, and the prompt's keys and values.

    Parameters
    ----------
    report : Report
        Of a run with at least one decode step.
    """
    return report.decode_bytes + sum(sample.kv_bytes for sample in report.samples)


def step_costs(model: Any, report: Any) -> dict[str, Any]:
    """FLOPs and bytes of a request's two phases, all samples together."""
    return {
        "vision_flops": report.vision_flops,
        "prefill_flops": sum(s.prefill_flops for s in report.samples),
        "decode_flops": sum(s.decode_flops for s in report.samples),
        "prefill_bytes": weight_bytes(model),
        "decode_bytes": decode_bytes(report),
        "kv_bytes": sum(s.kv_bytes for s in report.samples),
    }
