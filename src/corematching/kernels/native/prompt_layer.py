"""A decoder layer of Llama's form for a whole prompt, in one call, on a CPU's matrix tiles."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import MASKS
from .build import find_library
from .kernel import address
from .products import Norm, Scratch
from .structs import ACTIVATION_NUMBERS, PromptLayerStruct, PromptStruct, integers


class Computed(NamedTuple):
    """What a layer computes on the way.

    Attributes
    ----------
    key, value : Tensor
        (B, G, T, D), rotated where it applies, contiguous.
    active : Tensor
        (B, T, F), the FFN's activations.
    out : Tensor
        (B, T, d), the layer's output.
    """

    key: Tensor
    value: Tensor
    active: Tensor
    out: Tensor


class PromptLayer:
    """What does not change from prompt to prompt, prepared once.

    Attributes
    ----------
    ffn_norm : Norm
        In front of the FFN.

    Parameters
    ----------
    weights : mapping
        ``q``, ``k``, ``v``, ``o``, ``gate``, ``up``, ``down``, each (outputs, inputs), bfloat16,
        taken by tiles (`refuse_product`); all contiguous but ``down``, which may be stored by
        input. Biases, (outputs,), under ``<name>_bias``, may be None or missing.
    norms : tuple of Norm
        In front of the attention and of the FFN; RMSNorms.
    size : int
        D, numbers of a head.
    activation : str
        Of the gate.
    scaling : float
        Of the attention's scores.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor | None],
        norms: tuple[Norm, Norm],
        size: int,
        activation: str,
        scaling: float,
    ) -> None:
        self._kept = dict(weights), norms
        q, k, up, down = (weights[name] for name in ("q", "k", "up", "down"))
        assert q is not None and k is not None and up is not None and down is not None
        self.groups, self.size, self.width = k.shape[0] // size, size, up.shape[0]
        first, second = norms
        self.ffn_norm = second
        self.struct = PromptLayerStruct(
            **{name: address(weight) for name, weight in weights.items()},
            attention_norm=address(first.weight), ffn_norm=address(second.weight),
            hidden=q.shape[1], heads=q.shape[0] // size, groups=self.groups, size=size,
            width=self.width, activation=ACTIVATION_NUMBERS[activation],
            down_by_input=not down.is_contiguous(), attention_epsilon=first.epsilon,
            ffn_epsilon=second.epsilon, scaling=scaling,
        )  # fmt: skip
        self._place = ctypes.addressof(self.struct)

    def run(
        self,
        x: Tensor,
        middle: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        causal: bool,
        kept: tuple[Tensor, Tensor] | None,
        scratch: Scratch,
    ) -> Computed:
        """(B, T, d) through the layer.

        Parameters
        ----------
        x : Tensor
            (B, T, d) bfloat16, contiguous.
        middle : Tensor
            The same; gets what leaves the attention, the residual added.
        angles : tuple of Tensor
            Cosines and sines, (B or 1, T, D) each, contiguous.
        mask, causal
            As `TiledAttention.attend` takes them.
        kept : tuple of Tensor or None
            As `Products.gated` takes it.
        scratch : Scratch
            Memory to work in.
        """
        library = find_library()
        assert library is not None
        batch, length, _ = x.shape
        key, value = x.new_empty(2, batch, self.groups, length, self.size).unbind()
        active, out = x.new_empty(batch, length, self.width), torch.empty_like(x)
        cos, sin = angles
        places, gates = kept or (None, None)
        prompt = PromptStruct(
            x.data_ptr(), cos.data_ptr(), sin.data_ptr(), address(mask), address(places),
            key.data_ptr(), value.data_ptr(), middle.data_ptr(), out.data_ptr(),
            active.data_ptr(), address(gates), None, integers(0, 0), batch, length,
            cos.shape[0] * length, 0, causal, torch.get_num_threads(),
        )  # fmt: skip
        if mask is not None:
            steps = (mask.stride(i) if mask.shape[i] > 1 else 0 for i in (0, 2))
            prompt.mask_kind, prompt.step_mask = MASKS[mask.dtype], integers(*steps)
        place = ctypes.byref(prompt)
        prompt.scratch = scratch.reserve(library.cm_prompt_layer_scratch(self._place, place))
        library.cm_prompt_layer(self._place, place)
        return Computed(key, value, active, out)
