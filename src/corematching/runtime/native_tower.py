"""Attention of vision towers in C, on a CPU's tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import COUNTING, HookWatch, show_result
from .native_attention import ONLY_SDPA, PromptAttention, is_close, uses_sdpa

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
NOT_HERE = (*ONLY_SDPA, "is_causal", "output_attentions")
"""What a call may ask for that only the module's own forward does."""


class TowerAttention:
    """The attention of CLIP and SigLIP: all heads have keys of their own, and nothing is rotated.

    Parameters
    ----------
    module : nn.Module
        What may be such an attention.
    project : callable
        ``project(module, x)`` gives (B, T, 3H, D), queries, keys and values; None where it cannot.
    attention : PromptAttention
        Does the rest.
    """

    def __init__(
        self,
        module: nn.Module,
        project: Callable[[Any, Tensor], Tensor | None],
        attention: PromptAttention,
    ) -> None:
        self.module: Any = module
        self._project, self._attention = project, attention
        self._inputs = [getattr(module, name, module) for name in PROJECTIONS[:3]]
        self._hooks = HookWatch(self._inputs, ignored=COUNTING)

    def is_known(self) -> bool:
        """Whether the module has this form, and computes what `forward` does."""
        module = self.module
        children = dict(module.named_children())
        if set(children) != set(PROJECTIONS) or not uses_sdpa(module):
            return False
        if any(type(child) is not nn.Linear for child in children.values()):
            return False
        size, scale = getattr(module, "head_dim", None), getattr(module, "scale", None)
        widths = {width for child in children.values() for width in child.weight.shape}
        if len(widths) != 1 or not isinstance(size, int) or widths.pop() % size:
            return False
        if not isinstance(scale, float) or scale <= 0 or module.q_proj.weight.device.type != "cpu":
            return False
        with torch.inference_mode(False), torch.no_grad():
            width, dtype = module.q_proj.in_features, module.q_proj.weight.dtype
            x = torch.sin(torch.arange(5.0 * width)).to(dtype).view(1, 5, width)
            ours = self._see(x, None)
            return ours is not None and is_close(ours, module(x, attention_mask=None)[0])

    def forward(
        self, original: Any, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        """(B, T, d) to (B, T, d) and no weights, or what the module's own forward gives."""
        asked = any(kwargs.get(name) for name in NOT_HERE)
        known = uses_sdpa(self.module) and not self._hooks.sees_any() and not asked
        out = self._see(hidden_states, attention_mask) if known else None
        if out is None:
            return original(hidden_states, attention_mask=attention_mask, **kwargs)
        return out, None

    def _see(self, x: Tensor, mask: Any) -> Tensor | None:
        joint = self._project(self.module, x)
        if joint is None:
            return None
        parts = joint.flatten(2).chunk(len(self._inputs), -1)
        for linear, part in zip(self._inputs, parts, strict=True):
            show_result(linear, x, part)
        return self.module.out_proj(self._attention.attend_to_patches(self.module, joint, mask))
