"""A layer of Llama's form, or of CLIP's tower, for a whole prompt, in one call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from corematching.backends.cpu.native.attention import (
    HEAD_DIM_STEP,
    describe_mask,
    why_unsupported_mask,
)
from corematching.backends.cpu.native.gemm import check_activation, check_kept, why_unsupported_gemm
from corematching.backends.cpu.native.library import (
    ACTIVATION_CODES,
    DTYPE_CODES,
    address,
    compiled,
    find_kernels,
)
from corematching.backends.cpu.native.rows import Norm, check_norm, check_rope
from corematching.backends.cpu.native.scratch import Scratch
from corematching.backends.kernels.check import check_optional, check_tensor
from corematching.errors import InvalidTensorError


class Computed(NamedTuple):
    """What a layer computes.

    Attributes
    ----------
    qkv : Tensor or None
        (B, T, (H + 2G) * D), queries, keys and values; None where they are rotated.
    key, value : Tensor or None
        (B, G, T, D), contiguous, the keys rotated; None where nothing is.
    middle : Tensor
        (B, T, d), behind the attention and its residual.
    active : Tensor
        (B, T, F), the FFN's activations.
    out : Tensor
        (B, T, d), behind the FFN and its residual.
    """

    qkv: Tensor | None
    key: Tensor | None
    value: Tensor | None
    middle: Tensor
    active: Tensor
    out: Tensor


class PrefillLayer:
    """What does not change from prompt to prompt, prepared once.

    Parameters
    ----------
    weights : mapping
        ``q``, ``k``, ``v``, ``o``, ``up``, ``down`` and, of a gated FFN, ``gate``, each (outputs,
        inputs), of one dtype, float32 or bfloat16, contiguous; ``down`` may be stored by input.
        Biases, (outputs,), under ``<name>_bias``, may be None or missing.
    norms : tuple of Norm
        In front of the attention and of the FFN.
    head_dim : int
        D, numbers of a head, a multiple of 8.
    activation : str
        Of the gate, or of ``up`` without one.
    scaling : float
        Of the attention's scores.
    scratch : Scratch
        Memory to work in.

    Attributes
    ----------
    ffn_norm : Norm
        The second of the norms.

    Raises
    ------
    InvalidTensorError
        The weights do not make a layer that the kernels can compute.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor | None],
        norms: tuple[Norm, Norm],
        head_dim: int,
        activation: str,
        scaling: float,
        scratch: Scratch,
    ) -> None:
        _check_layer(weights, norms, head_dim, activation)
        self._kept, self._scratch = (dict(weights), norms), scratch
        first, second = norms
        q, k, up, down = (weights[name] for name in ("q", "k", "up", "down"))
        assert q is not None and k is not None and up is not None and down is not None
        self.ffn_norm, self._dtype = second, q.dtype
        self._kv_heads, self._head_dim = k.shape[0] // head_dim, head_dim
        self._hidden, self._width = q.shape[1], up.shape[0]
        self._joint = q.shape[0] + 2 * k.shape[0]
        self._struct = compiled.PrefillLayer().set(
            **{name: address(weight) for name, weight in weights.items()},
            attention_norm=address(first.weight), attention_norm_bias=address(first.bias),
            ffn_norm=address(second.weight), ffn_norm_bias=address(second.bias),
            hidden=self._hidden, heads=q.shape[0] // head_dim, kv_heads=self._kv_heads,
            head_dim=head_dim, width=self._width, attention_epsilon=first.epsilon,
            ffn_epsilon=second.epsilon, scaling=scaling, down_by_input=not down.is_contiguous(),
            activation=ACTIVATION_CODES[activation], dtype=DTYPE_CODES[q.dtype],
        )  # fmt: skip

    @staticmethod
    def supports(x: Tensor, mask: Tensor | None) -> bool:
        """Whether the tokens of x, (B, T, d), can attend to each other under this mask."""
        batch, length, _ = x.shape
        return length > 0 and why_unsupported_mask(mask, x.dtype, batch, length, length) is None

    def run(
        self,
        x: Tensor,
        cos_sin: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        causal: bool,
        middle: Tensor | None = None,
        kept: tuple[Tensor, Tensor] | None = None,
    ) -> Computed:
        """(B, T, d) through the layer.

        Parameters
        ----------
        x : Tensor
            (B, T, d), of the weights' dtype, contiguous.
        cos_sin : tuple of Tensor or None
            Cosines and sines, (B or 1, T, D) each; None: nothing is rotated.
        mask, causal
            As `PrefillAttention.attend` takes them.
        middle : Tensor, optional
            Like x; memory for `Computed.middle`.
        kept : tuple of Tensor or None
            As `Gemm.gated` takes it.

        Raises
        ------
        InvalidTensorError
            Something is of another shape, dtype or layout.
        """
        self._check_call(x, mask, middle, kept)
        batch, length, _ = x.shape
        middle = torch.empty_like(x) if middle is None else middle
        active, out = x.new_empty(batch, length, self._width), torch.empty_like(x)
        call = compiled.Prefill().set(
            x=x.data_ptr(), middle=middle.data_ptr(), out=out.data_ptr(),
            active=active.data_ptr(), batch=batch, length=length, causal=bool(causal),
            threads=torch.get_num_threads(),
        )  # fmt: skip
        qkv = key = value = None
        if cos_sin is None:
            qkv = x.new_empty(batch, length, self._joint)
            call.qkv = qkv.data_ptr()
        else:
            cos, sin = (part.contiguous() for part in cos_sin)
            check_rope(x, cos, sin, self._head_dim)
            key, value = x.new_empty(2, batch, self._kv_heads, length, self._head_dim).unbind()
            call.set(
                cos=cos.data_ptr(), sin=sin.data_ptr(), keys=key.data_ptr(),
                values=value.data_ptr(), rope_rows=cos.shape[0] * length,
            )  # fmt: skip
        if kept is not None:
            call.gate_slots, call.kept_gates = map(address, kept)
        if mask is not None:
            call.set(**describe_mask(mask))
        self._compute(call)
        return Computed(qkv, key, value, middle, active, out)

    def _compute(self, call: Any) -> None:
        kernels = find_kernels()
        call.scratch = self._scratch.reserve(kernels.prefill_layer_scratch(self._struct, call))
        kernels.prefill_layer(self._struct, call)

    def _check_call(
        self,
        x: Tensor,
        mask: Tensor | None,
        middle: Tensor | None,
        kept: tuple[Tensor, Tensor] | None,
    ) -> None:
        if x.ndim != 3 or not self.supports(x, mask):
            raise InvalidTensorError(
                "these tokens cannot attend to each other under this mask: call `supports` first"
            )
        check_tensor("x", x, (*x.shape[:2], self._hidden), self._dtype)
        check_optional("the room for the middle", middle, tuple(x.shape), self._dtype)
        check_kept(kept, x.shape[0] * x.shape[1], self._width, self._dtype)


def _check_layer(
    weights: Mapping[str, Tensor | None], norms: tuple[Norm, Norm], head_dim: int, activation: str
) -> None:
    """Refuse weights of which the kernels would read something else."""
    for name in ("q", "k", "v", "o", "up", "down"):
        weight = weights.get(name)
        reason = "it is missing" if weight is None else why_unsupported_gemm(weight)
        if reason is not None:
            raise InvalidTensorError(f"a layer with this '{name}' cannot be computed: {reason}")
    q, k, up, down = (weights[name] for name in ("q", "k", "up", "down"))
    assert q is not None and k is not None and up is not None and down is not None
    (inner, hidden), keys, width, dtype = q.shape, k.shape[0], up.shape[0], q.dtype
    fits = head_dim > 0 and not head_dim % HEAD_DIM_STEP
    if not fits or keys % head_dim or inner % keys:
        raise InvalidTensorError(
            f"{inner} queries and {keys} keys are not heads of {head_dim} that share keys evenly: "
            f"a head's size must be a multiple of {HEAD_DIM_STEP}"
        )
    check_activation(activation)
    shapes = {
        "q": (inner, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, inner),
        "gate": (width, hidden), "up": (width, hidden), "down": (hidden, width),
    }  # fmt: skip
    for name, shape in shapes.items():
        weight = weights.get(name)
        turned = name == "down" and not down.is_contiguous()
        if weight is not None:
            stored, shape_stored = (weight.t(), shape[::-1]) if turned else (weight, shape)
            check_tensor(name, stored, shape_stored, dtype)
        check_optional(f"{name}_bias", weights.get(f"{name}_bias"), shape[:1], dtype)
    for norm in norms:
        check_norm(down.new_empty(hidden), norm)
