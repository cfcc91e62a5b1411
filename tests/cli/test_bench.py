"""`corematching bench`: the tiny shape in a process of its own, the rest in this one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from corematching.cli.entry import run_command
from corematching.lab.bench import runner
from corematching.lab.bench.machine import Ceilings
from tests.cli.test_cli_process import run
from tests.cli.test_cli_run import refused
from tests.lab.bench.conftest import write_peers  # noqa: F401

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"
TINY = ("bench", "--shape", "tiny", "--rounds", "1", "--new-tokens", "3", "--force")
KEYS = {
    "layout",
    "model",
    "random_weights",
    "dtype",
    "device",
    "machine",
    "threads",
    "batch",
    "prompt_tokens",
    "new_tokens",
    "rounds",
    "others_cpu",
    "failed",
    "missing",
    "command",
    "ceilings",
    "contenders",
    "comparisons",
}
ENTRY = {
    "name",
    "kind",
    "ttft",
    "tpot",
    "wall",
    "parts",
    "tokens_per_second",
    "peak_bytes",
    "costs",
    "reached",
}


@pytest.fixture
def measure(tmp_path, monkeypatch, capsys):
    """Runs the command in this process with known ceilings; gives (exit code, stdout, stderr)."""
    monkeypatch.setattr(runner, "measure_ceilings", lambda *_: Ceilings(1e9, 1e12, "float32"))

    def call(*arguments):
        code = run_command([*map(str, arguments), "--out", str(tmp_path / "out")])
        return code, *capsys.readouterr()

    return call


def test_tiny_shape_end_to_end(tmp_path):
    out = tmp_path / "out"
    done = run(*TINY, "--peers", "transformers_eager", "--peers-dir", PEERS, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    board = json.loads(done.stdout)
    assert set(board) == KEYS and all(set(entry) >= ENTRY for entry in board["contenders"])
    names = [entry["name"] for entry in board["contenders"]]
    assert names[0] == "dense" and names[2] == "transformers_eager"
    assert "keep_ratio=0.2" in names[1] and "neurons=top(ratio=0.4" in names[1]
    assert board["random_weights"] and board["prompt_tokens"] == 16 + 64
    assert board["dtype"] == "bfloat16"
    assert json.loads((out / "bench.json").read_text()) == board
    assert (out / "bench.md").read_text().startswith("**tiny, RANDOM WEIGHTS")
    assert (out / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_table_on_stdout(measure):
    code, out, err = measure(*TINY, "--keep-ratio", "0.5", "--prompt-tokens", "8", "--batch", "2")
    assert code == 0, err
    assert "| `dense` |" in out and "neurons=none" in out and "batch 2" in out
    assert "corematching bench --shape=tiny --batch=2 --new-tokens=3 --prompt-tokens=8" in out


def test_several_batch_sizes(measure, tmp_path):
    code, out, err = measure(*TINY, "--prompt-tokens", "8", "--batch", "1,2", "--json")
    assert code == 0, err
    boards = json.loads(out)
    assert [board["batch"] for board in boards] == [1, 2]
    for size, board in enumerate(boards, start=1):
        assert f"--batch={size} " in board["command"] or size == 1
        assert json.loads((tmp_path / "out" / f"batch-{size}" / "bench.json").read_text()) == board


def test_a_model_through_its_own_processor(measure, tiny_vlm, tmp_path):
    arguments = ("--rounds", "1", "--new-tokens", "3", "--prompt-tokens", "60", "--force")
    code, out, err = measure(
        "bench", "--model", tiny_vlm, *arguments, "-M", "stride:keep_ratio=0.5"
    )
    assert code == 0, err
    board = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [entry["name"] for entry in board["contenders"]] == ["dense", "stride:keep_ratio=0.5"]
    assert not board["random_weights"] and "RANDOM" not in out
    assert board["prompt_tokens"] >= 16 + 60
    assert board["contenders"][0]["parts"]["preprocessing"]["median"] > 0


@pytest.mark.parametrize("option", ["--prompt-tokens", "--new-tokens"])
def test_more_tokens_than_a_model_takes(measure, tiny_vlm, option):
    message = refused(measure("bench", "--force", "--model", tiny_vlm, option, "99999999"))
    assert "99,999,999" in message and "the model takes 512 at most" in message


def test_missing_peer_is_named_with_its_install_line(measure, write_peers):  # noqa: F811
    folder = write_peers(needs="no_such_module")
    code, out, err = measure(*TINY, "--peers", "all", "--peers-dir", folder)
    assert code == 0, err
    assert "`idle` did not run: not installed (no_such_module missing): pip install idle" in out


def test_busy_machine_is_refused(measure, monkeypatch):
    monkeypatch.setattr("corematching.lab.bench.machine.probe_others.__defaults__", (0.0,))
    monkeypatch.setattr("corematching.lab.bench.machine.CpuMeter.ratio", lambda self: 0.6)
    message = refused(measure("bench", "--shape", "tiny"))
    assert "60%" in message and "--force" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shape", "llava-1.5-7"), "did you mean 'llava-1.5-7b'"),
        (("--shape", "tiny", "--model", "x"), "exclude each other"),
        (("--shape", "tiny", "--method", "papper"), "did you mean 'paper'"),
        (("--shape", "tiny", "--keep-ratio", "1.5"), "--keep-ratio=1.5: give a ratio"),
        (("--shape", "tiny", "--keep-ratio", "7"), "--keep-tokens=7 is that number of tokens"),
        (("--shape", "tiny", "--layer", "1"), "give --keep-ratio as well"),
        (("--shape", "tiny", "--keep", "0.5", "--keep-ratio", "0.5"), "give --keep-ratio alone"),
        (("--shape", "tiny", "--dtype", "float31"), "did you mean 'float32'"),
        (("--shape", "tiny", "--peers", "vlm", "--peers-dir", PEERS), "did you mean 'vllm'"),
        (("--shape", "tiny", "--peers", "vllm", "--peers-dir", "/no"), "benchmarks/peers"),
        (("--shape", "tiny", "--new-tokens", "1"), "new-tokens"),
        (("--shape", "tiny", "--device", "gpu9"), "--device cpu"),
        (("--shape", "tiny", "--batch", "1,two"), "--batch 1,two: give whole numbers from 1"),
        (("--shape", "tiny", "--batch", "0"), "give whole numbers from 1 to 1024"),
        (("--shape", "tiny", "--batch", "99999999"), "give whole numbers from 1 to 1024"),
        (
            ("--shape", "tiny", "--prompt-tokens", "99999999"),
            "the prompt has 100,000,015 tokens, the model takes 4,096 at most",
        ),
        (
            ("--shape", "tiny", "--new-tokens", "99999999"),
            "the answer up to 99,999,999, the model takes 4,096 at most",
        ),
    ],
)
def test_bad_options(measure, arguments, message):
    assert message in refused(measure("bench", "--force", *arguments))
