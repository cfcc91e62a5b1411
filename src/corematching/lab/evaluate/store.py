"""The run directory: every answer as it came, so that a run goes on where it stopped.

``settings.json`` holds the settings behind the answers, ``answers/*.jsonl`` one answer per line, a
file for each method, and ``first-tokens.bin`` the dense model's first-token distributions.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor

from corematching.errors import InputError, describe_error
from corematching.lab.evaluate.entry import Answer, read_answer

SETTINGS = "settings.json"
FIRST_TOKENS = "first-tokens.bin"
MOST_WORDS = 1 << 24
TOP_LOG_PROB = 1e-3
"""Log-probabilities are at most 0, but for rounding."""


class RunDirectory:
    """The directory of a run's answers.

    Parameters
    ----------
    path : Path
        Created if it does not exist.
    settings : mapping
        The settings behind the answers, JSON-able, one level deep.

    Raises
    ------
    InputError
        The directory holds a run with other settings, or something else.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        try:
            (path / "answers").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot use {path} as --out ({error.strerror}): give a directory of your own"
            ) from error
        self.methods: dict[str, dict[str, Any]] = {}
        file = path / SETTINGS
        if file.exists():
            stored = self._read_settings(file)
            check_same(path, stored["settings"], settings)
            self.methods = stored["methods"]
        self.settings = dict(settings)
        try:
            self._write_settings()
        except OSError as error:
            raise InputError(
                f"cannot write to {path} ({error.strerror}): give another --out"
            ) from error

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep other runs out of the directory.

        Raises
        ------
        InputError
            Another run uses the directory.
        """
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise InputError(
                f"another run is at work in {self.path}: wait for it, or give another --out"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def enter(self, text: str, parameters: dict[str, Any]) -> None:
        """Make a method part of the run, under the text that the user gave."""
        if self.methods.get(text) != parameters:
            self.methods[text] = parameters
            self._write_settings()

    def answers(self, text: str) -> AnswerFile:
        """The answers of an entered method."""
        parameters = json.dumps(self.methods[text], sort_keys=True)
        digest = hashlib.sha256(parameters.encode()).hexdigest()[:8]
        slug = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")[:80]
        found = sorted((self.path / "answers").glob(f"*.{digest}.jsonl"))
        return AnswerFile(found[0] if found else self.path / "answers" / f"{slug}.{digest}.jsonl")

    def first_tokens(self) -> FirstTokens:
        """The dense model's first tokens."""
        return FirstTokens(self.path / FIRST_TOKENS)

    def _read_settings(self, file: Path) -> dict[str, Any]:
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            return {"settings": dict(stored["settings"]), "methods": dict(stored["methods"])}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{file} is not of a run: give another --out, or delete {self.path}"
            ) from error

    def _write_settings(self) -> None:
        content = {"settings": self.settings, "methods": self.methods}
        write_whole(self.path / SETTINGS, json.dumps(content, indent=2) + "\n")


def check_same(path: Path, stored: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Check that stored answers have the same settings.

    Raises
    ------
    InputError
        Naming the first setting that differs, and the fix.
    """
    for name in [*settings, *(name for name in stored if name not in settings)]:
        before, now = stored.get(name), settings.get(name)
        if before != now:
            raise InputError(
                f"the run in {path} was made with {name}={before}, this one has {name}={now}: give "
                f"another --out, or run with the same {name} to go on, or delete {path}"
            )


class AnswerFile:
    """One method's answers, one JSON object per line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[int, Answer]:
        """The answers by question; a line that was cut off is removed from the file."""
        if not self.path.exists():
            return {}
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            self.path.write_bytes(whole)
        answers: dict[int, Answer] = {}
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            try:
                answer = read_answer(line)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{self.path} is damaged: delete it to run it again (line {number}: "
                    f"{describe_error(error)})"
                ) from error
            answers[answer.id] = answer
        return answers

    def append(self, answers: Iterable[Answer]) -> None:
        """Append answers."""
        lines = "".join(json.dumps(asdict(answer)) + "\n" for answer in answers)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(lines)


class FirstTokens:
    """Condensed distributions by question, in records of one length."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size = path.with_suffix(".json")

    def _damaged(self) -> InputError:
        return InputError(
            f"{self.path} is damaged: delete {self.path.parent} to run everything again"
        )

    def _read_size(self) -> int:
        try:
            size = json.loads(self._size.read_text(encoding="utf-8"))["words"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._damaged() from error
        if type(size) is not int or not 0 < size <= MOST_WORDS:
            raise self._damaged()
        return size

    def append(self, ids: list[int], words: Tensor, log_probs: Tensor) -> None:
        """Write the distributions (B, K) of a batch."""
        size = words.shape[1]
        if not self._size.exists():
            write_whole(self._size, json.dumps({"words": size}) + "\n")
        records = np.zeros(len(ids), dtype=_record(size))
        records["id"] = ids
        records["words"] = words.cpu().numpy()
        records["log_probs"] = log_probs.cpu().numpy()
        width = records.dtype.itemsize
        with self.path.open("ab") as file:
            file.truncate(file.tell() // width * width)
            file.write(records.tobytes())

    def read(self) -> dict[int, tuple[Tensor, Tensor]]:
        """(K,) words and (K,) log-probabilities by question.

        Raises
        ------
        InputError
            The file is damaged.
        """
        if not self._size.exists() or not self.path.exists():
            return {}
        dtype = _record(self._read_size())
        data = self.path.read_bytes()
        records: NDArray[Any] = np.frombuffer(data, dtype, len(data) // dtype.itemsize)
        log_probs = records["log_probs"]
        if (records["words"] < 0).any() or not (log_probs <= TOP_LOG_PROB).all():
            raise self._damaged()
        return {
            int(record["id"]): (
                torch.from_numpy(record["words"].astype(np.int64)),
                torch.from_numpy(record["log_probs"].copy()),
            )
            for record in records
        }


def _record(size: int) -> np.dtype[Any]:
    return np.dtype([("id", "<i8"), ("words", "<i4", (size,)), ("log_probs", "<f4", (size,))])


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)
