"""A whole decode step of a Llama-like decoder in one call."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from corematching.backends.cpu.native.kernel import Plan
from corematching.backends.cpu.native.library import (
    DTYPE_CODES,
    DTYPES,
    address,
    compiled,
    find_kernels,
)
from corematching.backends.kernels.check import check_dims, check_tensor, describe
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
        self._layers = compiled.DecoderLayers(len(layers))
        for index, weights in enumerate(layers):
            pointers = {name: address(tensor) for name, tensor in vars(weights).items()}
            self._layers[index].set(**pointers)
        self._struct = compiled.DecodeStep().set(
            final_norm=address(final_norm),
            hidden=final_norm.shape[0],
            dtype=DTYPE_CODES[final_norm.dtype],
            **vars(shape),
        )
        self._struct.set_layers(self._layers)

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
        for index, ffn in enumerate(fitted):
            self._layers[index].ffn = ffn
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
        for index in range(len(self._layers)):
            keys = start + 2 * index * size
            self._layers[index].set(keys=keys, values=keys + size)
        self._struct.capacity = buffer.shape[3]
        self._buffer = buffer

    def run(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        valid: Tensor | None,
        length: int | Tensor,
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
            (B, S) uint8, each row contiguous: which columns of the cache are seen. S is the
            length or, with a length for each row, at least the largest one.
        length : int or Tensor
            Columns of the cache, this token's included, whose keys and values are stored in the
            last of them; a tensor (B,) long gives each row its own.
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
        struct = self._struct
        if isinstance(length, Tensor):
            lengths, exact = length, False
        else:
            lengths, exact = torch.full((struct.batch,), length), True
        self._check(x, cos, sin, valid, lengths, exact, log_counts)
        kernels, out = find_kernels(), torch.empty_like(x)
        struct.set(
            x=x.data_ptr(), out=out.data_ptr(), cos=cos.data_ptr(), sin=sin.data_ptr(),
            lengths=lengths.data_ptr(), valid=address(valid),
            valid_stride=0 if valid is None else valid.stride(0), log_counts=address(log_counts),
            counted=0 if log_counts is None else log_counts.shape[1],
            threads=torch.get_num_threads(),
        )  # fmt: skip
        need = kernels.decode_scratch(struct)
        if need > self._scratch.numel():
            self._scratch = torch.empty(need, dtype=torch.float32)
        struct.scratch = self._scratch.data_ptr()
        kernels.decode_step(struct)
        return out

    def _check(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        valid: Tensor | None,
        lengths: Tensor,
        exact: bool,
        log_counts: Tensor | None,
    ) -> None:
        struct, buffer = self._struct, self._buffer
        batch = struct.batch
        check_tensor("the lengths", lengths, (batch,), torch.long)
        known = lengths.tolist()
        longest = max(known, default=0)
        fits = min(known, default=0) > 0 and longest <= struct.capacity
        if buffer is None or buffer.shape[1] != batch or not fits:
            raise InvalidTensorError(
                f"a step of {batch} rows at lengths {known} does not fit a buffer of "
                f"{'nothing' if buffer is None else tuple(buffer.shape)}: set plans and a buffer "
                "of that many rows, with room for the token"
            )
        check_tensor("x", x, (batch, struct.hidden), buffer.dtype)
        check_tensor("the cosines", cos, (batch, struct.head_dim), torch.float32)
        check_tensor("the sines", sin, (batch, struct.head_dim), torch.float32)
        if valid is not None:
            _check_valid(valid, batch, longest, exact)
        if log_counts is not None:
            check_dims("the log_counts", log_counts, 2)
            columns = log_counts.shape[-1]
            check_tensor("the log_counts", log_counts, (batch, columns), torch.float32)


def _check_valid(valid: Tensor, batch: int, longest: int, exact: bool) -> None:
    """Refuse valid columns that are fewer than the cache's or, if ``exact``, more."""
    if exact:
        check_tensor("the valid columns", valid, (batch, longest), torch.uint8)
        return
    check_dims("the valid columns", valid, 2)
    row = valid[0] if len(valid) == batch else valid
    columns = max(longest, valid.shape[1])
    check_tensor("each row of valid columns", row, (columns,), torch.uint8)


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
