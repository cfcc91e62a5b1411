"""Decode steps in compiled code, where the call supports it.

Shapes: B samples, d hidden size, D head dimension.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from corematching.backends.cpu.layout import Layout, OddDecoderError, read_layout
from corematching.backends.cpu.native import KERNEL, MAX_BATCH, DecodeStep, Plan, use_large_pages
from corematching.backends.cpu.selfcheck import agrees
from corematching.backends.kv_buffers import CacheBuffers
from corematching.backends.plain_step import embed_step, is_plain_step
from corematching.backends.sparse_ffn import SparseFFN
from corematching.cache.pruned_cache import log_counts_of
from corematching.errors import InvalidTensorError
from corematching.model.ffn import FFNParts
from corematching.model.hooks import HookMonitor, captures_outputs
from corematching.model.patching import Patches
from corematching.model.snapshot import WeightSnapshot
from corematching.model.spec import ModelSpec

log = logging.getLogger(__name__)


class NativeSteps:
    """Replaces a decoder's forward for decode steps on a DynamicCache.

    Everything else (prompts, static caches, gradients, foreign hooks, attention maps) runs through
    the decoder's own forward.

    Parameters
    ----------
    parts : ModelSpec
        The model's parts.
    sparse : mapping
        The layers' sparse FFNs, by layer.

    Attributes
    ----------
    count : int
        Native steps.
    ffns : list of FFNParts
        The layers' FFNs; empty if one of them is unsupported.
    reason : str
        Why steps cannot run natively; empty where they can.
    """

    def __init__(self, parts: ModelSpec, sparse: Mapping[int, SparseFFN]) -> None:
        self.parts, self.sparse = parts, sparse
        self.count = 0
        self.reason = ""
        self._decoder: Any = parts.decoder
        self._patches = Patches()
        self._addresses: tuple[int, ...] = ()
        self.ffns: list[FFNParts] = []
        self._dense: list[Plan] = []
        self._layout: Layout | None = None
        self._step: DecodeStep | None = None
        self._buffers: CacheBuffers | None = None
        self._hooks = HookMonitor([])
        self._watch = WeightSnapshot()

    def install(self) -> None:
        """Replace the decoder's forward on its instance, if it is supported."""
        self.refresh()
        if self._step is not None and not agrees(self):
            self.reason, self._step = "a probe gave other numbers than its own forward", None
        if self._step is None:
            log.info("%s decodes in PyTorch: %s", type(self._decoder).__name__, self.reason)
            return
        self._patches.wrap(self._decoder, "forward", self._forward)

    def remove(self) -> None:
        """Restore the decoder's own forward."""
        self._patches.undo()
        self._step = self._layout = self._buffers = None
        self._addresses = ()

    def refresh(self) -> None:
        """Read the weights again if they were moved, cast or replaced."""
        if self._step is not None and self._watch.unchanged():
            return
        try:
            if not self.ffns:
                self.ffns = [
                    self.sparse[i].parts if i in self.sparse else FFNParts(ffn)
                    for i, ffn in enumerate(self.parts.ffns)
                ]
            layout = read_layout(self.parts, self.ffns)
            self._refuse_ffns(layout)
        except Exception as error:
            if not isinstance(error, OddDecoderError):
                log.debug("unreadable decoder", exc_info=True)
            self.reason, self._step, self._addresses = str(error), None, ()
            return
        self._watch = WeightSnapshot([*self.parts.layers, self._decoder.norm])
        addresses = tuple(tensor.data_ptr() for tensor in layout.tensors)
        if addresses == self._addresses:
            return
        try:
            self._prepare(layout)
        except InvalidTensorError as error:
            self.reason, self._step, self._addresses = str(error), None, ()
            return
        self._addresses, self._layout, self.reason = addresses, layout, ""

    def _prepare(self, layout: Layout) -> None:
        shape = layout.shape
        use_large_pages(layout.tensors)
        earlier: list[Plan | None] = [*self._dense] or [None] * len(self.ffns)
        self._dense = [
            KERNEL.prepare_dense(ffn.by_neuron(), ffn.down.weight.detach(), ffn.bias(), old)
            for ffn, old in zip(self.ffns, earlier, strict=True)
        ]
        self._step = DecodeStep(layout.layers, layout.final_norm, shape)
        self._buffers = CacheBuffers(
            len(layout.layers), shape.kv_heads, shape.head_dim, layout.final_norm.dtype
        )
        modules = [m for layer in self.parts.layers for m in layer.modules()]
        self._hooks = HookMonitor([*modules, self._decoder.norm], ignored=[captures_outputs])

    @property
    def form(self) -> tuple[str, ...]:
        """The key of a self-check's verdict: dtype, configuration and module classes."""
        kinds = {type(m).__qualname__ for layer in self.parts.layers for m in layer.modules()}
        dtype = "" if self._layout is None else str(self._layout.final_norm.dtype)
        return (dtype, repr(self._decoder.config.to_dict()), *sorted(kinds))

    def bytes_read(self, layer: int) -> int:
        """Bytes of FFN weights that native steps have read in a layer with all its neurons."""
        return self._dense[layer].bytes_read() if self._dense else 0

    def run(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """(B, 1, d) embeddings to the final norm's output (B, 1, d); None for unsupported calls."""
        step, buffers, cache = self._step, self._buffers, kwargs["past_key_values"]
        assert step is not None and buffers is not None and self._layout is not None
        batch = x.shape[0]
        stored = buffers.stored(cache, batch)
        plans = self._plans(batch)
        if stored is None or plans is None or x.dtype != self._layout.final_norm.dtype:
            return None
        valid, fits = _valid_columns(kwargs.get("attention_mask"), batch, stored + 1)
        cos_sin = self._rotations(x, kwargs.get("position_ids"), cache) if fits else None
        if cos_sin is None:
            return None
        log_counts = log_counts_of(cache, batch)
        with step.lock:
            buffer = buffers.take(cache, stored, batch)
            step.set_plans(plans, batch)
            step.set_buffer(buffer)
            out = step.run(x[:, 0].contiguous(), *cos_sin, valid, stored + 1, log_counts)
            buffers.show(cache, buffer, stored + 1)
        return out[:, None]

    def _forward(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not self._is_plain_step(args, kwargs):
            return original(*args, **kwargs)
        out = self.run(embed_step(self._decoder, kwargs), kwargs)
        if out is None:
            return original(*args, **kwargs)
        self.count += 1
        return BaseModelOutputWithPast(
            last_hidden_state=out, past_key_values=kwargs["past_key_values"]
        )

    def _is_plain_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the kernels support this call."""
        if self._step is None or not is_plain_step(self._decoder, args, kwargs):
            return False
        ids, x = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        token: Any = ids if x is None else x
        fits = 0 < token.shape[0] <= MAX_BATCH and token.device.type == "cpu"
        return fits and not self._hooks.sees_any()

    def _plans(self, batch: int) -> list[Plan] | None:
        """The plan of each layer's FFN, or None if one has no plan.

        Raises
        ------
        InputError
            The neurons were chosen for another number of rows.
        """
        plans = list(self._dense)
        for index, ffn in self.sparse.items():
            if not ffn.active:
                continue
            if not isinstance(ffn.plan, Plan) or ffn.plan.sets is None:
                return None
            ffn.check_batch(batch)
            plans[index] = ffn.plan
        return plans

    def _rotations(
        self, x: Tensor, positions: Tensor | None, cache: Any
    ) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of the step's positions, (B, D) each; None for another form."""
        rotary = self._decoder.rotary_emb
        if positions is None:
            positions = torch.full((1, 1), int(cache.get_seq_length()))
        if hasattr(rotary, "mrope_section"):
            if positions.ndim == 2:
                positions = positions[None].expand(3, -1, -1)
            positions = positions[-3:]
        pair = rotary(x, positions)
        shape = self._layout.shape if self._layout is not None else None
        if shape is None or any(t.ndim != 3 or t.shape[1:] != (1, shape.head_dim) for t in pair):
            return None
        cos, sin = (t[:, 0].float().expand(x.shape[0], -1).contiguous() for t in pair)
        return cos, sin

    def _refuse_ffns(self, layout: Layout) -> None:
        for ffn, module in zip(layout.ffns, self.parts.ffns, strict=True):
            if ffn.activation_name is None:
                raise OddDecoderError(f"{type(module).__name__} has an unknown activation function")


def _valid_columns(mask: Any, batch: int, length: int) -> tuple[Tensor | None, bool]:
    """A mask over the cache's columns for the kernels, (B, S) uint8 or None, and its validity."""
    if mask is None:
        return None, True
    if not isinstance(mask, Tensor) or mask.shape != (batch, length):
        return None, False
    return mask.ne(0).to(torch.uint8).contiguous(), True
