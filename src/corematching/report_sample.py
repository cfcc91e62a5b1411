"""The report of one sample; `corematching.report` defines the counts."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(repr=False)
class SampleReport:
    """One sample of a batch.

    Attributes
    ----------
    image_tokens, kept_tokens : int
        Image tokens of the prompt; image tokens in the last layer and the KV cache.
    keep_mask : list of bool
        Per image token, in the prompt's order.
    scores : list of float or None
        Per image token, from its last cut; None where no cut scored it.
    cut : float or None
        The lowest kept score of the last cut; None without image tokens.
    cut_layers : list of int
        Layers after which tokens were dropped; -1 is the input of layer 0.
    cuts : list of float or None
        The lowest kept score of each cut.
    kept_after : list of int
        Image tokens left after each cut.
    prompt_tokens : int
        Tokens of the prompt, image tokens included, padding not.
    new_tokens : int
        Generated tokens, the end-of-sequence token included.
    prefill_flops, dense_prefill_flops : int
        FLOPs of the prompt's pass through the text model.
    decode_flops, dense_decode_flops : int
        FLOPs of the first decode step.
    kv_bytes, dense_kv_bytes : int
        Bytes of the prompt's keys and values in the cache; 0 without a cache.
    layer_tokens : list of int
        Image tokens in each decoder layer.
    """

    image_tokens: int
    kept_tokens: int
    keep_mask: list[bool]
    scores: list[float | None]
    cut: float | None
    cut_layers: list[int]
    cuts: list[float | None]
    kept_after: list[int]
    prompt_tokens: int
    new_tokens: int
    prefill_flops: int
    dense_prefill_flops: int
    decode_flops: int
    dense_decode_flops: int
    kv_bytes: int
    dense_kv_bytes: int
    layer_tokens: list[int] = field(default_factory=list)

    @property
    def token_retention_ratio(self) -> float:
        """Kept image tokens / image tokens; 1 without image tokens."""
        return ratio(self.kept_tokens, self.image_tokens)

    @property
    def layer_token_ratio(self) -> float:
        """Image tokens per layer, averaged over layers / image tokens."""
        return ratio(sum(self.layer_tokens), self.image_tokens * len(self.layer_tokens))

    @property
    def prefill_flops_ratio(self) -> float:
        """FLOPs of the prefill / dense ones."""
        return ratio(self.prefill_flops, self.dense_prefill_flops)

    @property
    def decode_flops_ratio(self) -> float:
        """FLOPs of a decode step / dense ones."""
        return ratio(self.decode_flops, self.dense_decode_flops)

    @property
    def kv_ratio(self) -> float:
        """KV bytes / dense ones."""
        return ratio(self.kv_bytes, self.dense_kv_bytes)

    def __repr__(self) -> str:
        return (
            f"SampleReport({self.kept_tokens} of {self.image_tokens} image tokens, "
            f"{self.prompt_tokens} prompt tokens, {self.new_tokens} new tokens)"
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields and ratios as JSON-serializable values (None for NaN)."""
        names = (
            "token_retention_ratio",
            "layer_token_ratio",
            "prefill_flops_ratio",
            "decode_flops_ratio",
            "kv_ratio",
        )
        return plain(asdict(self) | {name: getattr(self, name) for name in names})


def ratio(part: float, whole: float) -> float:
    """``part / whole``; 1 where ``whole`` is 0."""
    return part / whole if whole else 1.0


def plain(value: Any) -> Any:
    """Nested values with NaN and infinities, which JSON lacks, replaced by None."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
