"""A whole decode step of a Llama-like decoder in one call."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from .build import find_library
from .kernel import Plan, address
from .structs import LayerStruct, StepStruct


@dataclass(frozen=True)
class LayerWeights:
    """A decoder layer without its FFN; matrices are (outputs, inputs), the rest vectors."""

    attention_norm: Tensor
    ffn_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass(frozen=True)
class Shape:
    """What a decoder's layers have in common.

    Attributes
    ----------
    heads, kv_heads, head_dim : int
        Of the attention.
    epsilon : float
        Of the norms.
    scaling : float
        What scores are multiplied by.
    """

    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    scaling: float


class DecodeStep:
    """Computes one token per row through all layers of a decoder.

    Parameters
    ----------
    layers : list of LayerWeights
        In order; all tensors contiguous, on the CPU, of one dtype.
    final_norm : Tensor
        (d,).
    shape : Shape
        What the layers have in common.
    """

    def __init__(self, layers: list[LayerWeights], final_norm: Tensor, shape: Shape) -> None:
        self._kept = layers, final_norm
        self._plans: list[Plan | None] = [None] * len(layers)
        self._buffer: Tensor | None = None
        self._scratch = torch.empty(0)
        self._need: tuple[int, ...] = ()
        self._is_bf16 = int(final_norm.dtype == torch.bfloat16)
        self._layers = (LayerStruct * len(layers))()
        for struct, weights in zip(self._layers, layers, strict=True):
            for name, tensor in vars(weights).items():
                setattr(struct, name, address(tensor))
        self._struct = StepStruct(
            layers=self._layers,
            final_norm=address(final_norm),
            num_layers=len(layers),
            hidden=final_norm.shape[0],
            **vars(shape),
        )

    def set_plans(self, plans: list[Plan], batch: int) -> None:
        """Which neurons each layer's FFN computes."""
        if batch == self._struct.batch and all(map(_is, plans, self._plans)):
            return
        for struct, plan in zip(self._layers, plans, strict=True):
            struct.ffn = plan.fit(batch)
        self._plans = list(plans)
        self._struct.batch = batch

    def set_buffer(self, buffer: Tensor) -> None:
        """(2 * layers, B, kv_heads, capacity, head_dim): keys and values of each layer in turn."""
        if buffer is self._buffer:
            return
        start, size = buffer.data_ptr(), buffer.stride(0) * buffer.element_size()
        for index, struct in enumerate(self._layers):
            struct.keys, struct.values = start + 2 * index * size, start + (2 * index + 1) * size
        self._struct.capacity = buffer.shape[3]
        self._buffer = buffer

    def run(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        valid: Tensor | None,
        length: int,
        logarithms: Tensor | None = None,
    ) -> Tensor:
        """One step.

        Parameters
        ----------
        x : Tensor
            (B, d), the tokens' embeddings.
        cos, sin : Tensor
            (B, head_dim), contiguous, float32.
        valid : Tensor or None
            (B, length), contiguous, uint8: which columns of the cache are seen.
        length : int
            Columns of the cache, this token's included; its keys and values are stored in the last.
        logarithms : Tensor or None
            (B, columns), contiguous, float32: what is added to the scores of the first columns.

        Returns
        -------
        Tensor
            (B, d), behind the final norm.
        """
        library = find_library()
        assert library is not None
        struct, out = self._struct, torch.empty_like(x)
        struct.x, struct.out = x.data_ptr(), out.data_ptr()
        struct.cos, struct.sin, struct.valid = cos.data_ptr(), sin.data_ptr(), address(valid)
        struct.logarithms = address(logarithms)
        struct.weighed = 0 if logarithms is None else logarithms.shape[1]
        struct.length, struct.threads = length, torch.get_num_threads()
        need = (struct.batch, struct.capacity, struct.threads)
        if need != self._need:
            self._scratch = torch.empty(library.cm_step_scratch(ctypes.byref(struct)))
            struct.scratch, self._need = self._scratch.data_ptr(), need
        library.cm_step(ctypes.byref(struct), self._is_bf16)
        return out


def _is(a: object, b: object) -> bool:
    return a is b
