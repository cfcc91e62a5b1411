"""Worker processes, each with a copy of the model on one device."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any

from corematching.errors import ConfigError, InputError
from corematching.lab.evaluate.answer import Subject
from corematching.lab.evaluate.plan import Plan
from corematching.lab.evaluate.respond import Assignment, Reply, Respondent
from corematching.lab.evaluate.task import Task
from corematching.methods import BaseMethod

_respondent: Respondent | None = None
"""Of this process, where it is a worker."""


class Crew:
    """Workers that share the batches of a task; each batch always goes to the same worker.

    So every worker prepares its pictures once, for all methods. The workers start at once.

    Parameters
    ----------
    count : int
        Processes.
    load : callable
        Loads the model in a worker; must be picklable.
    task : Task
    methods : mapping
        By the text that names them, dense among them.
    plan : Plan

    Raises
    ------
    ConfigError
        The count is below 1.
    """

    def __init__(
        self,
        count: int,
        load: Callable[[], Subject],
        task: Task[Any],
        methods: Mapping[str, BaseMethod],
        plan: Plan,
    ) -> None:
        if count < 1:
            raise ConfigError(f"jobs={count}: give a whole number of at least 1")
        context = multiprocessing.get_context("spawn")
        given = (load, task, dict(methods), plan, max(1, (os.cpu_count() or 1) // count))
        self._workers = [
            ProcessPoolExecutor(1, context, initializer=_start, initargs=given)
            for _ in range(count)
        ]
        before = set(multiprocessing.active_children())
        for worker in self._workers:
            worker.submit(_rest)
        self._processes = [p for p in multiprocessing.active_children() if p not in before]

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:  # what they load or answer now, no one waits for
            for process in self._processes:
                process.terminate()
        for worker in self._workers:
            worker.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.shutdown()

    def answer_all(self, assignments: Sequence[Assignment]) -> Iterator[Reply]:
        """The replies, as they come.

        Raises
        ------
        InputError
            A worker ended.
        """
        count = len(self._workers)
        try:
            futures = [
                self._workers[assignment.index % count].submit(_answer, assignment)
                for assignment in assignments
            ]
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise InputError(
                "a worker process ended before its answers were done (no memory left for another "
                "copy of the model?): run the same again with fewer --jobs to go on"
            ) from error


def _start(
    load: Callable[[], Subject],
    task: Task[Any],
    methods: Mapping[str, BaseMethod],
    plan: Plan,
    threads: int,
) -> None:
    """Make this process a worker."""
    import torch

    global _respondent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    end_with_parent()
    torch.set_num_threads(threads)
    _respondent = Respondent(load(), task, methods, plan)


def end_with_parent() -> None:
    """End this process with its parent, however the parent ends."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _rest() -> None:
    """Do nothing; a process starts with its first task."""


def _answer(assignment: Assignment) -> Reply:
    assert _respondent is not None
    return _respondent.answer(assignment)
