"""Other engines, each in a process of its own, on the same checkpoint and the same pictures.

An adapter is a file in a folder outside the package. Its constants are read without running it:

``NAME``      what the table calls it
``INSTALL``   the line that installs it
``NEEDS``     modules it imports
``PROGRAMS``  programs it needs on the PATH
``BATCHES``   whether it takes more than one sample at a time
``SHAPES``    whether it runs on shapes with random weights, which have no checkpoint
``NOTE``      what has to be said beside its times; may be empty

and its class ``Peer`` has ``__init__(options)`` and ``generate(request) -> float``, seconds.
"""

from __future__ import annotations

import ast
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

from corematching.errors import CoreMatchingError, InputError, unknown_name
from corematching.lab.bench.contenders import Measurement
from corematching.lab.bench.workload import Workload

logger = logging.getLogger(__name__)

SERVER = "serve.py"
INTERPRETER = "CORE_MATCHING_PEER_PYTHON_"
WARM_UP = 1_000_000


@dataclass(frozen=True)
class Adapter:
    """An adapter's file and its description of the engine.

    Attributes
    ----------
    path : Path
    name, install, note : str
    needs, programs : tuple of str
    batches, shapes : bool
    """

    path: Path
    name: str
    install: str
    note: str = ""
    needs: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    batches: bool = False
    shapes: bool = False

    @property
    def interpreter(self) -> str:
        """The Python that runs it: ``$CORE_MATCHING_PEER_PYTHON_<NAME>``, or this one."""
        return os.environ.get(INTERPRETER + self.name.upper(), sys.executable)

    def why_not(self, batch: int, random_weights: bool) -> str | None:
        """Why it cannot run here; None if it can."""
        missing = self.find_missing()
        if missing:
            return f"not installed ({', '.join(missing)} missing): {self.install}"
        if batch > 1 and not self.batches:
            return "takes one sample at a time"
        if random_weights and not self.shapes:
            return "needs a checkpoint, and a shape has none"
        return None

    def find_missing(self) -> list[str]:
        """The modules that its interpreter lacks, and the programs that the PATH lacks."""
        if shutil.which(self.interpreter) is None:
            raise InputError(
                f"no interpreter {self.interpreter} for {self.name}: correct "
                f"{INTERPRETER}{self.name.upper()}, or unset it"
            )
        code = (
            "import sys, importlib.util as u\n"
            "print(*[n for n in sys.argv[1:] if u.find_spec(n) is None])"
        )
        command = [self.interpreter, "-c", code, *self.needs]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"{self.interpreter} cannot run: {done.stderr.strip()[-200:]}")
        programs = [program for program in self.programs if shutil.which(program) is None]
        return [*done.stdout.split(), *programs]


def read_adapters(folder: Path) -> dict[str, Adapter]:
    """The adapters of a folder, by name.

    Raises
    ------
    InputError
        There is no such folder, or it has no adapters.
    """
    files = sorted(folder.glob("*.py")) if folder.is_dir() else []
    adapters = [adapter for file in files if (adapter := read_adapter(file)) is not None]
    if not adapters or not (folder / SERVER).is_file():
        raise InputError(
            f"no peers in {folder}: give the repository's benchmarks/peers with --peers-dir"
        )
    return {adapter.name: adapter for adapter in adapters}


def read_adapter(path: Path) -> Adapter | None:
    """The adapter in a file; None if there is none."""
    constants: dict[str, Any] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                constants[node.targets[0].id.lower()] = ast.literal_eval(node.value)
            except ValueError:
                continue
    if not {"name", "install"} <= constants.keys():
        return None
    known = {f.name for f in fields(Adapter)}
    return Adapter(path, **{key: value for key, value in constants.items() if key in known})


def choose_adapters(names: Sequence[str], folder: Path) -> list[Adapter]:
    """The adapters of these names; ``all`` stands for every one.

    Raises
    ------
    ConfigError
        There is no adapter of a name.
    """
    known = read_adapters(folder) if names else {}
    chosen: list[Adapter] = []
    for name in names:
        key = name.strip().lower().replace("-", "_")
        if key != "all" and key not in known:
            raise unknown_name("peer", name, [*known, "all"])
        chosen += known.values() if key == "all" else [known[key]]
    return list(dict.fromkeys(chosen))


class PeerContender:
    """An engine that answers in a process of its own.

    Parameters
    ----------
    adapter : Adapter
    workload : Workload
        The requests.
    new_tokens : int
        Number of generated tokens, exactly.
    options : dict
        For the adapter: ``checkpoint``, ``dtype``, ``device``, ``work`` (a folder for what it
        converts), ``threads``; for shapes ``shape``, ``batch`` and ``text_tokens``.
    """

    kind = "peer"

    def __init__(
        self, adapter: Adapter, workload: Workload, new_tokens: int, options: dict[str, Any]
    ) -> None:
        self.name, self.adapter = adapter.name, adapter
        self.workload, self.new_tokens = workload, new_tokens
        self.options = options
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[str] | None = None
        self._version = ""
        self._peak = 0

    def start(self) -> None:
        """Start the process, load the checkpoint (converted first where the engine needs it)."""
        server = self.adapter.path.parent / SERVER
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._process = subprocess.Popen(
            [self.adapter.interpreter, str(server), str(self.adapter.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._version = str(self._call({"load": self.options}).get("version", ""))
        for tokens in (self.new_tokens, 1, self.new_tokens):
            self._ask(WARM_UP, tokens)

    def measure(self, number: int) -> Measurement:
        self._ask(WARM_UP, 1)
        ttft = self._ask(2 * number, 1)
        wall = self._ask(2 * number + 1, self.new_tokens)
        return Measurement(ttft=ttft, wall=wall, peak=self._peak)

    def describe(self) -> dict[str, Any]:
        return {"version": self._version, "note": self.adapter.note}

    def stop(self) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._process = None
        if self._errors is not None:
            self._errors.close()

    def _ask(self, number: int, new_tokens: int) -> float:
        request = {**self.workload.describe(number), "new_tokens": new_tokens}
        reply = self._call({"generate": request})
        self._peak = int(reply["peak"])
        return float(reply["seconds"])

    def _call(self, message: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
        except OSError as error:
            raise PeerError(self._last_words()) from error
        line = process.stdout.readline()
        if not line:
            raise PeerError(self._last_words())
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise PeerError(str(reply["error"]))
        return reply

    def _last_words(self) -> str:
        assert self._errors is not None
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        if lines:
            return lines[-1][:300]
        code = None if self._process is None else self._process.wait()
        return f"its process ended without a word (exit code {code})"


class PeerError(CoreMatchingError):
    """An engine failed; the others go on without it."""
