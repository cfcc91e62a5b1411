"""Where the command starts, and where every error a user can act on becomes one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from corematching.errors import CoreMatchingError

USAGE_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit: 0 on success, 2 on bad input, 130 when interrupted."""
    sys.exit(run_command(arguments))


def run_command(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    from corematching.cli.app import app

    try:
        code = app(
            args=None if arguments is None else list(arguments),
            prog_name="corematching",
            standalone_mode=False,
        )
    except CoreMatchingError as error:
        return complain(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0
    except Exception as error:
        if hasattr(error, "format_message"):  # how the command-line parser reports wrong usage
            return complain(f"{error.format_message()} See `corematching --help`.")
        if type(error).__name__ == "Abort":
            return 130
        reason = explain(error)
        if reason is None:
            raise
        return complain(reason)
    return code if isinstance(code, int) else 0


def complain(message: str) -> int:
    """Print one line to stderr and return the exit code for bad input."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return USAGE_ERROR


def explain(error: Exception) -> str | None:
    """Say what to do about an error that comes from the machine, not from us."""
    if isinstance(error, OSError) and error.errno == 28:
        return "no room on disk: free some space and run the command again"
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return "out of memory: try --dtype bfloat16, a smaller model, or --device cpu"
    return None
