"""A layer of Llama's form, or of CLIP's tower, for a whole prompt, in one call, on matrix tiles."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from corematching.backends.cpu.native.attention import describe_mask, refuse_keys
from corematching.backends.cpu.native.build import find_library
from corematching.backends.cpu.native.kernel import address
from corematching.backends.cpu.native.products import (
    STEP,
    TILES,
    Scratch,
    check_kept,
    refuse_product,
)
from corematching.backends.cpu.native.rows import Norm, check_angles, check_norm
from corematching.backends.cpu.native.structs import (
    ACTIVATION_NUMBERS,
    PromptLayerStruct,
    PromptStruct,
)
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


class PromptLayer:
    """What does not change from prompt to prompt, prepared once.

    Parameters
    ----------
    weights : mapping
        ``q``, ``k``, ``v``, ``o``, ``up``, ``down`` and, of a gated FFN, ``gate``, each (outputs,
        inputs), bfloat16, taken by tiles (`refuse_product`), contiguous; ``down`` may be stored by
        input. Biases, (outputs,), under ``<name>_bias``, may be None or missing.
    norms : tuple of Norm
        In front of the attention and of the FFN.
    size : int
        D, numbers of a head, a multiple of 32.
    activation : str
        Of the gate, or of ``up`` without one.
    scaling : float
        Of the attention's scores.
    scratch : Scratch
        PrunedPrompt to work in.

    Attributes
    ----------
    ffn_norm : Norm
        The second of the norms.

    Raises
    ------
    InvalidTensorError
        The weights do not make a layer that tiles can compute.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor | None],
        norms: tuple[Norm, Norm],
        size: int,
        activation: str,
        scaling: float,
        scratch: Scratch,
    ) -> None:
        _check_layer(weights, norms, size, activation)
        self._kept, self._scratch = (dict(weights), norms), scratch
        first, second = norms
        q, k, up, down = (weights[name] for name in ("q", "k", "up", "down"))
        assert q is not None and k is not None and up is not None and down is not None
        self.ffn_norm = second
        self._groups, self._size, self._width = k.shape[0] // size, size, up.shape[0]
        self._joint = q.shape[0] + 2 * k.shape[0]
        self._struct = PromptLayerStruct(
            **{name: address(weight) for name, weight in weights.items()},
            attention_norm=address(first.weight), ffn_norm=address(second.weight),
            attention_shift=address(first.shift), ffn_shift=address(second.shift),
            hidden=q.shape[1], heads=q.shape[0] // size, groups=self._groups, size=size,
            width=self._width, activation=ACTIVATION_NUMBERS[activation],
            down_by_input=not down.is_contiguous(), attention_epsilon=first.epsilon,
            ffn_epsilon=second.epsilon, scaling=scaling,
        )  # fmt: skip
        self._place = ctypes.addressof(self._struct)

    @staticmethod
    def supports(x: Tensor, mask: Tensor | None) -> bool:
        """Whether tiles can attend to as many keys as x, (B, T, d), has tokens, under this mask."""
        batch, length, _ = x.shape
        return refuse_keys(mask, batch, length, length) is None

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
            (B, T, d) bfloat16, contiguous.
        cos_sin : tuple of Tensor or None
            Cosines and sines, (B or 1, T, D) each; None: nothing is rotated.
        mask, causal
            As `TiledAttention.attend` takes them.
        middle : Tensor, optional
            Like x; memory for `Computed.middle`.
        kept : tuple of Tensor or None
            As `Products.gated` takes it.

        Raises
        ------
        InvalidTensorError
            Something is of another shape, dtype or layout.
        """
        library = find_library()
        assert library is not None
        self._check_call(x, mask, middle, kept)
        batch, length, _ = x.shape
        middle = torch.empty_like(x) if middle is None else middle
        active, out = x.new_empty(batch, length, self._width), torch.empty_like(x)
        prompt = PromptStruct(
            x=x.data_ptr(), middle=middle.data_ptr(), out=out.data_ptr(),
            active=active.data_ptr(), batch=batch, length=length, causal=causal,
            threads=torch.get_num_threads(),
        )  # fmt: skip
        qkv = key = value = None
        if cos_sin is None:
            qkv = x.new_empty(batch, length, self._joint)
            prompt.qkv = qkv.data_ptr()
        else:
            cos, sin = (part.contiguous() for part in cos_sin)
            check_angles(x, cos, sin, self._size)
            key, value = x.new_empty(2, batch, self._groups, length, self._size).unbind()
            prompt.cosine, prompt.sine = cos.data_ptr(), sin.data_ptr()
            prompt.keys, prompt.values = key.data_ptr(), value.data_ptr()
            prompt.cos_sin = cos.shape[0] * length
        if kept is not None:
            prompt.places, prompt.gates = map(address, kept)
        if mask is not None:
            prompt.mask, prompt.mask_kind, prompt.step_mask = describe_mask(mask)
        place = ctypes.byref(prompt)
        prompt.scratch = self._scratch.reserve(library.cm_prompt_layer_scratch(self._place, place))
        library.cm_prompt_layer(self._place, place)
        return Computed(qkv, key, value, middle, active, out)

    def _check_call(
        self,
        x: Tensor,
        mask: Tensor | None,
        middle: Tensor | None,
        kept: tuple[Tensor, Tensor] | None,
    ) -> None:
        if x.ndim != 3 or not self.supports(x, mask):
            raise InvalidTensorError(
                "tiles cannot attend to so many tokens, or under this mask: call `supports` first"
            )
        check_tensor("x", x, (*x.shape[:2], self._struct.hidden), torch.bfloat16)
        check_optional("the room for the middle", middle, tuple(x.shape), torch.bfloat16)
        check_kept(kept, x.shape[0] * x.shape[1], self._width, torch.bfloat16)


def _check_layer(
    weights: Mapping[str, Tensor | None], norms: tuple[Norm, Norm], size: int, activation: str
) -> None:
    """Refuse weights of which the C code would read something else."""
    dtype, down = torch.bfloat16, weights.get("down")
    for name in ("q", "k", "v", "o", "up", "down"):
        weight = weights.get(name)
        reason = "it is missing" if weight is None else refuse_product(weight, TILES)
        if reason is not None:
            raise InvalidTensorError(f"tiles cannot compute a layer with this '{name}': {reason}")
    q, k, up = (weights[name] for name in ("q", "k", "up"))
    assert q is not None and k is not None and up is not None and down is not None
    (inner, hidden), groups, width = q.shape, k.shape[0], up.shape[0]
    if size < 1 or size % STEP or groups % size or inner % groups:
        raise InvalidTensorError(
            f"{inner} queries and {groups} keys are not heads of {size} that share keys evenly: "
            f"a head's size must be a multiple of {STEP}"
        )
    if activation not in ACTIVATION_NUMBERS:
        raise InvalidTensorError(f"the C code does not know the activation '{activation}'")
    shapes = {
        "q": (inner, hidden), "k": (groups, hidden), "v": (groups, hidden), "o": (hidden, inner),
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
