"""Runs the `triton_*.py` files beside it, each in a process of its own.

Triton decides at its first import whether kernels are interpreted. The cases run on the CUDA device
where there is one, else under the interpreter; the builds never are interpreted.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CASES = [*sorted(path.name for path in HERE.glob("triton_*_cases.py")), "triton_cases.py"]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: pip install '.[gpu]' (Linux)",
)


def run_pytest(file, **environment):
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", file]
    done = subprocess.run(
        command,
        cwd=HERE,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("file", CASES)
def test_the_kernels_agree_with_pytorch(file):
    run_pytest(file, TRITON_INTERPRET="0" if torch.cuda.is_available() else "1")


def test_the_kernels_compile_for_cuda(tmp_path):
    run_pytest("triton_builds.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
