"""Replays decode steps as a CUDA graph: one launch per token instead of about a thousand.

At small batch sizes, decode is launch-bound. The first step after a prompt runs eagerly on static
tensors, the second one is captured, and all others replay it. The cache remains an ordinary
DynamicCache. If the next prompt fits into the same tensors, its first step already replays.
Shapes: B samples, S columns of the buffer, K columns in use, d hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from corematching.backends.cuda.frame import Frame, make_frame, show_columns
from corematching.backends.kv_buffers import CacheBuffers
from corematching.backends.plain_step import embed_step, is_plain_step
from corematching.backends.sparse_ffn import SparseFFN
from corematching.cache.pruned_cache import log_counts_of
from corematching.model.hooks import HookMonitor, captures_outputs
from corematching.model.patching import Patches
from corematching.model.snapshot import WeightSnapshot
from corematching.model.spec import ModelSpec

log = logging.getLogger(__name__)

MOST_ROOM = 1024
"""Upper limit of a new buffer's columns for new tokens."""
STRIDE = 128
"""Columns are a multiple of this, so that prompts of similar length share a frame."""


class Recorder(Protocol):
    """Captures and replays the kernel launches of a function."""

    def capture(self, work: Callable[[], None]) -> None:
        """Capture the launches of ``work`` without running them."""
        ...

    def replay(self) -> None:
        """Launch the captured work on the same tensors."""
        ...


class CudaGraph:
    """The `Recorder` on a CUDA device."""

    def __init__(self) -> None:
        self._graph: Any = torch.cuda.CUDAGraph()

    def capture(self, work: Callable[[], None]) -> None:
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            work()

    def replay(self) -> None:
        self._graph.replay()


class GraphSteps:
    """Replaces a decoder's forward for decode steps on a DynamicCache.

    Everything else (prompts, static caches, sliding windows, flash attention, gradients, foreign
    hooks, attention maps) runs through the decoder's own forward.

    Parameters
    ----------
    parts : ModelSpec
        The model's parts.
    sparse : mapping
        The layers' sparse FFNs, by layer.
    make_recorder : callable
        Makes a `Recorder`.

    Attributes
    ----------
    count : int
        Replayed steps.
    captures : int
        Captured steps.
    room : int
        Expected number of new tokens.
    reason : str
        Why steps cannot be captured; empty where they can.
    """

    def __init__(
        self,
        parts: ModelSpec,
        sparse: Mapping[int, SparseFFN],
        make_recorder: Callable[[], Recorder] = CudaGraph,
    ) -> None:
        self.parts, self.sparse, self.make_recorder = parts, sparse, make_recorder
        self.count = self.captures = self.room = 0
        self.reason = ""
        self._decoder: Any = parts.decoder
        self._patches = Patches()
        self._forward_of_decoder: Any = None
        self._buffers: CacheBuffers | None = None
        self._frame: Frame | None = None
        self._stale = True
        self._watch = WeightSnapshot()
        modules = [module for layer in parts.layers for module in layer.modules()]
        final = getattr(parts.decoder, "norm", None)
        self._hooks = HookMonitor(
            [*modules, *([] if final is None else [final])], ignored=[captures_outputs]
        )

    def install(self) -> None:
        """Replace the decoder's forward on its instance."""
        self._forward_of_decoder = self._decoder.forward
        self._patches.wrap(self._decoder, "forward", self._forward)

    def remove(self) -> None:
        """Restore the decoder's own forward; free the captured step and its tensors."""
        self._patches.undo()
        self._frame = self._buffers = None

    def refresh(self) -> None:
        """Check weights and choices for changes at the next step."""
        self._stale = True

    def _forward(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or self.reason:
            return original(*args, **kwargs)
        if not is_plain_step(self._decoder, args, kwargs) or not self._can_run(kwargs):
            return original(*args, **kwargs)
        out = self._step(embed_step(self._decoder, kwargs), kwargs)
        if out is None:
            return original(*args, **kwargs)
        return BaseModelOutputWithPast(
            last_hidden_state=out, past_key_values=kwargs["past_key_values"]
        )

    def _can_run(self, kwargs: dict[str, Any]) -> bool:
        """Whether attention takes a mask over all columns, and the FFNs' tensors are static."""
        if self.parts.config._attn_implementation not in ("sdpa", "eager"):
            return False
        if "sliding_attention" in (getattr(self.parts.config, "layer_types", None) or ()):
            return False
        return not self._hooks.sees_any() and all(ffn.is_fixed for ffn in self.sparse.values())

    def _step(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """(B, 1, d) embeddings to the final norm's output (B, 1, d); None for unsupported calls."""
        cache, batch = kwargs["past_key_values"], x.shape[0]
        buffers = self._find_buffers(cache, x)
        stored = None if buffers is None else buffers.stored(cache, batch)
        window = getattr(self.parts.config, "sliding_window", None)
        if buffers is None or stored is None or (window and self._columns(stored) > window):
            return None
        visible = _visible(kwargs.get("attention_mask"), batch, stored + 1, x.device)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.full((1, 1), int(cache.get_seq_length()), device=x.device)
        if visible is None:
            return None
        with torch.inference_mode(False), torch.no_grad():
            frame = self._take_frame(buffers, cache, x, positions, stored)
            frame.x.copy_(x)
            frame.positions.copy_(positions)
            frame.column.fill_(stored)
            show_columns(frame.mask, visible, log_counts_of(cache, batch))
            if not self._run(frame):
                return None
            buffers.show(cache, frame.buffer, stored + 1)
            return frame.out.clone()

    def _run(self, frame: Frame) -> bool:
        """Run the frame's step: eagerly at first, then as a graph; False if capture fails."""

        def work() -> None:
            out = self._forward_of_decoder(
                inputs_embeds=frame.x,
                attention_mask=frame.mask,
                position_ids=frame.positions,
                past_key_values=frame.cache,
                use_cache=True,
            )
            frame.out.copy_(out.last_hidden_state)

        if not frame.addresses:
            work()
            frame.addresses = self._addresses()
            self._stale = False
            return True
        if frame.recorder is None:
            recorder = self.make_recorder()
            try:
                recorder.capture(work)
            except RuntimeError as error:
                log.warning("decode steps cannot be captured, they run one by one: %s", error)
                self.reason, self._frame = str(error), None
                return False
            frame.recorder, self.captures = recorder, self.captures + 1
        frame.recorder.replay()
        self.count += 1
        return True

    def _find_buffers(self, cache: Any, x: Tensor) -> CacheBuffers | None:
        """The buffers for a cache, new ones if its shape or device differs; None without keys."""
        layers = getattr(cache, "layers", None)
        keys = getattr(layers[0], "keys", None) if layers else None
        if not isinstance(keys, Tensor) or keys.ndim != 4 or keys.device != x.device:
            return None
        shape = (len(self.parts.layers), keys.shape[1], keys.shape[3], keys.dtype, keys.device)
        own = self._buffers
        if own is None or shape != (own.layers, own.kv_heads, own.head_dim, own.dtype, own.device):
            own = self._buffers = CacheBuffers(*shape)
        return own

    def _take_frame(
        self, buffers: CacheBuffers, cache: Any, x: Tensor, positions: Tensor, stored: int
    ) -> Frame:
        """A frame with the cache in its buffer and a free column for the next token."""
        frame = self._frame
        additive = self.parts.config._attn_implementation == "eager"
        additive = additive or log_counts_of(cache, x.shape[0]) is not None
        form = (x.shape, x.dtype, positions.shape, additive)
        if self._stale and frame is not None and frame.addresses:
            if not self._watch.unchanged() or self._addresses() != frame.addresses:
                frame.addresses, frame.recorder = (), None
            self._stale = False
        if frame is not None and frame.form == form and stored < frame.columns:
            if buffers.is_shown(cache, frame.buffer):
                return frame
            buffers.forget(cache)
            if frame.is_free and stored + min(self.room, MOST_ROOM) < frame.columns:
                buffers.fill(frame.buffer, cache, stored)
                return frame
        buffer = buffers.make(x.shape[0], self._columns(stored))
        frame = self._frame = make_frame(form, buffer, x, positions)
        buffers.fill(frame.buffer, cache, stored)
        self._watch = WeightSnapshot(self.parts.layers)
        return frame

    def _columns(self, stored: int) -> int:
        """S of a frame for the stored and the expected tokens."""
        room = max(min(self.room, MOST_ROOM), stored // 4) + 1
        return -(-(stored + room) // STRIDE) * STRIDE

    def _addresses(self) -> tuple[int, ...]:
        """The addresses of the choices' tensors in a captured step."""
        return (len(self.sparse), *(a for ffn in self.sparse.values() for a in ffn.addresses))


def _visible(mask: Any, batch: int, length: int, device: torch.device) -> Tensor | None:
    """(B or 1, K) bool, the visible columns; None for a mask of another form."""
    if mask is None:
        return torch.ones(1, length, dtype=torch.bool, device=device)
    if not isinstance(mask, Tensor) or mask.shape != (batch, length):
        return None
    return mask.to(device).bool()
