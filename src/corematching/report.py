"""What one run kept, dropped and saved.

FLOPs count a multiply-add as two, from the shapes that ran. They include linear layers at their
real sizes (grouped key-value heads too), attention over all pairs of tokens without a discount for
causality, and the output projection to the vocabulary. They leave out norms, activations and the
policy's arithmetic; the vision tower is counted apart. "Dense" is the same model on the same prompt
with nothing dropped.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from corematching.report_sample import SampleReport, plain, ratio
from corematching.report_table import (
    TableRow,
    draw_table,
    write_bytes,
    write_count,
    write_flops,
    write_seconds,
)

__all__ = ["MemoryReport", "PathReport", "Report", "SampleReport", "Timing"]


class Timing(Protocol):
    """Latencies of one answer, in seconds.

    Attributes
    ----------
    ttft : float
        Time to the first token.
    tpot : float or None
        Time per further token; None where there was none.
    """

    @property
    def ttft(self) -> float: ...

    @property
    def tpot(self) -> float | None: ...


@dataclass
class MemoryReport:
    """Device memory of a run under a memory cap, in bytes.

    Attributes
    ----------
    cap_bytes : int
        The cap.
    resident_bytes : int
        Weights that stay in memory: all but the FFNs of the layers with chosen neurons.
    slot_bytes : int
        Buffers for the streamed layers.
    chosen_bytes : int
        Copies of the chosen neurons.
    cache_bytes : int
        Estimated KV cache for the whole prompt and, in generate(), all new tokens.
    planned_bytes : int
        Estimated total of the run.
    streamed_bytes : int
        Weights brought into memory during the run.
    peak_bytes : int
        Measured peak.
    """

    cap_bytes: int
    resident_bytes: int
    slot_bytes: int
    chosen_bytes: int
    cache_bytes: int
    planned_bytes: int
    streamed_bytes: int
    peak_bytes: int


@dataclass
class PathReport:
    """How often the backend's own code ran instead of the model's forwards.

    Attributes
    ----------
    native_layers : int
        Decoder layers of the prompt that ran in compiled CPU code.
    native_steps : int
        Decode steps that ran in compiled CPU code.
    graph_replays : int
        Decode steps replayed from a CUDA graph.
    """

    native_layers: int = 0
    native_steps: int = 0
    graph_replays: int = 0


@dataclass(repr=False)
class Report:
    """One generate() or one forward pass of a prompt.

    Attributes
    ----------
    method : dict
        The method, as ``method.to_dict()`` gives it.
    model : str
        The checkpoint's path or Hub id, or the model's class.
    model_type : str
        ``config.model_type``.
    dtype, device : str
        Of the text model's weights.
    attention : str
        The attention implementation.
    num_layers : int
        Decoder layers.
    drop_layers : list of int
        Layers after which tokens were dropped.
    neurons : list of int
        Neurons of a decode step in each layer.
    widths : list of int
        Neurons of each layer.
    prefill_seconds : float
        The prompt's forward pass, without the vision tower.
    vision_seconds : float
        The vision tower's time; 0 where none ran.
    vision_flops : int
        FLOPs of the vision tower's linear and convolution layers, all samples together.
    decode_seconds : float
        From the end of the prefill to the end of the last decode step.
    decode_steps : int
        Decode steps.
    kernel : str
        The code that ran the decode steps: ``torch``, a kernel's FFNs, or native steps.
    decode_bytes, dense_decode_bytes : int
        Weight bytes read by one decode step of the whole batch, with the chosen and with all
        neurons: attention, FFNs, output projection. Kernels count the rows that they read.
    continued : bool
        Whether this turn continued from an earlier turn's cache. The samples' choices are then
        the earlier ones, and their prompts count the new tokens only.
    memory : MemoryReport or None
        Memory of a run under a cap.
    path : PathReport
        How often the backends' own code ran.
    samples : list of SampleReport
        Per sample.
    """

    method: dict[str, Any]
    model: str
    model_type: str
    dtype: str
    device: str
    attention: str
    num_layers: int
    drop_layers: list[int]
    neurons: list[int]
    widths: list[int]
    prefill_seconds: float
    vision_seconds: float
    decode_seconds: float
    decode_steps: int
    vision_flops: int = 0
    kernel: str = "torch"
    decode_bytes: int = 0
    dense_decode_bytes: int = 0
    continued: bool = False
    memory: MemoryReport | None = None
    path: PathReport = field(default_factory=PathReport)
    samples: list[SampleReport] = field(default_factory=list)

    @property
    def token_retention_ratio(self) -> float:
        """Kept image tokens / image tokens over all samples."""
        return self._ratio("kept_tokens", "image_tokens")

    @property
    def layer_token_ratio(self) -> float:
        """Image tokens per layer, averaged over layers / image tokens, over all samples."""
        computed = sum(sum(sample.layer_tokens) for sample in self.samples)
        return ratio(computed, self.num_layers * sum(s.image_tokens for s in self.samples))

    @property
    def neuron_retention_ratio(self) -> float:
        """Neurons of a decode step / all neurons."""
        return ratio(sum(self.neurons), sum(self.widths))

    @property
    def prefill_flops_ratio(self) -> float:
        """FLOPs of the prefill / dense ones, over all samples."""
        return self._ratio("prefill_flops", "dense_prefill_flops")

    @property
    def decode_flops_ratio(self) -> float:
        """FLOPs of a decode step / dense ones, over all samples."""
        return self._ratio("decode_flops", "dense_decode_flops")

    @property
    def kv_ratio(self) -> float:
        """KV bytes / dense ones, over all samples."""
        return self._ratio("kv_bytes", "dense_kv_bytes")

    @property
    def decode_bytes_ratio(self) -> float:
        """Weight bytes of a decode step / dense ones."""
        return ratio(self.decode_bytes, self.dense_decode_bytes)

    @property
    def ttft_seconds(self) -> float:
        """Time to the first token: vision tower and prefill, without preprocessing."""
        return self.prefill_seconds + self.vision_seconds

    @property
    def tpot_seconds(self) -> float:
        """Seconds per decode step; 0 where none ran."""
        return self.decode_seconds / self.decode_steps if self.decode_steps else 0.0

    def _ratio(self, part: str, whole: str) -> float:
        return ratio(self._sum(part), self._sum(whole))

    def to_dict(self) -> dict[str, Any]:
        """All fields and ratios as JSON-serializable values (None for NaN)."""
        names = (
            "token_retention_ratio",
            "layer_token_ratio",
            "neuron_retention_ratio",
            "prefill_flops_ratio",
            "decode_flops_ratio",
            "kv_ratio",
            "decode_bytes_ratio",
            "ttft_seconds",
            "tpot_seconds",
        )
        out = asdict(self) | {name: getattr(self, name) for name in names}
        out["samples"] = [sample.to_dict() for sample in self.samples]
        return plain(out)

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict` as a JSON object.

        Parameters
        ----------
        indent : int, optional
            Spaces per level; default: everything on one line.
        """
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def table(self, sparse: Timing | None = None, dense: Timing | None = None) -> str:
        """A plain-text table of this run and the dense one, all samples together.

        Parameters
        ----------
        sparse : Timing, optional
            Latencies of this run. Default: the report's own times, without the processor.
        dense : Timing, optional
            Latencies of the dense model on the same prompt.
        """
        steps = self.decode_steps
        ttft = self.ttft_seconds if sparse is None else sparse.ttft
        tpot = (self.tpot_seconds if steps else None) if sparse is None else sparse.tpot
        rows = [
            self._row("image tokens", "image_tokens", "kept_tokens", write_count),
            TableRow("neurons per step", sum(self.widths), sum(self.neurons), write_count),
            self._row("prefill FLOPs", "dense_prefill_flops", "prefill_flops", write_flops),
            self._row("FLOPs per step", "dense_decode_flops", "decode_flops", write_flops),
            self._row("KV cache", "dense_kv_bytes", "kv_bytes", write_bytes),
            TableRow("TTFT", None if dense is None else dense.ttft, ttft, write_seconds),
            TableRow("TPOT", None if dense is None else dense.tpot, tpot, write_seconds),
        ]
        return draw_table(self._size if len(self.samples) > 1 else "", rows)

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return (
            f"Report({self.method.get('name', '?')} on {self.model}: {self._size}, "
            f"image tokens {self.token_retention_ratio:.0%}, "
            f"neurons {self.neuron_retention_ratio:.0%}, kernel {self.kernel})"
        )

    @property
    def _size(self) -> str:
        return f"{len(self.samples)} sample{'' if len(self.samples) == 1 else 's'}"

    def _row(self, label: str, dense: str, sparse: str, write: Callable[[float], str]) -> TableRow:
        return TableRow(label, self._sum(dense), self._sum(sparse), write)

    def _sum(self, name: str) -> int:
        return sum(getattr(sample, name) for sample in self.samples)
