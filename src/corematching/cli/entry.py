"""The entry point of the command; every error becomes one line."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Sequence

from corematching.errors import CoreMatchingError, describe_error

USAGE_ERROR = 2
INTERNAL_ERROR = 1
DEBUG = "--debug"
LONGEST_WORD = 300
"""Longer words of a message, which users typed, are shown in part."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit.

    0 on success, 2 on bad input, 1 on an error of ours, 130 when interrupted.
    """
    sys.exit(run_command(arguments))


def run_command(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; ``--debug``, anywhere, shows tracebacks."""
    from corematching.cli.app import app

    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = DEBUG in given
    try:
        code = app(
            args=[word for word in given if word != DEBUG],
            prog_name="corematching",
            standalone_mode=False,
        )
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0
    except Exception as error:
        if type(error).__name__ == "Abort":
            return 130
        if debug:
            traceback.print_exc()
        return report_error(error)
    return code if isinstance(code, int) else 0


def report_error(error: Exception) -> int:
    """Print one line to stderr and return the exit code."""
    if isinstance(error, CoreMatchingError):
        return complain(str(error))
    if hasattr(error, "format_message"):  # how the command-line parser reports wrong usage
        return complain(f"{error.format_message()} See `corematching --help`.")
    reason = explain(error)
    if reason is not None:
        return complain(reason)
    complain(
        f"something went wrong inside ({describe_error(error)}): run the command again with "
        f"{DEBUG} and report what it shows"
    )
    return INTERNAL_ERROR


def complain(message: str) -> int:
    """Print one line to stderr and return the exit code for bad input."""
    words = (word if len(word) <= LONGEST_WORD else word[:60] + "…" for word in message.split())
    print(f"error: {' '.join(words)}", file=sys.stderr)
    return USAGE_ERROR


def explain(error: Exception) -> str | None:
    """The advice for an error of the machine; None for any other."""
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return "no room on disk: free some space and run the command again"
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return "a file grew beyond the limit on file sizes: raise it (ulimit -f)"
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return "out of memory: try --dtype bfloat16, a smaller model, or --device cpu"
    if isinstance(error, PermissionError | FileNotFoundError) or (
        isinstance(error, OSError) and error.errno in (errno.EROFS, errno.ENAMETOOLONG)
    ):
        return f"cannot use {error.filename or 'a file'} ({error.strerror}): give another path"
    return None
