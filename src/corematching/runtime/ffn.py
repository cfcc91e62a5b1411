"""FFNs that compute only the chosen neurons while decoding.

`SparseFFN` replaces the forward of one FFN on its instance. Prompts run through the original
forward; a single token runs on compact copies of the chosen neurons' weights, never on masks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from corematching.errors import ConfigError, UnsupportedModelError
from corematching.kernels import CompactWeights, gather_columns, gather_rows, sparse_ffn
from corematching.protocol import NeuronChoice

FFN_NAMES = ("mlp", "feed_forward", "ffn")
PLAIN_NAMES = (
    ("fc1", "fc2"),
    ("up_proj", "down_proj"),
    ("c_fc", "c_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
)
ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation")
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
        The layer routes its tokens to experts, or holds no FFN under a known name.
    """
    for name, module in layer.named_modules():
        kind = type(module).__name__
        if name.rpartition(".")[2] in EXPERT_NAMES or EXPERT_CLASS.search(kind):
            raise UnsupportedModelError(
                f"{type(layer).__name__} has a mixture of experts ({kind} '{name}'), whose FFN "
                "differs from token to token: use a model with dense FFNs, or drop tokens only "
                "(neurons=None)"
            )
    for name in FFN_NAMES:
        module = getattr(layer, name, None)
        if isinstance(module, nn.Module):
            return module
    raise UnsupportedModelError(
        f"{type(layer).__name__} has no FFN named {', '.join(FFN_NAMES)}: "
        "drop tokens only (neurons=None)"
    )


class SparseFFN:
    """An FFN that computes all neurons of a prompt, and only the chosen ones of a decoded token.

    Parameters
    ----------
    mlp : nn.Module
        ``act(gate(x)) * up(x)`` or ``act(up(x))``, then ``down``; gate and up may be one fused
        linear layer (gate first), and every linear layer may have a bias.
    count : int
        Neurons of each choice, in [1, width].

    Attributes
    ----------
    active : bool
        Whether a single token now runs on the chosen neurons.
    count : int
        Neurons of each choice.

    Raises
    ------
    ConfigError
        ``count`` is out of range.
    UnsupportedModelError
        The weights cannot be gathered, or the FFN computes something else.
    """

    def __init__(self, mlp: nn.Module, count: int) -> None:
        self.mlp = mlp
        self.active = False
        self.count = count
        self._installed = False
        self._original: Callable[..., Tensor] = mlp.forward
        self._weights: CompactWeights | None = None
        self._bias: Tensor | None = None
        self._taken: NeuronChoice | None = None
        self._locate()
        if not 1 <= count <= self.width:
            raise ConfigError(
                f"an FFN of {self.width} neurons cannot keep {count}: "
                f"choose a count from 1 to {self.width}"
            )
        self._probe()

    @property
    def down_proj(self) -> nn.Linear:
        """The module whose input is the activations."""
        return self._down

    @property
    def width(self) -> int:
        """F, the intermediate neurons of the dense FFN."""
        return self._down.in_features

    def install(self) -> None:
        """Replace the FFN's forward on its instance."""
        if self._installed:
            return
        self._replaced = vars(self.mlp).get("forward")
        self._original = self.mlp.forward
        self.mlp.forward = self.forward
        self._installed = True

    def remove(self) -> None:
        """Put the FFN's own forward back and free the compact weights."""
        if self._installed:
            del self.mlp.forward
            if self._replaced is not None:
                self.mlp.forward = self._replaced
            self._installed = False
        self.clear()
        self._weights = self._bias = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, T, d) to (B, T, d), on the chosen neurons where T is 1 and a choice is set."""
        if not self.active or x.dim() != 3 or x.shape[1] != 1:
            return self._original(x, *args, **kwargs)
        assert self._weights is not None
        return sparse_ffn(x[:, 0], self._weights, self._bias, self._activation)[:, None]

    def set(self, choice: NeuronChoice) -> None:
        """Take a choice and gather its weights at once; see `take` and `gather`."""
        self.take(choice)
        self.gather()

    def take(self, choice: NeuronChoice) -> None:
        """Take a choice; it holds from the next `gather` on, until then all neurons run.

        Raises
        ------
        ConfigError
            The choice has another number of neurons than ``count``, or a mean of another shape.
        """
        indices, mean = choice.indices, choice.mean
        if indices.dim() != 2 or indices.shape[1] != self.count:
            raise ConfigError(
                f"expected neuron indices (batch, {self.count}), got {tuple(indices.shape)}: "
                "a policy must choose as many neurons as it was asked for"
            )
        if mean is not None and mean.shape != (indices.shape[0], self.width):
            raise ConfigError(
                f"expected means ({indices.shape[0]}, {self.width}), got {tuple(mean.shape)}: "
                "a policy must give one mean per neuron, 0 on the kept ones"
            )
        self.clear()
        if self.count < self.width:
            self._taken = choice

    def gather(self) -> None:
        """Gather the weights of a choice that was taken; single tokens run on them from now on.

        Samples share one copy where equal neighbours allow it (beams, one choice for all). A choice
        of every neuron leaves the FFN dense. Does nothing without a new choice.
        """
        if self._taken is None:
            return
        choice, self._taken = self._taken, None
        with torch.inference_mode(False), torch.no_grad():
            self._gather(_distinct_sets(choice.indices.to(self._down.weight.device)))
            self._fold(choice.mean)
        self.active = True

    def clear(self) -> None:
        """Run every token on all neurons until the next choice; the buffers stay for reuse."""
        self.active, self._taken = False, None

    def bytes_read(self, batch: int) -> int:
        """Bytes of weights that one decode step of ``batch`` samples reads here.

        A set of neurons that several samples share is read once.
        """
        if not self.active:
            return sum(p.numel() * p.element_size() for p in self.mlp.parameters())
        assert self._weights is not None
        sets = self._weights.up.shape[0]
        size = sum(t.numel() * t.element_size() for t in self._weights.tensors)
        bias = 0 if self._bias is None else self._bias[0].numel() * self._bias.element_size()
        rows = 0 if self._bias is None else min(batch, self._bias.shape[0])
        return size // sets * min(batch, sets) + bias * rows

    def _locate(self) -> None:
        """Find the linear layers and the activation function, and refuse what is not gatherable."""
        mlp: Any = self.mlp
        self._fused: nn.Linear | None = getattr(mlp, "gate_up_proj", None)
        self._gate: nn.Linear | None = getattr(mlp, "gate_proj", None)
        self._up: nn.Linear
        self._down: nn.Linear
        names = next((n for n in PLAIN_NAMES if all(hasattr(mlp, part) for part in n)), None)
        if self._fused is not None and hasattr(mlp, "down_proj"):
            self._up, self._down = self._fused, mlp.down_proj
        elif names is not None:
            self._up, self._down = getattr(mlp, names[0]), getattr(mlp, names[1])
        else:
            parts = ", ".join(name for name, _ in mlp.named_children()) or "nothing"
            raise UnsupportedModelError(
                f"{type(mlp).__name__} is no FFN of a known form (it has {parts}): "
                "drop tokens only (neurons=None)"
            )
        for linear in (self._up, self._down, self._gate):
            if linear is not None:
                _check_linear(mlp, linear)
        found = [getattr(mlp, n) for n in ACTIVATION_NAMES if callable(getattr(mlp, n, None))]
        if not found:
            raise UnsupportedModelError(
                f"{type(mlp).__name__} has no activation function named "
                f"{', '.join(ACTIVATION_NAMES)}: drop tokens only (neurons=None)"
            )
        self._activation: Callable[[Tensor], Tensor] = found[0]

    def _probe(self) -> None:
        """Compare two probe tokens with all neurons against the FFN's own forward."""
        weight = self._down.weight
        with torch.inference_mode(False), torch.no_grad():
            ramp = torch.arange(2 * self._down.out_features, device=weight.device)
            x = torch.sin(ramp.float()).to(weight.dtype).view(1, 2, -1)
            full = CompactWeights(**{name: w[None] for name, w in self._dense().items()})
            ours = sparse_ffn(x[0], full, self._dense_bias(), self._activation)
            theirs = self._original(x)[0]
        scale = theirs.float().abs().max().clamp_min(torch.finfo(weight.dtype).tiny)
        error = float((ours.float() - theirs.float()).abs().max() / scale)
        if not error < (1e-3 if weight.dtype == torch.float32 else 5e-2):
            raise UnsupportedModelError(
                f"{type(self.mlp).__name__} computes more than its activation and linear layers "
                f"(a probe differs by {error:.1e} of the output): put the model in eval mode, "
                "merge its adapters, or drop tokens only (neurons=None)"
            )

    def _dense(self) -> dict[str, Tensor]:
        """What a choice gathers from, by its name in `CompactWeights`: views, no copies."""
        rows: dict[str, Tensor | None] = {"down": self._down.weight}
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

    def _dense_bias(self) -> Tensor | None:
        """(1, d) or None, the bias of the down projection."""
        return None if self._down.bias is None else self._down.bias[None]

    def _gather(self, indices: Tensor) -> None:
        """(S, K) indices: fill the buffers, in place where their shapes match."""
        old = self._weights
        fresh: dict[str, Tensor] = {}
        sets, count = indices.shape
        for name, dense in self._dense().items():
            buffer = None if old is None else getattr(old, name)
            if name == "down":
                buffer = _buffer(buffer, (sets, dense.shape[0], count), dense)
                fresh[name] = gather_columns(dense, indices, buffer)
            else:
                buffer = _buffer(buffer, (sets, count, *dense.shape[1:]), dense)
                fresh[name] = gather_rows(dense, indices, buffer)
        if old is None or any(getattr(old, name) is not new for name, new in fresh.items()):
            self._weights = CompactWeights(**fresh)

    def _fold(self, mean: Tensor | None) -> None:
        """(B, F) means, or None: the one bias vector per sample that stands for dropped neurons."""
        down = self._down
        if mean is None:
            bias = self._dense_bias()
        else:
            bias = F.linear(mean.to(down.weight), down.weight, down.bias)
        if bias is None:
            self._bias = None
            return
        self._bias = _buffer(self._bias, tuple(bias.shape), bias)
        self._bias.copy_(bias)


def _buffer(old: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """``old`` where it fits, else an empty tensor at an address that compiled code may rely on."""
    if (
        old is not None
        and old.shape == shape
        and (old.dtype, old.device)
        == (
            like.dtype,
            like.device,
        )
    ):
        return old
    fresh = torch.empty(shape, dtype=like.dtype, device=like.device)
    torch._dynamo.mark_static_address(fresh)
    return fresh


def _distinct_sets(indices: Tensor) -> Tensor:
    """(B, K) to (S, K), each run of B / S equal neighbours stored once, for the smallest S."""
    batch = indices.shape[0]
    for sets in range(1, batch):
        if batch % sets:
            continue
        runs = indices.unflatten(0, (sets, -1))  # (S, B / S, K)
        if bool((runs == runs[:, :1]).all()):
            return runs[:, 0]
    return indices


def _check_linear(mlp: nn.Module, linear: nn.Module) -> None:
    """Refuse layers whose weight is not the plain matrix that their forward multiplies with."""
    kind = f"{type(mlp).__name__}'s {type(linear).__name__}"
    if hasattr(linear, "base_layer"):
        raise UnsupportedModelError(
            f"{kind} carries an adapter: merge it first (model = model.merge_and_unload())"
        )
    weight = getattr(linear, "weight", None)
    plain = isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward
    if not plain or not isinstance(weight, Tensor) or type(weight.data) is not Tensor:
        raise UnsupportedModelError(
            f"{kind} is quantised or sharded, so the rows of single neurons cannot be gathered: "
            "load the model in bf16 or fp32 without tensor parallelism, or drop tokens only "
            "(neurons=None)"
        )
    if weight.is_meta:
        raise UnsupportedModelError(
            f"{kind} is off-loaded (its weight is on 'meta'): load the whole model on one device"
        )
