"""Finds a decoder layer's FFN, its weights and its activation function."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corematching.errors import ALL_NEURONS, UnsupportedModelError
from corematching.model.absent import AbsentWeight
from corematching.model.ffn_weights import FFNWeights, activation_name
from corematching.model.linear import is_parametrized
from corematching.model.patching import has_foreign_forward

FFN_NAMES = ("mlp", "feed_forward", "ffn")
PLAIN_NAMES = (
    ("fc1", "fc2"),
    ("up_proj", "down_proj"),
    ("c_fc", "c_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
)
ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation")
ROUNDINGS = 1.5
"""Tolerance of a comparison in 16 bits, in units of the dtype's eps: it rounds four times."""
EXPERT_NAMES = frozenset({"experts", "router", "shared_expert", "shared_experts"})
EXPERT_CLASS = re.compile(r"(MoeBlock|MoE|Moe|Experts)$")


def find_ffn(layer: nn.Module) -> nn.Module:
    """Find the FFN of a decoder layer.

    Parameters
    ----------
    layer : nn.Module
        One of ``model.get_decoder().layers``.

    Returns
    -------
    nn.Module
        The layer's FFN.

    Raises
    ------
    UnsupportedModelError
        The layer is a mixture of experts, or has no FFN under a known name.
    """
    for name, module in layer.named_modules():
        kind = type(module).__name__
        if name.rpartition(".")[2] in EXPERT_NAMES or EXPERT_CLASS.search(kind):
            raise UnsupportedModelError(
                f"{type(layer).__name__} has a mixture of experts ({kind} '{name}'), whose FFN "
                "differs from token to token: use a model with dense FFNs"
            )
    for name in FFN_NAMES:
        module = getattr(layer, name, None)
        if isinstance(module, nn.Module):
            return module
    raise UnsupportedModelError(
        f"{type(layer).__name__} has no FFN named {', '.join(FFN_NAMES)}: use a model with "
        "dense FFNs"
    )


def find_activation(mlp: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """An FFN's activation function, or None if there is none under a known name."""
    found = (getattr(mlp, name, None) for name in ACTIVATION_NAMES)
    return next((function for function in found if callable(function)), None)


class FFNParts:
    """The linear layers and the activation function of an FFN.

    Parameters
    ----------
    mlp : nn.Module
        ``act(gate(x)) * up(x)`` or ``act(up(x))``, then ``down``; gate and up may be one fused
        linear layer (gate first), and every linear layer may have a bias.

    Attributes
    ----------
    down : nn.Linear
        The down projection; its input is the activations.
    activation : callable
        The activation function.
    activation_name : str or None
        Its name out of `corematching.model.ffn_weights.ACTIVATIONS`; None for any other.

    Raises
    ------
    UnsupportedModelError
        The FFN has another form, or its weights cannot be gathered by neuron.
    """

    def __init__(self, mlp: Any) -> None:
        self.mlp = mlp
        self._fused: nn.Linear | None = getattr(mlp, "gate_up_proj", None)
        self._gate: nn.Linear | None = getattr(mlp, "gate_proj", None)
        self._up: nn.Linear
        self.down: nn.Linear
        names = next((n for n in PLAIN_NAMES if all(hasattr(mlp, part) for part in n)), None)
        if self._fused is not None and hasattr(mlp, "down_proj"):
            self._up, self.down = self._fused, mlp.down_proj
        elif names is not None:
            self._up, self.down = getattr(mlp, names[0]), getattr(mlp, names[1])
        else:
            parts = ", ".join(name for name, _ in mlp.named_children()) or "nothing"
            raise UnsupportedModelError(
                f"{type(mlp).__name__} is no FFN of a known form (it has {parts}): {ALL_NEURONS}"
            )
        for linear in (self._up, self.down, self._gate):
            if linear is not None:
                check_linear(mlp, linear)
        found = find_activation(mlp)
        if found is None:
            raise UnsupportedModelError(
                f"{type(mlp).__name__} has no activation function named "
                f"{', '.join(ACTIVATION_NAMES)}: {ALL_NEURONS}"
            )
        self.activation: Callable[[Tensor], Tensor] = found
        self.activation_name = activation_name(self.activation)

    @property
    def width(self) -> int:
        """F, the intermediate neurons."""
        return self.down.in_features

    @property
    def gated(self) -> bool:
        """Whether the FFN has a gate."""
        return self._gate is not None or self._fused is not None

    def list_linears(self) -> list[nn.Linear]:
        """The FFN's linear layers."""
        linears = (self._gate, self._up, self.down)
        return [linear for linear in linears if linear is not None]

    def dense(self) -> dict[str, Tensor]:
        """The dense weights and biases, by their names in `CompactWeights`: views, no copies."""
        rows: dict[str, Tensor | None] = {"down": self.down.weight}
        if self._fused is not None:
            half = self.width
            rows["gate"], rows["up"] = self._fused.weight[:half], self._fused.weight[half:]
            if self._fused.bias is not None:
                rows["gate_bias"], rows["up_bias"] = (
                    self._fused.bias[:half],
                    self._fused.bias[half:],
                )
        else:
            rows["up"], rows["up_bias"] = self._up.weight, self._up.bias
            if self._gate is not None:
                rows["gate"], rows["gate_bias"] = self._gate.weight, self._gate.bias
        return {name: tensor for name, tensor in rows.items() if tensor is not None}

    def by_neuron(self) -> FFNWeights:
        """The weights by neuron, for indexed kernels: views, no copies."""
        with torch.inference_mode(False), torch.no_grad():
            rows = {name: tensor.detach() for name, tensor in self.dense().items()}
            down_t = rows.pop("down").t()
        return FFNWeights(down_t=down_t, activation=self.activation_name or "", **rows)

    def bias(self) -> Tensor | None:
        """(1, d) or None, the bias of the down projection."""
        return None if self.down.bias is None else self.down.bias.detach()[None]

    def store_down_by_neuron(self) -> None:
        """Store the down projection's weight with each neuron's values contiguous.

        The parameter, its shape and its values do not change.
        """
        weight = self.down.weight
        if not weight.t().is_contiguous():
            with torch.inference_mode(False), torch.no_grad():
                weight.data = weight.data.t().contiguous().t()

    def store_down_as_usual(self) -> None:
        """Undo `store_down_by_neuron`."""
        weight = self.down.weight
        if not weight.is_contiguous():
            with torch.inference_mode(False), torch.no_grad():
                weight.data = weight.data.contiguous()

    def check(self) -> None:
        """Compare two test tokens with all neurons against the FFN's own forward.

        Raises
        ------
        UnsupportedModelError
            The FFN computes something else.
        """
        weight = self.down.weight
        with torch.inference_mode(False), torch.no_grad():
            ramp = torch.arange(2 * self.down.out_features, device=weight.device)
            x = torch.sin(ramp.float()).to(weight.dtype).view(1, 2, -1)
            self.compare(x[0], self.mlp.forward(x)[0])

    def compare(self, x: Tensor, theirs: Tensor) -> None:
        """Compare the FFN's own outputs ``theirs`` (n, d) for finite inputs ``x`` (n, d) with ours.

        Raises
        ------
        UnsupportedModelError
            The FFN computes something else.
        """
        weight = self.down.weight
        with torch.inference_mode(False), torch.no_grad():
            ours = self._compute(x)
        if not bool(ours.isfinite().all()) or not bool(theirs.isfinite().all()):
            raise self._non_finite_error()
        info = torch.finfo(weight.dtype)
        error = float(
            (ours.float() - theirs.float()).norm() / theirs.float().norm().clamp_min(info.tiny)
        )
        if not error < (1e-3 if weight.dtype == torch.float32 else ROUNDINGS * info.eps):
            raise UnsupportedModelError(
                f"{type(self.mlp).__name__} computes more than its activation and linear layers "
                f"(test tokens differ by {error:.1e} of the output): put the model in eval mode, "
                f"merge its adapters, or {ALL_NEURONS}"
            )

    def _non_finite_error(self) -> UnsupportedModelError:
        """The error for NaN or infinite outputs of finite inputs."""
        kind = type(self.mlp).__name__
        weights = self.mlp.named_parameters()
        broken = [name for name, weight in weights if not bool(weight.isfinite().all())]
        if broken:
            return UnsupportedModelError(
                f"{kind}'s {', '.join(broken)} hold NaN or infinite values: download the "
                "checkpoint again, or load it in the dtype that it is stored in"
            )
        return UnsupportedModelError(
            f"{kind} overflows in {self.down.weight.dtype}: load the model in bf16 or fp32"
        )

    def _compute(self, x: Tensor) -> Tensor:
        """(n, d) to (n, d), with all neurons."""
        parts = self.dense()
        active = F.linear(x, parts["up"], parts.get("up_bias"))
        if "gate" in parts:
            active = self.activation(F.linear(x, parts["gate"], parts.get("gate_bias"))) * active
        else:
            active = self.activation(active)
        return F.linear(active, parts["down"], self.down.bias)


def check_linear(mlp: nn.Module, linear: nn.Module) -> None:
    """Refuse linear layers that compute more than a product with their plain weight.

    Raises
    ------
    UnsupportedModelError
        The layer has an adapter or a replaced forward, or is quantised, sharded or off-loaded.
    """
    kind = f"{type(mlp).__name__}'s {type(linear).__name__}"
    if hasattr(linear, "base_layer"):
        raise UnsupportedModelError(
            f"{kind} carries an adapter: merge it first (merge_and_unload() of the PeftModel), or "
            f"{ALL_NEURONS}"
        )
    weight: Any = getattr(linear, "weight", None)
    if has_foreign_forward(linear):
        raise UnsupportedModelError(
            f"{kind} has a replaced forward, which the chosen neurons would skip: "
            f"put the original back (del module.forward), or {ALL_NEURONS}"
        )
    if is_parametrized(linear):
        raise UnsupportedModelError(
            f"{kind} computes its weight from others at each step: call "
            "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') on it, "
            f"or {ALL_NEURONS}"
        )
    plain = isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward
    absent = isinstance(weight, AbsentWeight)
    plain = plain and isinstance(weight, Tensor) and (absent or type(weight.data) is Tensor)
    if not plain or "weight" not in linear._parameters:
        raise UnsupportedModelError(
            f"{kind} is quantised or sharded, so the rows of single neurons cannot be gathered: "
            f"load the model in bf16 or fp32 without tensor parallelism, or {ALL_NEURONS}"
        )
    if weight.is_meta:
        raise UnsupportedModelError(
            f"{kind} is off-loaded (its weight is on 'meta'): load the whole model on one device"
        )
