"""The one file where policy and runtime meet.

A *policy* decides what to keep; the *runtime* keeps it. The runtime shows a policy what a decoder
layer did during the prefill (`PrefillView`) and gets back a choice (`TokenChoice`, `NeuronChoice`).
Neither side imports the other.

Shapes in this file: B samples, T tokens still present (padding included), N image tokens,
d hidden size, F intermediate neurons of the FFN, H attention heads, K kept neurons, I images.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from corematching.errors import ConfigError

T = TypeVar("T")

ACTIVATIONS = "activations"
ATTENTION = "attention"
CONTRIBUTIONS = "contributions"
EMBEDDINGS = "embeddings"
GATE = "gate"
INPUTS = "inputs"
KEPT = "kept"
VISION = "vision"
NEEDS = frozenset({ACTIVATIONS, ATTENTION, CONTRIBUTIONS, EMBEDDINGS, GATE, INPUTS, KEPT, VISION})


@dataclass
class VisionView:
    """The attention of one layer of the vision tower, for the images of a batch.

    Only models in which one image token is one patch show it. Images stand in the prompts' order;
    their patches, in order, are the batch's image tokens in order. N patches an image, S = N plus
    the class tokens, D width of a head, c width of the features.

    Attributes
    ----------
    queries, keys : Tensor
        (I, H, S, D), class tokens first.
    scaling : float
        The layer's attention is ``softmax(queries @ keys^T * scaling)``.
    classes : int
        Class tokens, 0 or 1.
    features : Tensor
        (I, N, c), the input of the projector.
    project : callable
        The model's projector: (..., c) features to (..., d) input embeddings.
    """

    queries: Tensor
    keys: Tensor
    scaling: float
    classes: int
    features: Tensor
    project: Callable[[Tensor], Tensor]


@dataclass
class PrefillView:
    """One decoder layer during the prefill, for a whole batch.

    Attributes
    ----------
    layer : int
        The decoder layer that has just run, counted from 0; -1 is the input of layer 0.
    num_layers : int
        Decoder layers of the model.
    valid : Tensor
        (B, T) bool, False on padding.
    image : Tensor
        (B, T) bool, True on image tokens; never True on padding.
    activations : Tensor or None
        (B, T, F), the input of ``down_proj``: ``act(gate(x)) * up(x)``, or ``act(up(x))``.
    hidden : Tensor or None
        (B, T, d), the output of the layer. None while the layer still runs.
    embeddings : Tensor or None
        (B, T, d), the model's input embeddings of the tokens still present.
    attention : callable or None
        Rows of this layer's attention: ``attention(rows)`` with ``rows`` (B, R) long gives
        (B, H, R, T) probabilities, computed for these rows only.
    contributions : callable or None
        ``contributions()`` gives (B, T, d): token j's term of the last token's attention output,
        ``sum_h A_h[last, j] * W_O,h V_h,j``; their sum over j is that output.
    down_proj : Tensor or None
        (d, F), the weight behind the activations.
    inputs : Tensor or None
        (B, T, d), the input of the FFN.
    gate : callable or None
        The FFN's gate, computed anew for some tokens: ``gate(rows)`` with ``rows`` (B, R) long
        gives (B, R, F), ``act(gate(x))``; in an FFN without a gate ``act(up(x))``.
    kept : Tensor or None
        (B, T) bool, the tokens that go on behind the last layer after which tokens are dropped;
        a neuron policy that reads it chooses the neurons of the layers before when this is known.
    vision : VisionView or None
        The vision tower's attention.
    origin : Tensor or None
        (B, T) long, the columns of the whole prompt in which these tokens stood.
    weights : Tensor or None
        (B, T) float, how many of the prompt's tokens each one counts for since an earlier choice;
        None: each for itself.
    memory : dict
        One object of each type, shared by all views of one prefill; see `recall`.
    """

    layer: int
    num_layers: int
    valid: Tensor
    image: Tensor
    activations: Tensor | None = None
    hidden: Tensor | None = None
    embeddings: Tensor | None = None
    attention: Callable[[Tensor], Tensor] | None = None
    contributions: Callable[[], Tensor] | None = None
    down_proj: Tensor | None = None
    inputs: Tensor | None = None
    gate: Callable[[Tensor], Tensor] | None = None
    kept: Tensor | None = None
    vision: VisionView | None = None
    origin: Tensor | None = None
    weights: Tensor | None = None
    memory: dict[type, Any] = field(default_factory=dict)

    @property
    def text(self) -> Tensor:
        """(B, T) bool, the tokens that are neither image nor padding."""
        return self.valid & ~self.image

    @property
    def last(self) -> Tensor:
        """(B,) long, the position of each sample's last token."""
        positions = torch.arange(self.valid.shape[1], device=self.valid.device)
        return (self.valid * positions).argmax(dim=1)

    def recall(self, kind: type[T]) -> T:
        """The object of a type that all views of one prefill share.

        Parameters
        ----------
        kind : type
            A class that a policy defines for what it wants to find again at a later layer. The
            first call makes the object, ``kind()``.
        """
        if kind not in self.memory:
            self.memory[kind] = kind()
        found: T = self.memory[kind]
        return found


@dataclass
class TokenChoice:
    """The tokens that travel on.

    Attributes
    ----------
    keep : Tensor
        (B, T) bool; True on every text token, False on padding.
    scores : Tensor
        (B, T) float; NaN where the token is no image token.
    cut : Tensor
        (B,) float, the lowest score that is kept; NaN in a sample without image tokens.
    hidden : Tensor or None
        (B, T, d), hidden states that replace the layer's, for methods that merge tokens.
    weights : Tensor or None
        (B, T) float, positive: how many tokens each kept one counts for. Whoever attends to it, in
        the layers behind and in all layers of every later token, adds the logarithm to its score
        (proportional attention: Token Merging, arXiv:2210.09461, section 3). None: as before.
    """

    keep: Tensor
    scores: Tensor
    cut: Tensor
    hidden: Tensor | None = None
    weights: Tensor | None = None


@dataclass
class NeuronChoice:
    """The intermediate neurons that the decode steps compute.

    Attributes
    ----------
    indices : Tensor or None
        (B, K) long, ascending. None as long as it is left for later.
    mean : Tensor or None
        (B, F), the stand-in of each dropped neuron (its mean over the prompt), 0 on kept ones;
        the runtime folds it into one bias vector, ``down_proj @ mean``. None: dropped ones count 0.
    input_threshold : Tensor or None
        (B,) float: per decoded token, entries of the FFN's input with a smaller magnitude count 0.
    gate_threshold : Tensor or None
        (B,) float: per decoded token, a kept neuron goes on to ``up`` and ``down`` only if
        ``|act(gate(x))|`` reaches it.
    output_threshold : Tensor or None
        (B,) float: per decoded token, a kept neuron goes on to ``down`` only if its activation's
        magnitude reaches it.
    later : callable or None
        ``later()`` gives further attributes by name. It is called once, when a token is about to be
        decoded, so that the first token, which comes from the prompt, need not wait for them. It
        holds little in memory until then.
    """

    indices: Tensor | None = None
    mean: Tensor | None = None
    input_threshold: Tensor | None = None
    gate_threshold: Tensor | None = None
    output_threshold: Tensor | None = None
    later: Callable[[], Mapping[str, Tensor | None]] | None = None

    def materialize(self) -> NeuronChoice:
        """This choice, with the attributes of `later` filled in."""
        if self.later is not None:
            found, self.later = self.later(), None
            for name, value in found.items():
                setattr(self, name, value)
        return self


class TokenPolicy(ABC):
    """Decides which image tokens go on, after one layer or several."""

    @property
    def needs(self) -> frozenset[str]:
        """The parts of the view that `choose` reads, out of `NEEDS`; default: activations."""
        return frozenset({ACTIVATIONS})

    @property
    def proportional(self) -> bool:
        """Whether choices carry weights; default: no."""
        return False

    @property
    def vision_layer(self) -> int:
        """The layer of the vision tower that a policy which needs `VISION` is shown.

        Counted from the end; default: -1, the last.
        """
        return -1

    @abstractmethod
    def drop_after(self, num_layers: int) -> tuple[int, ...]:
        """Layers after which tokens are dropped.

        Parameters
        ----------
        num_layers : int
            Decoder layers of the model.

        Returns
        -------
        tuple of int
            Ascending, each in [-1, num_layers - 2]; -1 is the input of layer 0.
        """
        ...

    @abstractmethod
    def choose(self, view: PrefillView) -> TokenChoice:
        """Choose among the tokens still present.

        Parameters
        ----------
        view : PrefillView
            The layer that has just run; it has the parts that `needs` names.

        Returns
        -------
        TokenChoice
            For the tokens of the view.
        """
        ...


class NeuronPolicy(ABC):
    """Decides which intermediate neurons each layer computes in the decode."""

    @property
    def needs(self) -> frozenset[str]:
        """The parts of the view that `choose` reads, out of `NEEDS`; default: activations."""
        return frozenset({ACTIVATIONS})

    @property
    def per_token(self) -> bool:
        """Whether choices carry thresholds; default: no.

        The runtime then takes a layer over even where it keeps all ``width`` neurons.
        """
        return False

    @property
    def decode_ratio(self) -> float:
        """The ratio of the kept neurons' weights that a decoded token reads; default: 1.

        An estimate, by which reports count.
        """
        return 1.0

    @abstractmethod
    def counts(self, num_layers: int, width: int) -> tuple[int, ...]:
        """Neurons to keep in each layer.

        Parameters
        ----------
        num_layers : int
            Decoder layers of the model.
        width : int
            Neurons of each layer's FFN.

        Returns
        -------
        tuple of int
            One count per layer, in [1, width]; ``width`` leaves the layer dense.
        """
        ...

    @abstractmethod
    def choose(self, view: PrefillView, count: int) -> NeuronChoice:
        """Choose neurons of the view's layer for each sample.

        Parameters
        ----------
        view : PrefillView
            The layer, while its FFN runs.
        count : int
            Neurons to keep, as `counts` said.

        Returns
        -------
        NeuronChoice
            ``count`` indices for each sample, at once or with ``later``.
        """
        ...


class Method(Protocol):
    """A token policy, a neuron policy, or both."""

    @property
    def tokens(self) -> TokenPolicy | None: ...

    @property
    def neurons(self) -> NeuronPolicy | None: ...

    def to_dict(self) -> dict[str, Any]: ...


def check_policies(method: Method) -> None:
    """Refuse a method whose policies do not subclass those of this file.

    Raises
    ------
    ConfigError
        Naming the class to subclass.
    """
    pairs = ("tokens", method.tokens, TokenPolicy), ("neurons", method.neurons, NeuronPolicy)
    for name, policy, base in pairs:
        if policy is not None and not isinstance(policy, base):
            raise ConfigError(
                f"{name} is a {type(policy).__name__}, which is no {base.__name__}: let the class "
                f"subclass corematching.protocol.{base.__name__}"
            )
