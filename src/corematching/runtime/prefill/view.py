"""Observers of one layer for policies: its attention without attention maps, and its FFN's gate.

The attention observer keeps the queries, keys and values that enter the layer's own attention
function. Rotations, norms, grouped heads and scales are then the layer's own, nothing is computed
twice, and the model keeps its attention implementation.
Shapes: B samples, T tokens, R queried rows, H attention heads, G key-value heads, D head dimension,
d hidden size, F intermediate neurons.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from corematching.cache.masks import take
from corematching.errors import UnsupportedModelError
from corematching.model.attention import output_projection
from corematching.model.ffn import find_activation
from corematching.model.gate_store import GateStore

OBSERVED = "corematching_observed"
_armed = threading.local()


class AttentionObserver:
    """Holds the queries, keys and values of one call of an attention module.

    Parameters
    ----------
    module : nn.Module
        A decoder layer's attention.

    Raises
    ------
    UnsupportedModelError
        The module has no configuration.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.query: Tensor | None = None  # (B, H, T, D)
        self.key: Tensor | None = None  # (B, G, T, D)
        self.value: Tensor | None = None  # (B, G, T, D)
        self.mask: Tensor | None = None
        self.options: dict[str, Any] = {}
        self._config: Any = getattr(module, "config", None)
        if self._config is None:
            raise UnsupportedModelError(
                f"{type(module).__name__} has no configuration that names its attention function, "
                "so its attention cannot be read: choose a token score that needs no attention"
            )
        self._implementation: str | None = None

    def arm(self, *_: Any) -> None:
        """Route the module's next attention call through `run`; a forward pre-hook."""
        self._implementation = self._config._attn_implementation_internal
        self._config._attn_implementation_internal = OBSERVED
        _armed.observer = self

    def disarm(self) -> None:
        """Restore the module's own attention function."""
        if self._implementation is not None:
            self._config._attn_implementation_internal = self._implementation
            self._implementation = None

    def run(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kw: Any) -> Any:
        """Keep the inputs, then call the module's own attention function."""
        name: Any = self._implementation
        self.disarm()
        self.query, self.key, self.value, self.mask, self.options = q, k, v, mask, kw
        own: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(name, own)
        return attend(module, q, k, v, mask, **kw)

    def rows(self, rows: Tensor, valid: Tensor) -> Tensor:
        """Attention probabilities of some rows.

        Parameters
        ----------
        rows : Tensor
            (B, R) long, indices of queries among the T present tokens.
        valid : Tensor
            (B, T) bool, False on padding.

        Returns
        -------
        Tensor
            (B, H, R, T), in float32; zeros in rows of padding.

        Raises
        ------
        UnsupportedModelError
            The module does not call a registered attention function.
        """
        query, key, _ = self._parts(valid.shape[1])
        heads, size = query.shape[1], query.shape[3]
        index = rows.to(query.device)[:, None, :, None].expand(-1, heads, -1, size)
        picked = query.gather(2, index).unflatten(1, (key.shape[1], -1))  # (B, G, H/G, R, D)
        scores = picked.float() @ key.float().transpose(-1, -2)[:, :, None]
        scores = scores.flatten(1, 2) * self.options.get("scaling", size**-0.5)
        if (cap := self.options.get("softcap")) is not None:
            scores = torch.tanh(scores / cap) * cap
        allowed, bias = self._visible(rows.to(query.device), valid.to(query.device))
        scores = (scores + bias).masked_fill(~allowed[:, None], float("-inf"))
        return scores.softmax(dim=-1).nan_to_num(0.0)

    def contributions(self, last: Tensor, valid: Tensor) -> Tensor:
        """Each token's term of the last token's attention output.

        Parameters
        ----------
        last : Tensor
            (B,) long, the last tokens' indices.
        valid : Tensor
            (B, T) bool, False on padding.

        Returns
        -------
        Tensor
            (B, T, d): sum over the heads of A[last, j] * W_O V_j.

        Raises
        ------
        UnsupportedModelError
            As in `rows`, or the module has no output projection under a known name.
        """
        weights = self.rows(last[:, None], valid)[:, :, 0]  # (B, H, T)
        query, _, value = self._parts(valid.shape[1])
        value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        mixed = (weights[..., None].to(value.dtype) * value).transpose(1, 2).flatten(2)
        output = output_projection(self.module)
        bias = getattr(output, "bias", None)
        return output(mixed) if bias is None else output(mixed) - bias

    def _parts(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        if self.query is None or self.key is None or self.value is None:
            raise UnsupportedModelError(
                f"{type(self.module).__name__} does not call a registered attention function, so "
                "its attention cannot be read: choose a token score that needs no attention"
            )
        return self.query, self.key[:, :, :length], self.value[:, :, :length]

    def _visible(self, rows: Tensor, valid: Tensor) -> tuple[Tensor, Tensor | float]:
        """Visible keys per row, (B, R, T) bool, and an additive bias, (B, 1, R, T) or 0."""
        length = valid.shape[1]
        allowed = valid[:, None, :].expand(-1, rows.shape[1], -1)
        mask = self.mask
        if isinstance(mask, Tensor) and mask.ndim == 4:
            mask = mask[..., :length].expand(rows.shape[0], -1, -1, -1)[:, :1]
            seen = mask.gather(2, rows[:, None, :, None].expand(-1, 1, -1, length))
            if seen.dtype == torch.bool:
                return allowed & seen[:, 0], 0.0
            return allowed & (seen[:, 0] > torch.finfo(seen.dtype).min / 2), seen.float()
        causal = self.options.get("is_causal")
        if causal if causal is not None else getattr(self.module, "is_causal", True):
            columns = torch.arange(length, device=rows.device)
            distance = rows[..., None] - columns  # (B, R, T)
            allowed = allowed & (distance >= 0)
            if (window := self.options.get("sliding_window")) is not None:
                allowed = allowed & (distance < window)
        return allowed, 0.0


class FFNObserver:
    """Holds the input of an FFN's last call and computes the gate ``act(gate(x))`` from it.

    The observer is a forward pre-hook, and accepts a deferred input
    (`corematching.model.hooks.promise_input`).

    Parameters
    ----------
    mlp : nn.Module
        An FFN whose gate is ``gate_proj``, or the first half of ``gate_up_proj``. Without a gate,
        the activations ``act(up(x))`` replace it.
    gates : GateStore
        Gates that the FFN's own call may have kept.
    begin : callable, optional
        Called with the observer when the FFN begins to run.
    """

    def __init__(
        self, mlp: Any, gates: GateStore, begin: Callable[[FFNObserver], None] = lambda _: None
    ) -> None:
        self._mlp, self._gates, self._begin = mlp, gates, begin
        self._source: Tensor | None = None
        self._make: Callable[[], Tensor] | None = None
        self._seen: Tensor | None = None
        self._activation: Any = find_activation(mlp)
        found = (getattr(mlp, name, None) for name in ("gate_proj", "gate_up_proj"))
        self._gate: Any = next((gate for gate in found if gate is not None), None)

    def __call__(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Keep the FFN's input."""
        inputs: Tensor = args[0]
        self.promise(inputs, lambda: inputs)

    def promise(self, source: Tensor, make: Callable[[], Tensor]) -> None:
        """Keep a deferred input: ``make()`` computes it from ``source``."""
        self._source, self._make, self._seen = source, make, None
        self._begin(self)

    @property
    def activation(self) -> nn.Module | None:
        """The module whose output is the gate, for `see`; None where there is none."""
        found = self._activation if self._gate is not None else None
        return found if isinstance(found, nn.Module) else None

    def see(self, _: nn.Module, __: tuple[Any, ...], gate: Tensor) -> None:
        """Keep the gate of all tokens, (B, T, F), until the call ends; a forward hook."""
        self._seen = gate

    @property
    def inputs(self) -> Tensor | None:
        """(B, T, d), the FFN's input."""
        return None if self._make is None else self._make()

    def forget(self) -> None:
        """Release the FFN's input and gate."""
        self._source = self._make = self._seen = None

    def gate(self, activations: Tensor) -> Callable[[Tensor], Tensor]:
        """A function for the gate of the call with these ``activations`` (B, T, F).

        The gate was kept during that call, or is recomputed without hooks on the gate's module.
        """
        source, make, width = self._source, self._make, activations.shape[-1]
        seen = self._seen
        if seen is not None and seen.shape == activations.shape:
            return functools.partial(take, seen)

        def compute(rows: Tensor) -> Tensor:  # (B, R) to (B, R, F)
            if self._gate is None or make is None:
                return take(activations, rows)
            kept = self._gates.find(self._mlp, source, rows)
            if kept is not None:
                return kept
            with torch.no_grad():
                return self._activation(self._gate.forward(take(make(), rows))[..., :width])

        return compute


def _observe_attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return _armed.observer.run(module, *args, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(OBSERVED, _observe_attention)
