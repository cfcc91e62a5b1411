"""Packages that only some features need."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from corematching.errors import CoreMatchingError, MissingPackageError
from corematching.extras import require, require_plots

ROOT = Path(__file__).parents[1]
HIDE = """
import sys
from importlib.machinery import PathFinder
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in {hidden!r}
        return None if hidden else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


def run_without(hidden: set[str], code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HIDE.format(hidden=hidden) + code],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        check=False,
    )


def extras() -> dict[str, list[str]]:
    tomllib = pytest.importorskip("tomllib")

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["optional-dependencies"]


def test_a_missing_package_names_the_extra_that_installs_it():
    with pytest.raises(MissingPackageError, match=r'"corematching\[bench\]"') as caught:
        require("no_such_package_at_all", "bench", "a benchmark")
    assert isinstance(caught.value, ImportError) and isinstance(caught.value, CoreMatchingError)


def test_an_installed_package_is_imported():
    assert require("json", "plots", "nothing").loads("1") == 1
    require_plots("nothing")


@pytest.mark.parametrize("package", ["matplotlib", "psutil", "gguf"])
def test_every_extra_that_is_named_installs_its_package(package):
    named = re.findall(
        rf'require\("{package}", "(\w+)"',
        "".join(path.read_text() for path in (ROOT / "src").rglob("*.py")),
    )
    assert named
    for extra in named:
        assert any(line.startswith(package) for line in extras()[extra]), (package, extra)


def test_the_library_works_without_the_extras():
    code = (
        "import corematching, corematching.lab.evaluate, corematching.lab.analyze\n"
        "import corematching.cli.app\n"
        "import corematching.runtime, corematching.backends.cpu.native.pages as pages\n"
        "print(corematching.CoreMatching().name, pages._free_memory() > 0)\n"
    )
    done = run_without({"matplotlib", "psutil", "gguf"}, code)
    assert done.stderr == "" and done.stdout == "corematching True\n"


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["eval", "--limit", "1", "--out", "none"], "plots"),
        (["analyze"], "plots"),
        (["analyze-task"], "plots"),
        (["bench", "--out", "none"], "plots"),
        (["run", "-q", "What?", "-i", "a.png", "--overlay", "b.png"], "plots"),
    ],
)
def test_commands_say_so_before_any_work(arguments, extra, tmp_path):
    code = (
        f"import os; os.chdir({str(tmp_path)!r})\n"
        "from corematching.cli.entry import run_command\n"
        f"sys.exit(run_command({arguments!r}))\n"
    )
    done = run_without({"matplotlib"}, code)
    assert done.returncode == 2 and f'"corematching[{extra}]"' in done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_benchmark_without_psutil_is_one_line():
    code = "from corematching.cli.entry import run_command\nsys.exit(run_command(['bench']))\n"
    done = run_without({"psutil"}, code)
    assert done.returncode == 2 and '"corematching[bench]"' in done.stderr
