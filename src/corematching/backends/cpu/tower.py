"""Vision tower layers of CLIP and SigLIP, in one call or in a few.

Shapes: B images, T patches, d hidden size, H attention heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation

from corematching.backends.cpu.attention import (
    ONLY_SDPA,
    PromptAttention,
    inputs_of,
    is_causal,
    is_close,
    uses_sdpa,
)
from corematching.backends.cpu.inputs import SMALL, is_prompt, make_probe
from corematching.backends.cpu.layer_weights import PrefillWeights, WeightReader, list_tensors
from corematching.backends.cpu.native import Gemm, Norm, PrefillLayer, Scratch
from corematching.backends.kernels import activation_name
from corematching.model.hooks import HookMonitor, captures_outputs, reads_shapes, show_result
from corematching.model.linear import is_plain_linear

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
LAYER_PARTS = {"self_attn", "layer_norm1", "mlp", "layer_norm2"}
NOT_HERE = (*ONLY_SDPA, "is_causal", "output_attentions")
"""Options of an attention call that only the module's own forward supports."""


class TowerAttention:
    """The attention of CLIP and SigLIP: multi-head, without rotary positions.

    Parameters
    ----------
    module : nn.Module
        A candidate for such an attention; see `is_known`.
    project : callable
        ``project(module, x, norm)`` gives queries, keys and values of x, (B, T, 3H, D), normalized
        first with a norm; None if unsupported.
    attention : PromptAttention
        The attention between the projections.
    """

    def __init__(
        self,
        module: nn.Module,
        project: Callable[[Any, Tensor, Norm | None], Tensor | None],
        attention: PromptAttention,
    ) -> None:
        self.module: Any = module
        self._project, self._attention = project, attention
        self._inputs = [getattr(module, name, module) for name in PROJECTIONS[:3]]
        self._hooks = HookMonitor(self._inputs, ignored=[reads_shapes])

    def is_known(self) -> bool:
        """Whether the module has this form, and computes the same as `forward`."""
        module = self.module
        children = dict(module.named_children())
        if set(children) != set(PROJECTIONS) or not uses_sdpa(module):
            return False
        if not all(map(is_plain_linear, children.values())):
            return False
        size, scale = getattr(module, "head_dim", None), getattr(module, "scale", None)
        widths = {width for child in children.values() for width in child.weight.shape}
        if len(widths) != 1 or not isinstance(size, int) or widths.pop() % size:
            return False
        if not isinstance(scale, float) or scale <= 0 or module.q_proj.weight.device.type != "cpu":
            return False
        with torch.inference_mode(False), torch.no_grad():
            x = make_probe(5, module.q_proj.in_features, module.q_proj.weight.dtype)
            ours = self._see(x, None)
            return ours is not None and is_close(ours, module(x, attention_mask=None)[0])

    def forward(
        self, original: Any, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        """(B, T, d) to (B, T, d) and no weights, or the module's own forward."""
        out = self._see(hidden_states, attention_mask) if self.may_run(kwargs) else None
        if out is None:
            return original(hidden_states, attention_mask=attention_mask, **kwargs)
        return out, None

    def may_run(self, kwargs: dict[str, Any]) -> bool:
        """Whether no option and no hook needs the module's own forward."""
        asked = any(kwargs.get(name) for name in NOT_HERE)
        return uses_sdpa(self.module) and not self._hooks.sees_any() and not asked

    def _see(self, x: Tensor, mask: Any) -> Tensor | None:
        mixed = self.mix(x, mask)
        return None if mixed is None else self.module.out_proj(mixed)

    def mix(self, x: Tensor, mask: Any, norm: Norm | None = None) -> Tensor | None:
        """(B, T, d) to the output projection's input (B, T, d); None if unsupported."""
        qkv = self._project(self.module, x, norm)
        if qkv is None:
            return None
        parts = qkv.flatten(2).chunk(len(self._inputs), -1)
        for linear, part in zip(self._inputs, parts, strict=True):
            show_result(linear, x, part)
        return self._attention.attend_to_patches(self.module, qkv, mask)


class TowerLayer:
    """A layer of CLIP and SigLIP, with residuals and activation fused into the matrix products.

    Parameters
    ----------
    layer : nn.Module
        A candidate for such a layer; see `is_known`.
    attention : TowerAttention
        Its attention, which `is_known`.
    gemm : Gemm
        The matrix products.
    scratch : Scratch
        Working memory, shared by all layers.
    """

    def __init__(
        self, layer: nn.Module, attention: TowerAttention, gemm: Gemm, scratch: Scratch
    ) -> None:
        self.layer: Any = layer
        self._attention, self._gemm = attention, gemm
        self._weights = WeightReader(layer, self._read, scratch)
        self._function = getattr(getattr(layer, "mlp", None), "activation_fn", None)
        self._activation = ""
        self._hooks = HookMonitor(())

    def is_known(self) -> bool:
        """Whether the layer has this form, and computes the same as `forward`."""
        layer = self.layer
        if set(dict(layer.named_children())) != LAYER_PARTS:
            return False
        self._activation = _name_activation(self._function)
        if not all(is_plain_linear(getattr(layer.mlp, name, None)) for name in ("fc1", "fc2")):
            return False
        attention = set(layer.self_attn.modules()) - {layer.self_attn, layer.self_attn.out_proj}
        inner = [module for module in layer.modules() if module not in (layer, *attention)]
        self._hooks = HookMonitor(inner, ignored=[reads_shapes, captures_outputs])
        with torch.inference_mode(False), torch.no_grad():
            weight = layer.mlp.fc1.weight
            x = make_probe(5, weight.shape[1], weight.dtype, SMALL)
            ours = self._run(x, None) if self._activation else None
            return ours is not None and is_close(ours, layer(x, None))

    def forward(
        self, original: Any, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        """(B, T, d) to (B, T, d), or the layer's own forward."""
        known = self._attention.may_run(kwargs) and not self._hooks.sees_any()
        out = self._run(hidden_states, attention_mask) if known else None
        return original(hidden_states, attention_mask, **kwargs) if out is None else out

    def _run(self, x: Tensor, mask: Any) -> Tensor | None:
        weights, layer = self._weights.find(), self.layer
        if weights is None or weights.matrix("o").dtype != x.dtype:
            return None
        whole, (first, second) = self._weights.whole, weights.norms
        if whole is not None and is_prompt(x) and whole.supports(x, mask):
            return self._run_at_once(whole, x, mask)
        mixed = self._attention.mix(x, mask, first)
        if mixed is None:
            return None
        x = self._multiply(layer.self_attn.out_proj, mixed, x)
        active = self._multiply(layer.mlp.fc1, x, activation=self._activation, norm=second)
        return self._multiply(layer.mlp.fc2, active, x)

    def _run_at_once(self, whole: PrefillLayer, x: Tensor, mask: Any) -> Tensor:
        """Run the layer in one call; its hooks read only shapes."""
        attention, mlp = self.layer.self_attn, self.layer.mlp
        done = whole.run(x.contiguous(), None, mask, is_causal(attention, mask, {}))
        assert done.qkv is not None
        inputs = inputs_of(attention)
        for linear, part in zip(inputs, done.qkv.chunk(len(inputs), -1), strict=True):
            show_result(linear, x, part)
        show_result(attention.out_proj, x, done.middle)
        show_result(mlp.fc1, done.middle, done.active)
        show_result(mlp.fc2, done.active, done.out)
        return done.out

    def _read(self) -> PrefillWeights | None:
        """The layer's present weights; None if its modules are no longer plain."""
        layer, attention, mlp = self.layer, self.layer.self_attn, self.layer.mlp
        norms = [layer.layer_norm1, layer.layer_norm2]
        if mlp.activation_fn is not self._function or not all(map(_is_plain_norm, norms)):
            return None
        linears = [*inputs_of(attention), attention.out_proj, mlp.fc1, mlp.fc2]
        if not all(map(is_plain_linear, linears)):
            return None
        first, second = (Norm(norm.weight, norm.eps, norm.bias) for norm in norms)
        named = dict(zip(("q", "k", "v", "o", "up", "down"), linears, strict=True))
        return PrefillWeights(
            list_tensors(named), (first, second), attention.head_dim, self._activation,
            attention.scale,
        )  # fmt: skip

    def _multiply(
        self, linear: Any, x: Tensor, residual: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        out = self._gemm.linear(x, linear.weight, linear.bias, residual, **kwargs)
        show_result(linear, x, out)
        return out


def _is_plain_norm(norm: Any) -> bool:
    """Whether a module is a LayerNorm over the last dimension, with all its parameters."""
    plain = type(norm) is nn.LayerNorm and len(norm.normalized_shape) == 1
    return plain and norm.weight is not None and norm.bias is not None


def _name_activation(function: Any) -> str:
    """The name of an activation function that the kernels support; "" for any other."""
    if type(function) is QuickGELUActivation:
        return "quick_gelu"
    return activation_name(function) or ""
