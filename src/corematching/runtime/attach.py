"""Installs a method on a model and removes it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from corematching.backends.choice_checks import check_materialized
from corematching.errors import AlreadyInstalledError, InputError
from corematching.model.spec import ModelSpec, check_policies
from corematching.offload.offload import find_offload
from corematching.protocol import Method
from corematching.report import Report
from corematching.runtime.choices import Choices, read_choices
from corematching.runtime.flops import build_report
from corematching.runtime.record import Record
from corematching.runtime.session import Session
from corematching.runtime.substitute import check_substitute

MARK = "_corematching"
"""The model's attribute for its installed session, or for the claim of an installation in progress.

``dict.setdefault`` is atomic, so no lock is needed that an interrupt could leave closed.
"""


class Run:
    """A method installed on a model, as `attach` returns it.

    Parameters
    ----------
    session : Session
        The model's session.

    Attributes
    ----------
    model : nn.Module
        The model.
    method : Method
        The method.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.model, self.method = session.model, session.installed

    @property
    def report(self) -> Report:
        """The report of the last generate() or prompt; waits for the device.

        Raises
        ------
        InputError
            Nothing has run yet.
        """
        return self._report(self._last)

    @property
    def reports(self) -> list[Report]:
        """The reports of the last 16 runs, the latest last; waits for the device."""
        return [self._report(record) for record in self._session.log.records]

    @property
    def choices(self) -> list[Choices]:
        """The choices of the last generate() or prompt, per sample; waits for the device.

        Independent copies on the CPU. A turn that continues from a cache has the choices of its
        conversation's first prompt. Only the last run's choices are available.

        Raises
        ------
        InputError
            Nothing has run yet, or the conversation's first prompt is no longer on record.
        """
        record = self._last
        check_materialized(self._session.sparse.values())
        return read_choices(record, len(self._session.parts.layers))

    @property
    def spec(self) -> ModelSpec:
        """The model's parts."""
        return self._session.parts

    @contextmanager
    def substitute(self, method: Method) -> Iterator[None]:
        """Let another method read this thread's prompts inside a ``with`` block.

        For another budget than the installed method's, or none (`Dense`), without installing it
        anew. What a prompt chose goes with its cache, so decode steps may follow outside of the
        block. Reports name the installed method.

        Parameters
        ----------
        method : Method
            Like the installed one but for the number of image tokens, or without neurons.

        Raises
        ------
        ConfigError
            It needs something else on the model than the installed one.
        """
        check_substitute(self._session.parts, self.method, method)
        with self._session.substitute.use(method):
            yield

    def remove(self) -> None:
        """Remove this method from the model, if it is still installed.

        Waits for another thread's run.

        Raises
        ------
        AlreadyInstalledError
            This thread is in the middle of a run.
        """
        _take_off(self.model, self._session)

    @property
    def _last(self) -> Record:
        """The record of the last run."""
        if not self._session.log.records:
            raise InputError("nothing has run yet: call model.generate(**inputs) first")
        return self._session.log.records[-1]

    def _report(self, record: Record) -> Report:
        self._session.log.close(record)
        return build_report(record, self._session.parts, self.method, self.model)


def attach(
    model: nn.Module, method: Method, engine: str = "auto", memory: str | int | None = None
) -> Run:
    """Install a method on one model.

    A turn that continues from a cache keeps that cache's choices: only the first prompt drops
    tokens. A cache's choices follow its rows and columns, whether its own methods change them
    (``batch_select_indices``, ``crop``, ...) or its keys and values are replaced. A sliding window
    of a shortened cache counts present tokens only. generate() refuses ``use_cache=False``, which
    would run the prompt again at every step. Modules may be replaced between runs: the next run
    inspects the model again, or raises for an unsupported one.

    Parameters
    ----------
    model : nn.Module
        A loaded ``PreTrainedModel``.
    method : Method
        Its policies choose tokens and neurons.
    engine : str
        The backend of prompts and decode steps: ``auto``, the fastest one for this model and
        machine (compiled kernels on a CPU, Triton kernels on a GPU); ``torch``, PyTorch operators
        only; ``native``, the compiled CPU kernels, or an error where there are none.
    memory : str or int, optional
        Cap on the model's device memory, such as ``"12GiB"``. The FFNs of the layers with chosen
        neurons then stay in pinned host memory (GPU) or in a file (CPU), and each prompt streams
        them. They decode in PyTorch.

    Returns
    -------
    Run
        Access to reports and choices.

    Raises
    ------
    AlreadyInstalledError
        A method is already installed on this model.
    ConfigError
        The engine is unknown, or a policy has the wrong type.
    MemoryCapError
        The model does not fit under the cap.
    UnsupportedModelError
        The method cannot run on this model; the message names the reason and the fix.
    """
    check_policies(method)
    claim = object()
    offload = at_work = None
    try:
        _claim(model, claim)
        offload = find_offload(model, memory)
        at_work = Session(model, method, engine, offload)
        at_work.install()
        vars(model)[MARK] = at_work
        return Run(at_work)
    except BaseException:
        if at_work is not None:
            at_work.remove()
        if offload is not None:
            offload.remove()
        _forget(model, claim, at_work)
        raise


def _claim(model: nn.Module, claim: object) -> None:
    """Reserve the model for this installation."""
    if isinstance(model, nn.Module) and vars(model).setdefault(MARK, claim) is not claim:
        raise AlreadyInstalledError(
            f"a method is already installed on this {type(model).__name__}: remove it first "
            "(leave its `with` block, or call remove(model))"
        )


def _forget(model: nn.Module, *users: object) -> None:
    """Release the model if one of these holds it."""
    found = getattr(model, MARK, None)
    if found is not None and any(found is user for user in users):
        del vars(model)[MARK]


def detach(model: nn.Module) -> None:
    """Remove the model's method with all hooks, attributes and patches.

    Does nothing where none is installed; waits for another thread's run.

    Raises
    ------
    AlreadyInstalledError
        This thread is in the middle of a run, or another one is installing a method.
    """
    session = getattr(model, MARK, None)
    if session is not None and not isinstance(session, Session):
        raise AlreadyInstalledError(
            "another thread is installing a method on this model: remove it when that is done"
        )
    if session is not None:
        _take_off(model, session)


def is_attached(model: nn.Module) -> bool:
    """Whether a method is installed on this model."""
    return isinstance(getattr(model, MARK, None), Session)


def _take_off(model: nn.Module, session: Session) -> None:
    with session.lock.hold("remove()", wait=True):
        session.remove()
        _forget(model, session)
