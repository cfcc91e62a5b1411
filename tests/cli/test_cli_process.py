"""The command in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

COMMAND = [sys.executable, "-m", "corematching"]


def run(*arguments, **environment):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
        check=False,
    )


def test_json_on_stdout_and_nothing_else(tiny_vlm, picture):
    done = run("run", "--model", tiny_vlm, "-i", picture, "-q", "What?", "--json", "--compare")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {"answer", "dense_answer", "model", "method", "report"} == set(result)
    assert done.stderr == ""


@pytest.mark.parametrize("module", ["corematching", "corematching.cli"])
def test_the_package_runs_as_the_command_does(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "run", "--no-such-option"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: No such option: --no-such-option See `corematching --help`.\n"


def test_help_imports_no_torch():
    code = (
        "import sys\nfrom corematching.cli.entry import run_command\n"
        "assert run_command(['run', '--help']) == 0\n"
        "print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--neuron-ratio" in done.stdout
    assert done.stdout.rstrip().endswith("[]")
