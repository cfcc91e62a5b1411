"""The structure of the source: layers that import one way, no import circle, short files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "corematching"
CPP = [*TESTS.parent.glob("csrc/*.h"), *TESTS.parent.glob("csrc/*.cpp")]
BASE = {
    "protocol",
    "views",
    "report",
    "errors",
    "sizes",
    "devices",
    "directories",
    "memory_meter",
    "extras",
    "report_sample",
    "report_table",
}
LOWER = BASE | {"backends.kernels", "old_names"}
MODEL = LOWER | {"model", "cache", "backends", "backends.torch.sparse_ffn", "loading"}
RUNTIME = MODEL | {"offload"}
INPUT = BASE | {"media", "inputs", "chat", "loading", "demo", "named_models"}
ALLOWED = {
    "backends.kernels": BASE | {"model", "backends.torch.sparse_ffn"},
    "backends.buffers": BASE,
    "backends.torch.sparse_ffn": BASE | {"model", "backends.kernels", "backends.buffers"},
    "old_names": BASE,
    "policies": LOWER,
    "model": BASE,
    "cache": BASE | {"model"},
    "backends": LOWER | {"cache", "model", "backends.torch.sparse_ffn", "backends.buffers"},
    "loading": BASE,
    "offload": MODEL,
    "runtime": RUNTIME,
    "methods": LOWER | {"policies", "runtime"},
    "media": BASE,
    "inputs": BASE,
    "chat": BASE | {"inputs"},
    "demo": BASE | {"loading"},
    "named_models": INPUT | {"offload"},
    "serving": INPUT | RUNTIME | {"policies", "methods", "runtime", "version"},
    "lab": INPUT | RUNTIME | {"policies", "methods", "runtime", "version"},
    "cli": INPUT | RUNTIME | {"policies", "methods", "runtime", "serving", "lab", "version"},
    "__main__": {"cli"},
}
"""What each package may import, besides itself."""
EXCEPTIONS = {
    ("old_names", "policies.component"),  # in a function: today's parameters of a component
    ("runtime.generation", "runtime.session"),  # for types only, as the two below
    ("backends.choice_checks", "backends.sparse_ffn"),
    ("backends.cpu.selfcheck", "backends.cpu.decode"),
}
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[tuple[str, str]] = set()
MOST_LINES, MOST_FUNCTION_LINES, MOST_COLUMNS = 350, 60, 100
NO_FUNCTIONS = ("namespace", "struct", "class", "enum", "extern", "union")

FILES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in SOURCE.rglob("*.py")
    if path != SOURCE / "__init__.py"
}


def package_of(module: str) -> str:
    while module not in ALLOWED and "." in module:
        module = module.rpartition(".")[0]
    return module


def imports_of(module: str) -> Iterator[str]:
    """The modules of ours that one imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: import by the full name"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in found:
            if name == "corematching" or name.startswith("corematching."):
                name = name.removeprefix("corematching.").replace("__version__", "version")
                yield name if name in FILES else name.rpartition(".")[0] or name


GRAPH = {
    module: {name for name in imports_of(module) if (module, name) not in EXCEPTIONS}
    for module in FILES
}


@pytest.mark.parametrize("package", sorted({package_of(module) for module in FILES}))
def test_layers_import_one_way(package):
    allowed = ALLOWED.get(package, BASE) | {package}
    wrong = [
        f"{module} imports {name}"
        for module, names in GRAPH.items()
        for name in names
        if package_of(module) == package and package_of(name) not in allowed
    ]
    assert not wrong


def test_no_import_circle():
    TopologicalSorter(GRAPH).prepare()  # names the circle where there is one


def test_each_exception_is_needed():
    assert all(name in set(imports_of(module)) for module, name in EXCEPTIONS)


def test_files_and_functions_are_short():
    files, functions = set(), set()
    for path in FILES.values():
        text, name = path.read_text(encoding="utf-8"), path.relative_to(SOURCE).as_posix()
        if text.count("\n") > MOST_LINES:
            files.add(name)
        for node in ast.walk(ast.parse(text)):
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if is_function and node.end_lineno - node.lineno >= MOST_FUNCTION_LINES:
                functions.add((name, node.name))
    assert files == LONG_FILES, "split it, or take it off the list"
    assert functions == LONG_FUNCTIONS, "split it, or take it off the list"


def test_files_of_tests_are_short():
    long = {
        path.relative_to(TESTS).as_posix()
        for path in TESTS.rglob("*.py")
        if path.read_text(encoding="utf-8").count("\n") > MOST_LINES
    }
    assert not long, "split it"


def blocks_of(lines: list[str]) -> Iterator[tuple[str, int]]:
    """The first line of each block of C++ that is no type or namespace, and its length in lines."""
    for start, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if line.rstrip().endswith("{") and not line.lstrip().startswith(NO_FUNCTIONS):
            ends = " " * indent + "}"
            rest = (i for i, x in enumerate(lines[start:]) if i and x.startswith(ends))
            yield line.strip(), next(rest, 0)


@pytest.mark.parametrize("path", CPP, ids=lambda path: path.name)
def test_files_and_functions_of_cpp_are_short(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MOST_LINES
    assert not [line for line in lines if len(line) > MOST_COLUMNS]
    assert not [name for name, length in blocks_of(lines) if length >= MOST_FUNCTION_LINES]
