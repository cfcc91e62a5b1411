"""The base of every method: what can be put on a model and taken off again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from corematching.policies.component import Component, build, parameters_of
from corematching.protocol import NeuronPolicy, TokenPolicy

if TYPE_CHECKING:
    from torch.nn import Module

    from corematching.runtime import Run

AMOUNTS = ("keep_ratio", "keep_tokens", "budget")
"""Parameters that say how many image tokens are kept."""
NEURON_RATIOS = ("neuron_ratio", "active_ratio")
"""Parameters that say how many neurons are: for the answer, or for each token."""


class BaseMethod(Component, kind="method"):
    """A method: a rule for image tokens, a rule for neurons, or both.

    A concrete one is a frozen dataclass with a name, ``class Mine(BaseMethod, name="mine")``, that
    overrides `make_tokens` or `make_neurons`. Its fields are its parameters in Python, on the
    command line and in JSON.
    """

    memory: str | int | None = None

    def __post_init__(self) -> None:
        self._policies()

    def make_tokens(self) -> TokenPolicy | None:
        """The rule for image tokens; None keeps all."""
        return None

    def make_neurons(self) -> NeuronPolicy | None:
        """The rule for neurons; None computes all."""
        return None

    @property
    def tokens(self) -> TokenPolicy | None:
        """The rule for image tokens that the parameters amount to."""
        return self._policies()[0]

    @property
    def neurons(self) -> NeuronPolicy | None:
        """The rule for neurons that the parameters amount to."""
        return self._policies()[1]

    def _policies(self) -> tuple[TokenPolicy | None, NeuronPolicy | None]:
        if "_made" not in vars(self):
            object.__setattr__(self, "_made", (self.make_tokens(), self.make_neurons()))
        return cast("tuple[TokenPolicy | None, NeuronPolicy | None]", vars(self)["_made"])

    @classmethod
    def at_budget(cls, params: Mapping[str, Any], ratio: float) -> dict[str, Any] | None:
        """Parameters with one that is still open set to a ratio; None where none is open.

        It is the ratio of the image tokens where the method drops some, else that of the neurons.

        Parameters
        ----------
        params : mapping
            The parameters that are stated.
        ratio : float
            In (0, 1].
        """
        method = cast(BaseMethod, build("method", cls.name, **params))
        known = parameters_of(cls)
        drops = method.tokens is not None and "keep_ratio" in known
        if drops and not any(name in params for name in AMOUNTS):
            return {**params, "keep_ratio": ratio}
        return cls.at_neuron_ratio(params, ratio)

    @classmethod
    def at_neuron_ratio(cls, params: Mapping[str, Any], ratio: float) -> dict[str, Any] | None:
        """Parameters with that of the neurons set; None where it is stated, or there is none.

        Parameters
        ----------
        params : mapping
            The parameters that are stated.
        ratio : float
            In (0, 1].
        """
        for name in NEURON_RATIOS:
            if name in parameters_of(cls) and name not in params:
                return {**params, name: ratio}
        return None

    def install(self, model: Module, engine: str = "auto", memory: str | int | None = None) -> Run:
        """Put the method on this model instance and leave it on, as a server does.

        Parameters
        ----------
        model : Module
            A loaded model.
        engine : str
            What may run decode steps and prompts: ``auto``, ``torch`` or ``native``; see
            `corematching.runtime.attach`.
        memory : str or int, optional
            What the model may take of its device's memory, such as ``"12GiB"``: the weights that
            decoding does not need are then kept outside. Default: the method's own ``memory``.

        Raises
        ------
        AlreadyInstalledError
            When a method is on the model already.
        MemoryCapError
            When the model does not fit under the cap.
        UnsupportedModelError
            When the model cannot be shortened or thinned out.
        """
        from corematching.runtime import attach

        cap = self.memory if memory is None else memory
        return attach(model, cast(Any, self), engine, cap)

    def remove(self, model: Module) -> None:
        """Take the method off the model; does nothing where none is on it.

        Parameters
        ----------
        model : Module
            A model that `install` has put it on.

        Raises
        ------
        AlreadyInstalledError
            This thread is in the middle of a run.
        """
        from corematching.runtime import detach

        detach(model)

    @contextmanager
    def __call__(
        self, model: Module, engine: str = "auto", memory: str | int | None = None
    ) -> Iterator[Run]:
        """Put the method on for the length of a ``with`` block, whatever happens in it.

        Parameters
        ----------
        model : Module
            A loaded model.
        engine, memory : optional
            As for `install`, which also says what is raised.
        """
        run: Run | None = None
        try:
            try:
                run = self.install(model, engine, memory)
                yield run
            finally:
                if run is not None:
                    run.remove()
        finally:
            if run is not None:
                run.remove()  # an interrupt may have cut the first one short
