"""The interface between policies and the runtime.

A *policy* decides what to keep; the *runtime* keeps it. The runtime shows a policy what a decoder
layer computed in the prefill (`PrefillView`) and gets a choice back (`TokenChoice`,
`NeuronChoice`). Neither side imports the other.

Shapes in this file: B samples, T tokens still present (padding included), d hidden size,
F intermediate neurons of the FFN, K kept neurons.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from corematching.views import HostView as HostView
from corematching.views import PrefillView
from corematching.views import VisionView as VisionView

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
class TokenChoice:
    """The tokens to keep.

    Attributes
    ----------
    keep : Tensor
        (B, T) bool; True on every text token, False on padding.
    scores : Tensor
        (B, T) float; NaN on all but image tokens.
    cut : Tensor
        (B,) float, the lowest kept score; NaN in a sample without image tokens.
    hidden : Tensor or None
        (B, T, d), hidden states that replace the layer's, for methods that merge tokens.
    weights : Tensor or None
        (B, T) float, positive: the number of tokens that each kept one represents. Later layers of
        the prefill, and all layers of every later token, add its logarithm to the attention scores
        (proportional attention: Token Merging, arXiv:2210.09461, section 3). None: unchanged.
    counts : tuple of int or None
        Image tokens that each sample keeps, where they are known without reading ``keep``.
    check : callable or None
        Called once, when the first token is there, to refuse what could not be read before.
    """

    keep: Tensor
    scores: Tensor
    cut: Tensor
    hidden: Tensor | None = None
    weights: Tensor | None = None
    counts: tuple[int, ...] | None = None
    check: Callable[[], None] | None = None


@dataclass
class NeuronChoice:
    """The intermediate neurons of the decode steps.

    Attributes
    ----------
    indices : Tensor or None
        (B, K) long, ascending. None while ``later`` has yet to give them.
    mean : Tensor or None
        (B, F), a constant for each dropped neuron (its mean over the prompt), 0 on kept ones. The
        runtime folds it into one bias vector, ``down_proj @ mean``. None: dropped neurons are 0.
    input_threshold : Tensor or None
        (B,) float: per decoded token, entries of the FFN's input below this magnitude are set to 0.
    gate_threshold : Tensor or None
        (B,) float: per decoded token, ``up`` and ``down`` skip kept neurons whose
        ``|act(gate(x))|`` is below this.
    output_threshold : Tensor or None
        (B,) float: per decoded token, ``down`` skips kept neurons whose activation is below this
        magnitude.
    later : callable or None
        ``later()`` gives further attributes by name. It is called once, before the first decode
        step, so that the first token does not wait for them. Until then it should hold little
        memory.
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
    """Chooses the image tokens to keep, after one layer or several."""

    @property
    def needs(self) -> frozenset[str]:
        """The parts of the view that `choose` reads, out of `NEEDS`; default: activations."""
        return frozenset({ACTIVATIONS})

    @property
    def proportional(self) -> bool:
        """True if choices carry weights; default: False."""
        return False

    @property
    def vision_layer(self) -> int:
        """The vision tower's layer in ``view.vision``, counted from the end; default: -1."""
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

    @abstractmethod
    def choose(self, view: PrefillView) -> TokenChoice:
        """Choose among the tokens still present.

        Parameters
        ----------
        view : PrefillView
            The layer that has just run, with the parts in `needs`.

        Returns
        -------
        TokenChoice
            One entry per token of the view.
        """


class NeuronPolicy(ABC):
    """Chooses each layer's intermediate neurons for the decode steps."""

    @property
    def needs(self) -> frozenset[str]:
        """The parts of the view that `choose` reads, out of `NEEDS`; default: activations."""
        return frozenset({ACTIVATIONS})

    @property
    def per_token(self) -> bool:
        """True if choices carry thresholds; default: False.

        The runtime then replaces a layer's FFN even where it keeps all ``width`` neurons.
        """
        return False

    @property
    def gate_thresholds(self) -> bool:
        """True if choices carry thresholds of the gate; default: False.

        A model whose FFNs have no gate is then refused before anything runs.
        """
        return False

    @property
    def decode_ratio(self) -> float:
        """Estimated ratio of the kept neurons' weights that a decode step reads; default: 1.

        For reports only.
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

    @abstractmethod
    def choose(self, view: PrefillView, count: int) -> NeuronChoice:
        """Choose neurons of the view's layer for each sample.

        Parameters
        ----------
        view : PrefillView
            The layer, while its FFN runs.
        count : int
            Neurons to keep, from `counts`.

        Returns
        -------
        NeuronChoice
            ``count`` indices for each sample, at once or from ``later``.
        """


class Method(Protocol):
    """A token policy, a neuron policy, or both."""

    @property
    def tokens(self) -> TokenPolicy | None: ...

    @property
    def neurons(self) -> NeuronPolicy | None: ...

    def to_dict(self) -> dict[str, Any]: ...
