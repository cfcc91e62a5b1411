"""The interface between policies and the runtime.

A *policy* decides what to keep; the *runtime* keeps it. The runtime shows a policy what a decoder
layer computed in the prefill (`PrefillView`) and gets a choice back (`TokenChoice`,
`NeuronChoice`). Neither side imports the other.

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

from corematching.views import HostView as HostView
from corematching.views import VisionView as VisionView

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
class PrefillView:
    """One decoder layer during the prefill, for a whole batch.

    Attributes
    ----------
    layer : int
        Index of the decoder layer that has just run; -1 is the input of layer 0.
    num_layers : int
        Decoder layers of the model.
    valid : Tensor
        (B, T) bool, False on padding.
    image : Tensor
        (B, T) bool, True on image tokens; False on padding.
    activations : Tensor or None
        (B, T, F), the input of ``down_proj``: ``act(gate(x)) * up(x)``, or ``act(up(x))``.
    hidden : Tensor or None
        (B, T, d), the layer's output. None until the layer has finished.
    embeddings : Tensor or None
        (B, T, d), the model's input embeddings of the tokens still present.
    attention : callable or None
        Attention probabilities of some queries: ``attention(rows)`` with ``rows`` (B, R) long gives
        (B, H, R, T), computed for these rows only.
    contributions : callable or None
        ``contributions()`` gives (B, T, d): token j's term of the last token's attention output,
        ``sum_h A_h[last, j] * W_O,h V_h,j``. The sum over j is that output.
    down_proj : Tensor or None
        (d, F), the weight of the down projection.
    inputs : Tensor or None
        (B, T, d), the input of the FFN.
    gate : callable or None
        The FFN's gate for some tokens: ``gate(rows)`` with ``rows`` (B, R) long gives (B, R, F),
        ``act(gate(x))``; in an FFN without a gate ``act(up(x))``.
    kept : Tensor or None
        (B, T) bool, the tokens left after the last cut. A neuron policy that needs it chooses the
        neurons of earlier layers only once this mask is known.
    vision : VisionView or None
        The vision tower's attention.
    origin : Tensor or None
        (B, T) long, the tokens' columns in the whole prompt.
    weights : Tensor or None
        (B, T) float, the number of prompt tokens that each one represents after an earlier choice;
        None: one each.
    host : HostView or None
        What the host knows of the masks without reading them.
    memory : dict
        One object per type, shared by all views of one prefill; see `recall`.
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
    host: HostView | None = None
    memory: dict[type, Any] = field(default_factory=dict)

    @property
    def text(self) -> Tensor:
        """(B, T) bool, True on text tokens: neither image nor padding."""
        return self.valid & ~self.image

    @property
    def last(self) -> Tensor:
        """(B,) long, the position of each sample's last token."""
        positions = torch.arange(self.valid.shape[1], device=self.valid.device)
        return (self.valid * positions).argmax(dim=1)

    def recall(self, kind: type[T]) -> T:
        """State that all views of one prefill share, one object per type.

        Parameters
        ----------
        kind : type
            A class of the policy's own, for state that it reads again at a later layer. The first
            call creates the object with ``kind()``.
        """
        if kind not in self.memory:
            self.memory[kind] = kind()
        found: T = self.memory[kind]
        return found


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
        Refuses what could not be read before; called once, when the first token is there.
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
