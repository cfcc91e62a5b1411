"""Prompts in compiled code: matrix products, norms, FFNs and whole layers.

Shapes: B samples, T tokens, H attention heads, G key-value heads, D head dimension.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from corematching.backends.cpu.attention import PromptAttention, inputs_of, is_close, uses_sdpa
from corematching.backends.cpu.inputs import (
    FEWEST_FLOAT_ROWS,
    SMALL,
    is_plain,
    is_prompt,
    make_probe,
)
from corematching.backends.cpu.layer import LlamaLayer, activate
from corematching.backends.cpu.native import (
    Gemm,
    Norm,
    Scratch,
    normalize,
    prefers_native,
    why_unsupported_gemm,
)
from corematching.backends.cpu.tower import TowerAttention, TowerLayer
from corematching.devices import multiplies
from corematching.errors import UnsupportedModelError
from corematching.model.ffn import FFNParts
from corematching.model.hooks import HookMonitor
from corematching.model.layer_inputs import needs_positions
from corematching.model.linear import is_plain_linear
from corematching.model.patching import Patches, has_foreign_forward
from corematching.model.spec import ModelSpec

log = logging.getLogger(__name__)

DTYPES = (torch.bfloat16, torch.float32)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class NativePrompts:
    """Replaces the forwards of linear layers, RMSNorms, gated FFNs and Llama's attention.

    In the vision tower and the projector it replaces linear layers, convolutions and whole layers.
    Forwards are replaced on instances and for prompts only: unsupported calls (decode steps,
    gradients, autocast, another dtype, compiled code) run the module's own forward. Hooks on
    modules see their usual tensors.

    Parameters
    ----------
    parts : ModelSpec
        The model's parts.

    Attributes
    ----------
    layers : int
        Decoder layers that ran in compiled code, from their norms to their residuals.
    """

    def __init__(self, parts: ModelSpec) -> None:
        self.parts = parts
        self._patches = Patches()
        self._scratch = Scratch()
        self._gemm = Gemm(self._scratch)
        self._attend = PromptAttention(self._scratch)
        self._dtypes = {dtype for dtype in DTYPES if prefers_native(dtype)}
        self.layers = 0

    def install(self, ffns: list[FFNParts]) -> None:
        """Replace the forwards, where that makes prompts faster.

        Parameters
        ----------
        ffns : list of FFNParts
            The FFNs of all layers, or an empty list.
        """
        if not self._dtypes:
            return
        slow_bf16 = not multiplies("cpu", torch.bfloat16)
        layers = [module for layer in self.parts.layers for module in layer.modules()]
        seeing = [self.parts.vision, self.parts.projector]
        tower = [module for part in seeing if part is not None for module in part.modules()]
        for module in [*layers, *tower]:
            if has_foreign_forward(module):
                continue
            if is_plain_linear(module):
                self._wrap(module, self._linear, module)
            elif slow_bf16 and type(module) in CONVOLUTIONS:
                self._wrap(module, _run_convolution, module)
        if not any(map(has_foreign_forward, tower)):
            self._install_in_tower(tower)
        final = getattr(self.parts.decoder, "norm", None)
        every: list[Any] = [*layers, final]
        norms = [module for module in every if _is_norm(module) and not has_foreign_forward(module)]
        for norm in norms:
            self._wrap(norm, _run_norm, norm)
        if any(map(has_foreign_forward, layers)):
            return  # the code below fuses several modules
        ffns = ffns if _are_known(ffns) else []
        for ffn in ffns:
            inner = [module for module in ffn.mlp.modules() if module not in (ffn.mlp, ffn.down)]
            self._wrap(ffn.mlp, self._ffn, ffn, HookMonitor(inner))
        if _holds(self._attends_like_llama):
            for module in self.parts.attentions:
                self._wrap(module, self._attention, module, HookMonitor(inputs_of(module)))
            if ffns and _holds(functools.partial(self._layers_are_llamas, ffns[0], norms)):
                for layer, ffn in zip(self.parts.layers, ffns, strict=True):
                    whole = self._join(layer, ffn)
                    self._wrap(layer, self._layer, whole, _watch_layer(layer, ffn))

    def _install_in_tower(self, modules: list[nn.Module]) -> None:
        """Replace layers and attentions; a layer is compared before its attention is replaced."""
        found = [TowerAttention(m, self._project_qkv, self._attend) for m in modules]
        known = {attention.module: attention for attention in found if attention.is_known()}
        for module in modules:
            attention = known.get(getattr(module, "self_attn", None))
            layer = None
            if attention is not None:
                layer = TowerLayer(module, attention, self._gemm, self._scratch)
            if layer is not None and layer.is_known():
                self._wrap(module, layer.forward)
        for module, attention in known.items():
            self._wrap(module, attention.forward)

    def remove(self) -> None:
        """Restore every forward."""
        self._patches.undo()

    def _wrap(self, owner: Any, around: Any, *args: Any) -> None:
        self._patches.wrap(owner, "forward", functools.partial(around, *args))

    def _layers_are_llamas(self, ffn: FFNParts, norms: list[Any]) -> bool:
        """Whether all layers have one form, and it computes the same as `LlamaLayer`."""
        first: Any = self.parts.layers[0]
        for layer in self.parts.layers:
            names = {name for name, _ in layer.named_children()}
            if names != LAYER_PARTS or type(layer) is not type(first):
                return False
            if layer.input_layernorm not in norms or layer.post_attention_layernorm not in norms:
                return False
        x, cos_sin = self._make_probe(first.self_attn, SMALL)
        with torch.inference_mode(False), torch.no_grad():
            theirs = first(x, position_embeddings=cos_sin, attention_mask=None)
            ours = self._join(first, ffn).run(x, None, None, cos_sin)
        theirs = theirs[0] if isinstance(theirs, tuple) else theirs
        return ours is not None and is_close(ours, theirs)

    def _make_probe(self, attention: Any, size: float = 1.0) -> tuple[Tensor, Any]:
        """A minimal prompt with a gap in its positions, and their cosines and sines."""
        decoder: Any = self.parts.decoder
        with torch.inference_mode(False), torch.no_grad():
            weight = attention.q_proj.weight
            x = make_probe(3, weight.shape[1], weight.dtype, size)
            positions = torch.arange(1, x.shape[1] + 1)[None]
            positions[:, 2:] += 6
            return x, decoder.rotary_emb(x, positions)

    def _join(self, layer: Any, ffn: FFNParts) -> LlamaLayer:
        return LlamaLayer(layer, ffn, self._gemm, self._attend, self.parts.gates, self._scratch)

    def _layer(
        self,
        whole: LlamaLayer,
        hooks: HookMonitor,
        original: Any,
        hidden_states: Tensor,
        attention_mask: Any = None,
        past_key_values: Any = None,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Any:
        x, cos_sin = hidden_states, position_embeddings
        attention = whole.layer.self_attn
        known = is_prompt(x) and self._takes(x) and not hooks.sees_any()
        known = known and uses_sdpa(attention) and _are_cos_sin(cos_sin, x, attention.head_dim)
        out = whole.run(x, attention_mask, past_key_values, cos_sin, **kwargs) if known else None
        if out is not None:
            self.layers += 1
            return out
        return original(
            x, attention_mask=attention_mask, past_key_values=past_key_values,
            position_embeddings=cos_sin, **kwargs,
        )  # fmt: skip

    def _takes(self, x: Tensor) -> bool:
        """Whether the kernels are faster for x: its dtype, and its number of rows."""
        few = x.dtype == torch.float32 and x.numel() < FEWEST_FLOAT_ROWS * x.shape[-1]
        return x.dtype in self._dtypes and not few

    def _fits(self, x: Tensor, weight: Tensor) -> bool:
        if x.dtype != weight.dtype or not self._takes(x):
            return False
        return why_unsupported_gemm(weight) is None

    def _linear(self, module: Any, original: Any, x: Tensor) -> Tensor:
        if not is_plain(x) or not self._fits(x, module.weight):
            return original(x)
        return self._gemm.linear(x, module.weight, module.bias)

    def _ffn(self, ffn: FFNParts, hooks: HookMonitor, original: Any, x: Tensor, *args: Any) -> Any:
        """Run gate, activation and up as one product; the down projection is called as a module."""
        if args or not is_prompt(x) or hooks.sees_any():
            return original(x, *args)
        weights = ffn.dense()
        both = weights["gate"], weights["up"]
        if not all(self._fits(x, weight) and weight.is_contiguous() for weight in both):
            return original(x, *args)
        return ffn.down(activate(self._gemm, self.parts.gates, ffn, weights, x))

    def _attention(
        self,
        module: Any,
        hooks: HookMonitor,
        original: Any,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        x, cos_sin = hidden_states, position_embeddings
        known = uses_sdpa(module) and not hooks.sees_any()
        qkv = self._project(module, x, cos_sin) if known else None
        if qkv is None:
            return original(
                hidden_states=x, position_embeddings=cos_sin, attention_mask=attention_mask,
                past_key_values=past_key_values, **kwargs,
            )  # fmt: skip
        seen = cos_sin, attention_mask, past_key_values
        mixed, weights = self._attend.attend(module, qkv, *seen, **kwargs)
        return module.o_proj(mixed), weights

    def _project_qkv(self, module: Any, x: Tensor, norm: Norm | None = None) -> Tensor | None:
        """Queries, keys and values before rotation, (B, T, H + 2G, D), or None if unsupported."""
        inputs = inputs_of(module)
        if not is_plain(x) or not all(map(is_plain_linear, inputs)):
            return None
        weights = [linear.weight for linear in inputs]
        if not all(self._fits(x, weight) and weight.is_contiguous() for weight in weights):
            return None
        qkv = self._gemm.joint(x, weights, [linear.bias for linear in inputs], norm)
        return qkv.view(*x.shape[:-1], -1, module.head_dim)

    def _project(self, module: Any, x: Tensor, cos_sin: Any) -> Tensor | None:
        """`_project_qkv` for Llama's attention; None also for unsupported cosines and sines."""
        if not _are_cos_sin(cos_sin, x, module.head_dim):
            return None
        return self._project_qkv(module, x) if is_plain_linear(module.o_proj) else None

    def _attends_like_llama(self) -> bool:
        """Whether all attentions have one form, and it computes the same as `attend`."""
        decoder: Any = self.parts.decoder
        first: Any = self.parts.attentions[0]
        for module in self.parts.attentions:
            names = {name for name, _ in module.named_children()}
            if names != set(PROJECTIONS) or type(module) is not type(first):
                return False
            if getattr(module, "sliding_window", None) or needs_positions(module):
                return False
            if not all(is_plain_linear(getattr(module, name)) for name in PROJECTIONS):
                return False
        if not hasattr(decoder, "rotary_emb") or not hasattr(first, "head_dim"):
            return False
        x, cos_sin = self._make_probe(first)
        with torch.inference_mode(False), torch.no_grad():
            qkv = self._project(first, x, cos_sin)
            if qkv is None:
                return False
            theirs = first(hidden_states=x, position_embeddings=cos_sin, attention_mask=None)[0]
            ours = self._attend.attend(first, qkv, cos_sin, None, None)[0]
            return is_close(first.o_proj(ours), theirs)


def _holds(probe: Callable[[], bool]) -> bool:
    """Whether a probe of the model's modules succeeds; False where they cannot be called so."""
    try:
        return probe()
    except Exception:
        log.debug("modules that cannot be probed", exc_info=True)
        return False


def _run_norm(module: Any, original: Any, x: Tensor) -> Tensor:
    weight = module.weight
    if not is_plain(x) or x.dtype != weight.dtype or x.shape[-1:] != weight.shape:
        return original(x)
    return normalize(x, Norm(weight, module.variance_epsilon))


def _are_known(ffns: list[FFNParts]) -> bool:
    """Whether all FFNs are gated and of one class, and the first passes `FFNParts.check`."""
    if len({type(ffn.mlp) for ffn in ffns}) != 1:
        return False
    try:
        ffns[0].check()
    except UnsupportedModelError:
        return False
    return all(ffn.gated and ffn.activation_name for ffn in ffns)


def _watch_layer(layer: Any, ffn: FFNParts) -> HookMonitor:
    """A monitor of the hooks that a fused layer would skip."""
    called = (ffn.mlp, ffn.down)
    inner = [module for module in layer.modules() if module not in (layer, *called)]
    return HookMonitor(inner, called=called)


def _run_convolution(module: Any, original: Any, x: Tensor) -> Tensor:
    """A bf16 convolution in float32, rounded once: 40 times faster on a CPU without bf16 units."""
    if not is_plain(x) or x.dtype != torch.bfloat16 or module.weight.dtype != x.dtype:
        return original(x)
    bias = None if module.bias is None else module.bias.float()
    return module._conv_forward(x.float(), module.weight.float(), bias).to(x.dtype)


def _are_cos_sin(cos_sin: Any, x: Tensor, size: int) -> bool:
    """Whether these are cosines and sines, (B or 1, T, D) each."""
    return isinstance(cos_sin, tuple) and all(
        isinstance(part, Tensor)
        and part.ndim == 3
        and part.shape[0] in (1, x.shape[0])
        and part.shape[1:] == (x.shape[1], size)
        and part.dtype == x.dtype
        for part in cos_sin
    )


def _is_norm(module: Any) -> bool:
    """Whether a module is an RMSNorm of Llama's form, by what it computes."""
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or weight.device.type != "cpu" or weight.ndim != 1:
        return False
    if not isinstance(epsilon, float) or weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    with torch.inference_mode(False), torch.no_grad():
        x = 3 * torch.sin(torch.arange(2 * weight.shape[0]).float()).to(weight.dtype).view(2, -1)
        return is_close(normalize(x, Norm(weight, epsilon)), module(x))
