"""Puts a method on a model, and takes it off again."""

from __future__ import annotations

from torch import nn

from corematching.backends.choice_checks import check_settled
from corematching.errors import AlreadyInstalledError, InputError
from corematching.model.spec import check_policies
from corematching.offload.offload import find_offload
from corematching.protocol import Method
from corematching.report import Report
from corematching.runtime.choices import Choices, read_choices
from corematching.runtime.flops import build_report
from corematching.runtime.record import Record
from corematching.runtime.session import Session

MARK = "_corematching"
"""The attribute under which a model has the session that is on it, or the claim of one to come.

Entries of a dictionary are made and found in one step, so that no lock is needed that an interrupt
could leave closed.
"""


class Run:
    """A method at work on a model, as `attach` gives it.

    Parameters
    ----------
    session : Session
        What `attach` has put on the model.

    Attributes
    ----------
    model : nn.Module
        The model.
    method : Method
        The method.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.model, self.method = session.model, session.method

    @property
    def report(self) -> Report:
        """What the last generate() or prompt kept, dropped and saved; waits for the device.

        Raises
        ------
        InputError
            Nothing has run yet.
        """
        return self._report(self._last)

    @property
    def reports(self) -> list[Report]:
        """The same for the last 16 runs, the latest last."""
        return [self._report(record) for record in self._session.records]

    @property
    def choices(self) -> list[Choices]:
        """What the last generate() or prompt chose, per sample; waits for the device.

        Copies on the CPU, that stay as they are whatever runs next. A turn that goes on from a
        cache shows the choices of its conversation. Only the last run has them: earlier ones let go
        of their neurons.

        Raises
        ------
        InputError
            Nothing has run yet, or the prompt that chose is no longer on record.
        """
        record = self._last
        check_settled(self._session.sparse.values())
        return read_choices(record, len(self._session.parts.layers))

    def remove(self) -> None:
        """Take this method off the model; does nothing where it is off already.

        Waits for a run of another thread.

        Raises
        ------
        AlreadyInstalledError
            This thread is in the middle of a run.
        """
        _take_off(self.model, self._session)

    @property
    def _last(self) -> Record:
        """The record of the last run."""
        if not self._session.records:
            raise InputError("nothing has run yet: call model.generate(**inputs) first")
        return self._session.records[-1]

    def _report(self, record: Record) -> Report:
        self._session.log.close(record)
        return build_report(record, self._session.parts, self.method, self.model)


def attach(
    model: nn.Module, method: Method, engine: str = "auto", memory: str | int | None = None
) -> Run:
    """Install a method on one model; nothing runs before the model does.

    A turn that goes on from a cache keeps that cache's choices: only the first prompt drops tokens.
    What a cache remembers follows its rows and columns, whether its own methods change them
    (``batch_select_indices``, ``crop``, ...) or its keys and values are replaced. A sliding window
    of a shortened cache counts the tokens that are still present. generate() refuses
    ``use_cache=False``, which would run the prompt again at every step. Modules may be replaced
    meanwhile: the next run reads the model anew, or says what it cannot run on.

    Parameters
    ----------
    model : nn.Module
        A loaded ``PreTrainedModel``.
    method : Method
        What chooses tokens and neurons.
    engine : str
        What may run decode steps and prompts: ``auto``, whatever is fastest for this model here
        (compiled kernels on a CPU, Triton's on a GPU); ``torch``, PyTorch's operators only;
        ``native``, the compiled CPU kernels, or an error where there are none.
    memory : str or int, optional
        What the model may take of its device's memory, such as ``"12GiB"``: the FFNs of the layers
        whose neurons are chosen are then kept outside, in pinned host memory (GPU) or in a file
        (CPU), and each prompt streams them. They decode in PyTorch.

    Returns
    -------
    Run
        Gives the reports.

    Raises
    ------
    AlreadyInstalledError
        A method is already installed on this model.
    ConfigError
        There is no such engine, or a policy is of another type.
    MemoryCapError
        The model does not fit under the cap.
    UnsupportedModelError
        The model cannot be shortened; the message says why and what to do.
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
    """Let nobody else install on this model."""
    if isinstance(model, nn.Module) and vars(model).setdefault(MARK, claim) is not claim:
        raise AlreadyInstalledError(
            f"a method is already installed on this {type(model).__name__}: remove it first "
            "(leave its `with` block, or call remove(model))"
        )


def _forget(model: nn.Module, *users: object) -> None:
    """Let others install on this model, where one of these did."""
    found = getattr(model, MARK, None)
    if found is not None and any(found is user for user in users):
        del vars(model)[MARK]


def detach(model: nn.Module) -> None:
    """Take the method off the model; no hook, attribute or patch of ours stays.

    Does nothing where none is installed; waits for a run of another thread.

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
