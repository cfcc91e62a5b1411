"""The base class of methods: install on a model, remove from it."""

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
"""Parameters for the number of kept image tokens."""
NEURON_RATIOS = ("neuron_ratio", "active_ratio")
"""Parameters for the number of kept neurons: for the answer, or for each token."""


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
        """The rule for image tokens that `make_tokens` gives."""
        return self._policies()[0]

    @property
    def neurons(self) -> NeuronPolicy | None:
        """The rule for neurons that `make_neurons` gives."""
        return self._policies()[1]

    def _policies(self) -> tuple[TokenPolicy | None, NeuronPolicy | None]:
        if "_made" not in vars(self):
            object.__setattr__(self, "_made", (self.make_tokens(), self.make_neurons()))
        return cast("tuple[TokenPolicy | None, NeuronPolicy | None]", vars(self)["_made"])

    @classmethod
    def at_budget(cls, params: Mapping[str, Any], ratio: float) -> dict[str, Any] | None:
        """Parameters with one open parameter set to a ratio; None where none is open.

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
        """Parameters with the neurons' ratio set; None where it is stated, or there is none.

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
        """Install the method on this model instance until `remove`, as a server does.

        Parameters
        ----------
        model : Module
            A loaded model.
        engine : str
            Code for prompts and decode steps: ``auto``, ``torch`` or ``native``; see
            `corematching.runtime.attach`.
        memory : str or int, optional
            Cap on the model's device memory, such as ``"12GiB"``; weights that decoding does not
            need are then kept outside. Default: the method's own ``memory``.

        Raises
        ------
        AlreadyInstalledError
            A method is installed on the model already.
        MemoryCapError
            The model does not fit under the cap.
        UnsupportedModelError
            The model's tokens or neurons cannot be pruned.
        """
        from corematching.runtime import attach

        cap = self.memory if memory is None else memory
        return attach(model, cast(Any, self), engine, cap)

    def remove(self, model: Module) -> None:
        """Remove the method from the model; does nothing where none is installed.

        Parameters
        ----------
        model : Module
            A model with the method installed.

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
        """Install the method for the length of a ``with`` block, also after an exception.

        Parameters
        ----------
        model : Module
            A loaded model.
        engine, memory : optional
            As for `install`, also for the errors raised.
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
