"""A whole decode step of a Llama-like decoder in one call."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from corematching.backends.cpu.native.build import find_library
from corematching.backends.cpu.native.kernel import DTYPES, Plan, address
from corematching.backends.cpu.native.structs import LayerStruct, StepStruct
from corematching.backends.kernels.check import check_dims, check_optional, check_tensor, describe
from corematching.errors import InvalidTensorError


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

    Plans, buffer and scratch memory belong to one step at a time: whoever sets them holds the
    `lock` until the step has run.

    Parameters
    ----------
    layers : list of LayerWeights
        In order; all tensors contiguous, on the CPU, of one dtype.
    final_norm : Tensor
        (d,).
    shape : Shape
        What the layers have in common.

    Attributes
    ----------
    lock : threading.RLock
        Held from `set_plans` to the end of `run`.

    Raises
    ------
    InvalidTensorError
        A weight is of another shape or dtype, or not contiguous; the heads do not share keys
        evenly, or are of an odd size.
    """

    def __init__(self, layers: list[LayerWeights], final_norm: Tensor, shape: Shape) -> None:
        _check_weights(layers, final_norm, shape)
        self.lock = threading.RLock()
        self._kept = layers, final_norm
        self._shape = shape
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
        """Which neurons each layer's FFN computes.

        Raises
        ------
        InvalidTensorError
            So many rows cannot be computed, or an FFN is of another size or dtype.
        """
        same = len(plans) == len(self._plans) and all(map(_is, plans, self._plans))
        if batch == self._struct.batch and same:
            return
        final = self._kept[1]
        for plan in plans:
            up = plan.weights.up
            check_tensor("up", up, (up.shape[0], final.shape[0]), final.dtype)
        fitted = [plan.fit(batch) for plan in plans]
        for struct, ffn in zip(self._layers, fitted, strict=True):
            struct.ffn = ffn
        self._plans = list(plans)
        self._struct.batch = batch

    def set_buffer(self, buffer: Tensor) -> None:
        """(2 * layers, B, kv_heads, capacity, head_dim): keys and values of each layer in turn.

        Raises
        ------
        InvalidTensorError
            It has another shape or dtype, or is not contiguous.
        """
        if buffer is self._buffer:
            return
        check_dims("the buffer", buffer, 5)
        batch, shape = self._struct.batch, self._shape
        sizes = (2 * len(self._layers), batch, shape.kv_heads, buffer.shape[3], shape.head_dim)
        check_tensor("the buffer", buffer, sizes, self._kept[1].dtype)
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
        log_counts: Tensor | None = None,
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
        log_counts : Tensor or None
            (B, columns), contiguous, float32: what is added to the scores of the first columns.

        Returns
        -------
        Tensor
            (B, d), behind the final norm.

        Raises
        ------
        InvalidTensorError
            Something is of another shape, dtype or layout, or longer than the buffer.
        """
        library = find_library()
        assert library is not None
        self._check(x, cos, sin, valid, length, log_counts)
        struct, out = self._struct, torch.empty_like(x)
        struct.x, struct.out = x.data_ptr(), out.data_ptr()
        struct.cos, struct.sin, struct.valid = cos.data_ptr(), sin.data_ptr(), address(valid)
        struct.log_counts = address(log_counts)
        struct.weighed = 0 if log_counts is None else log_counts.shape[1]
        struct.length, struct.threads = length, torch.get_num_threads()
        need = (struct.batch, struct.capacity, struct.threads)
        if need != self._need:
            self._scratch = torch.empty(library.cm_step_scratch(ctypes.byref(struct)))
            struct.scratch, self._need = self._scratch.data_ptr(), need
        library.cm_step(ctypes.byref(struct), self._is_bf16)
        return out

    def _check(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        valid: Tensor | None,
        length: int,
        log_counts: Tensor | None,
    ) -> None:
        struct, buffer = self._struct, self._buffer
        batch = struct.batch
        if buffer is None or buffer.shape[1] != batch or not 0 < length <= struct.capacity:
            raise InvalidTensorError(
                f"a step of {batch} rows at length {length} does not fit a buffer of "
                f"{'nothing' if buffer is None else tuple(buffer.shape)}: set plans and a buffer "
                "of that many rows, with room for the token"
            )
        check_tensor("x", x, (batch, struct.hidden), buffer.dtype)
        check_tensor("the cosines", cos, (batch, struct.head_dim), torch.float32)
        check_tensor("the sines", sin, (batch, struct.head_dim), torch.float32)
        check_optional("the valid columns", valid, (batch, length), torch.uint8)
        if log_counts is not None:
            check_dims("the log_counts", log_counts, 2)
            columns = log_counts.shape[-1]
            check_tensor("the log_counts", log_counts, (batch, columns), torch.float32)


def _is(a: object, b: object) -> bool:
    return a is b


def _check_weights(layers: list[LayerWeights], final_norm: Tensor, shape: Shape) -> None:
    check_dims("the final norm", final_norm, 1)
    hidden, dtype = final_norm.shape[0], final_norm.dtype
    heads, kv_heads, size = shape.heads, shape.kv_heads, shape.head_dim
    if min(heads, kv_heads, size, hidden, len(layers)) < 1 or heads % kv_heads or size % 2:
        raise InvalidTensorError(
            f"{len(layers)} layers of {heads} heads over {kv_heads} with {size} numbers each, "
            f"behind norms {describe(final_norm)}, cannot be computed: heads must share keys "
            "evenly, and be of an even size"
        )
    check_tensor("the final norm", final_norm, (hidden,), *DTYPES)
    q, kv = heads * size, kv_heads * size
    shapes = {
        "attention_norm": (hidden,), "ffn_norm": (hidden,), "q": (q, hidden), "k": (kv, hidden),
        "v": (kv, hidden), "o": (hidden, q), "q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,),
        "o_bias": (hidden,), "q_norm": (size,), "k_norm": (size,),
    }  # fmt: skip
    for layer in layers:
        for name, tensor in vars(layer).items():
            required = name in ("attention_norm", "ffn_norm", "q", "k", "v", "o")
            if required or tensor is not None:
                check_tensor(name, tensor, shapes[name], dtype)
