"""A tiny shape's workload and a peer that does nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from corematching.lab.bench import RandomWorkload, build_random, find_shape

IDLE_PEER = """
NAME = "idle"
INSTALL = "pip install idle-engine"
NEEDS = ({needs!r},)
SHAPES = {shapes}
NOTE = "answers nothing"


def read_version():
    return "idle 1"


class Peer:
    def __init__(self, options):
        print("noise on stdout")
        self.options = options

    def generate(self, request):
        if request["number"] == {fails_at}:
            raise RuntimeError("out of ideas")
        return 0.5 + request["new_tokens"]
"""


@pytest.fixture(scope="session")
def workload() -> RandomWorkload:
    """The tiny shape in float32."""
    shape = find_shape("tiny")
    return RandomWorkload(shape, build_random(shape), text_tokens=8)


@pytest.fixture
def write_peers(tmp_path):
    """Writes a folder of adapters with one idle engine."""
    server = Path(__file__).parents[3] / "benchmarks" / "peers" / "serve.py"

    def write(needs: str = "json", shapes: bool = True, fails_at: int = -1) -> Path:
        folder = tmp_path / "peers"
        folder.mkdir()
        text = IDLE_PEER.format(needs=needs, shapes=shapes, fails_at=fails_at)
        (folder / "idle.py").write_text(text)
        (folder / "serve.py").write_text(server.read_text())
        return folder

    return write
