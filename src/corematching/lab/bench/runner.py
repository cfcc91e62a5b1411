"""Measures the contenders in alternation, A B A B, and makes the board of the figures."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from corematching.errors import ConfigError
from corematching.lab.bench.board import make_board
from corematching.lab.bench.contenders import Contender, MethodContender, Turn
from corematching.lab.bench.machine import CpuMeter, measure_ceilings, probe_others, require_quiet
from corematching.lab.bench.peers import PeerContender, PeerError
from corematching.lab.bench.workload import Workload
from corematching.lab.evaluate.machine import describe_machine

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with the current step, the number of turns so far, and that of all."""
SETTLE_SECONDS = 0.25
"""After a turn, so that the last engine's waiting threads go to sleep before the next one's."""


@dataclass(frozen=True)
class Plan:
    """How to measure.

    Attributes
    ----------
    new_tokens : int
        Tokens of an answer; at least 2.
    rounds : int
        Turns of each contender.
    force : bool
        Measure on a busy machine as well.
    """

    new_tokens: int = 64
    rounds: int = 7
    force: bool = False

    def __post_init__(self) -> None:
        if self.new_tokens < 2:
            raise ConfigError(
                f"--new-tokens {self.new_tokens} leaves no decode step to time: give 2 or more"
            )
        if self.rounds < 1:
            raise ConfigError(f"--rounds {self.rounds} measures nothing: give 1 or more")


def run_bench(
    workload: Workload,
    ours: Sequence[MethodContender],
    peers: Sequence[PeerContender],
    plan: Plan,
    settings: dict[str, Any],
    progress: Progress = lambda text, done, total: None,
    probe: Callable[[], float] = probe_others,
) -> dict[str, Any]:
    """Measure contenders in turn.

    Parameters
    ----------
    workload : Workload
        The model and its questions.
    ours : sequence of MethodContender
        The first one is the dense model that the others are compared with.
    peers : sequence of PeerContender
        One that fails is left out and named with its reason.
    plan : Plan
    settings : dict
        Goes into the result as it is.
    progress : callable
    probe : callable
        Gives the ratio of the processor time that other programs use.

    Returns
    -------
    dict
        As `make_board` describes.

    Raises
    ------
    BusyMachineError
        The machine is busy and ``plan.force`` is False.
    """
    busy_before = require_quiet(probe, plan.force)
    progress("measuring the machine", 0, 1)
    ceilings = measure_ceilings(workload.model.device, workload.model.dtype)
    failed: dict[str, str] = {}
    entries, busy_during = _measure(ours, peers, plan.rounds, failed, progress)
    facts = {
        **_list_facts(workload, plan),
        "others_cpu": {"before": busy_before, "during": busy_during},
        "failed": failed,
        **settings,
    }
    return make_board(entries, ceilings, plan.new_tokens, batch=workload.batch, facts=facts)


def _measure(
    ours: Sequence[MethodContender],
    peers: Sequence[PeerContender],
    rounds: int,
    failed: dict[str, str],
    progress: Progress,
) -> tuple[list[dict[str, Any]], float]:
    """An entry of the board for each contender, and how busy the machine was meanwhile."""
    with ExitStack() as stack:
        ready: list[Contender] = []
        everyone: list[Contender] = [*ours, *peers]
        for contender in everyone:
            progress(f"warming up {contender.name}", 0, 1)
            stack.callback(contender.stop)
            if _try(contender, contender.start, failed):
                ready.append(contender)
        _tell_memory(ours)
        meter = CpuMeter()
        turns = take_turns(ready, rounds, failed, progress)
        busy = meter.ratio()
        entries = [
            {"name": c.name, "kind": c.kind, "turns": turns[c.name], **c.describe()}
            for c in ready
            if c.name not in failed
        ]
    return entries, busy


def _list_facts(workload: Workload, plan: Plan) -> dict[str, Any]:
    """The model, the machine and the settings of a run."""
    device, dtype = workload.model.device, workload.model.dtype
    return {
        "model": workload.name,
        "random_weights": workload.random_weights,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "machine": describe_machine(device),
        "threads": torch.get_num_threads(),
        "batch": workload.batch,
        "prompt_tokens": workload.prompt_tokens,
        "new_tokens": plan.new_tokens,
        "rounds": plan.rounds,
    }


def take_turns(
    contenders: Sequence[Contender], rounds: int, failed: dict[str, str], progress: Progress
) -> dict[str, list[Turn]]:
    """Every contender once per round, in the same order, on the same pictures within a round."""
    turns: dict[str, list[Turn]] = {contender.name: [] for contender in contenders}
    total = rounds * len(contenders)
    for number in range(rounds):
        for index, contender in enumerate(contenders):
            progress(contender.name, number * len(contenders) + index, total)
            if contender.name in failed:
                continue

            def take(contender: Contender = contender, number: int = number) -> None:
                turns[contender.name].append(contender.take_turn(number + 1))

            _try(contender, take, failed)
            time.sleep(SETTLE_SECONDS)
    progress("done", total, total)
    return turns


def _try(contender: Contender, work: Callable[[], None], failed: dict[str, str]) -> bool:
    """Do some work; if a peer fails at it, note why."""
    try:
        work()
    except PeerError as error:
        logger.warning("%s failed: %s", contender.name, error)
        failed[contender.name] = str(error)
        return False
    return True


def _tell_memory(ours: Sequence[MethodContender]) -> None:
    """Tell each how much of this process's memory the others hold, which is not its own."""
    total = sum(contender.held for contender in ours)
    for contender in ours:
        contender.others_hold = total - contender.held
