"""The package installs without its kernels where nothing compiles them, and says so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("scikit_build_core")
ROOT = Path(__file__).parents[1]
BUILD = "from scikit_build_core.build import build_wheel; build_wheel('out')"


@pytest.fixture
def project(tmp_path):
    """The project's build, with little in it to pack."""
    if shutil.which("cmake") is None:
        pytest.skip("no cmake, which pip brings for a build")
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    package = tmp_path / "src" / "corematching"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "py.typed").write_text("")
    return tmp_path


def write_compiler(place, script):
    path = place / "c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("script", ["exit 1", None], ids=["broken", "missing"])
def test_no_compiler(project, script):
    compiler = str(project / "nowhere") if script is None else write_compiler(project, script)
    environment = {**os.environ, "CXX": compiler, "CMAKE_GENERATOR": ""}
    built = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=project, env=environment, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    said = built.stdout + built.stderr
    assert built.returncode == 0, said
    assert "WITHOUT its compiled CPU kernels" in said and "Install a C++17 compiler" in said
    (wheel,) = (project / "out").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "corematching/py.typed" in names and not [x for x in names if "_kernels" in x]


def test_no_code_is_shared_between_instruction_sets():
    """The linker keeps one copy of a weak function, maybe one that this processor does not run."""
    objects = sorted((ROOT / "csrc" / "inplace").glob("**/kernels_*.dir/csrc/kernels.cpp.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip("no object files of an editable install")
    for path in objects:
        listed = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True)
        kinds = [line.split(maxsplit=2)[-2:] for line in listed.stdout.splitlines()]
        assert not [name for kind, *name in kinds if kind in ("W", "u")], path
