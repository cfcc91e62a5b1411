"""A whole run on the tiny shape, with and without another engine."""

from __future__ import annotations

import json

import pytest

from corematching.errors import BusyMachineError, ConfigError, InputError
from corematching.lab.bench import (
    MethodContender,
    PeerContender,
    Plan,
    choose_adapters,
    draw_roofline,
    run_bench,
    write_markdown,
)
from corematching.lab.bench.contenders import Measurement
from corematching.lab.bench.machine import Ceilings
from corematching.methods import method_from_text
from tests.lab.bench.conftest import IDLE_PEER

TOKENS = 3
SPARSE = "corematching:keep_ratio=0.25,neurons=top(0.5),layer=1"


@pytest.fixture(autouse=True)
def _known_ceilings(monkeypatch):
    from corematching.lab.bench import runner

    monkeypatch.setattr(runner, "measure_ceilings", lambda *_: Ceilings(1e9, 1e12, "float32"))
    monkeypatch.setattr(runner, "SETTLE_SECONDS", 0.0)


@pytest.fixture
def bench(workload):
    """Runs dense, a sparse method and the given peers."""

    def run(*peers, rounds=2, probe=lambda: 0.0, force=False, progress=None):
        ours = [
            MethodContender(text, method_from_text(text), workload, TOKENS)
            for text in ("dense", SPARSE)
        ]
        plan = Plan(new_tokens=TOKENS, rounds=rounds, force=force)
        steps = {} if progress is None else {"progress": progress}
        settings = {"missing": {}, "command": "corematching bench"}
        return run_bench(workload, ours, list(peers), plan, settings, probe=probe, **steps)

    return run


def make_peer(folder, workload):
    (adapter,) = choose_adapters(["idle"], folder)
    return PeerContender(adapter, workload, TOKENS, {"dtype": "float32"})


def test_board(bench, workload, write_peers, tmp_path):
    board = bench(make_peer(write_peers(), workload))
    assert json.loads(json.dumps(board, allow_nan=False)) == board
    dense, sparse, idle = board["contenders"]
    assert [entry["kind"] for entry in board["contenders"]] == ["ours", "ours", "peer"]
    assert dense["costs"] == idle["costs"]
    assert sparse["costs"]["decode_bytes"] < dense["costs"]["decode_bytes"]
    assert sparse["costs"]["prefill_flops"] < dense["costs"]["prefill_flops"]
    assert sparse["report"]["samples"][0]["kept_tokens"] == 4
    assert idle["ttft"]["values"] == [1.5, 1.5] and idle["tpot"]["median"] == pytest.approx(1.0)
    assert idle["version"] == "idle 1" and idle["parts"]["vision"] is None
    assert dense["parts"]["vision"]["median"] > 0 and dense["parts"]["prefill"]["median"] > 0
    assert board["random_weights"] is True and board["failed"] == {}
    pairs = [(pair["of"], pair["against"]) for pair in board["comparisons"]]
    assert pairs == [(SPARSE, "dense"), ("dense", "idle"), (SPARSE, "idle")]
    table = write_markdown(board)
    assert "RANDOM WEIGHTS" in table.splitlines()[0]
    assert "`idle`: idle 1; answers nothing" in table
    draw_roofline(board, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 1000


def test_contenders_are_measured_in_turn(bench, workload, write_peers):
    seen = []
    bench(progress=lambda text, done, total: seen.append(text))
    measured = [text for text in seen if text in ("dense", SPARSE)]
    assert measured == ["dense", SPARSE] * 2


def test_a_measurement_begins_with_a_request_that_does_not_count(
    workload, write_peers, monkeypatch
):
    asked, answer = [], MethodContender._answer

    def note(self, number, new_tokens):
        asked.append((number, new_tokens))
        return answer(self, number, new_tokens)

    monkeypatch.setattr(MethodContender, "_answer", note)
    ours = MethodContender(SPARSE, method_from_text(SPARSE), workload, TOKENS)
    peer = make_peer(write_peers(), workload)
    ask = peer._ask
    monkeypatch.setattr(peer, "_ask", lambda *request: asked.append(request) or ask(*request))
    for contender, first in ((ours, 0), (peer, 1_000_000)):
        contender.start()
        asked.clear()
        contender.measure(3)
        contender.stop()
        assert asked == [(first, 1), (6, 1), (7, TOKENS)]


def test_a_failing_peer_is_named_and_the_others_go_on(bench, workload, write_peers):
    board = bench(make_peer(write_peers(fails_at=4), workload))
    assert [entry["name"] for entry in board["contenders"]] == ["dense", SPARSE]
    assert "out of ideas" in board["failed"]["idle"]
    assert "`idle` did not run: RuntimeError: out of ideas" in write_markdown(board)


def test_a_dead_peer_leaves_its_last_words(bench, workload, write_peers):
    folder = write_peers()
    text = IDLE_PEER.format(needs="json", shapes=True, fails_at=-1)
    dying = text.replace('print("noise on stdout")', 'import sys; sys.exit("no licence")')
    (folder / "idle.py").write_text(dying)
    assert bench(make_peer(folder, workload))["failed"] == {"idle": "no licence"}


def test_missing_peer_gives_its_install_line(write_peers):
    (adapter,) = choose_adapters(["all"], write_peers(needs="no_such_module"))
    reason = adapter.why_not(batch=1, random_weights=True)
    assert reason == "not installed (no_such_module missing): pip install idle-engine"


def test_peers_that_cannot_take_part(write_peers):
    (adapter,) = choose_adapters(["idle"], write_peers(shapes=False))
    assert adapter.why_not(batch=1, random_weights=False) is None
    assert "checkpoint" in adapter.why_not(batch=1, random_weights=True)
    assert "one sample" in adapter.why_not(batch=2, random_weights=False)


def test_unknown_peer_and_wrong_interpreter(write_peers, monkeypatch):
    folder = write_peers()
    with pytest.raises(ConfigError, match="did you mean 'idle'"):
        choose_adapters(["idel"], folder)
    with pytest.raises(InputError, match="--peers-dir"):
        choose_adapters(["idle"], folder / "none")
    (adapter,) = choose_adapters(["idle"], folder)
    monkeypatch.setenv("CORE_MATCHING_PEER_PYTHON_IDLE", "/no/such/python")
    with pytest.raises(InputError, match="CORE_MATCHING_PEER_PYTHON_IDLE"):
        adapter.why_not(batch=1, random_weights=False)


def test_busy_machine_is_refused_before_anything_runs(bench):
    with pytest.raises(BusyMachineError, match="50%"):
        bench(probe=lambda: 0.5)
    assert bench(probe=lambda: 0.5, force=True)["others_cpu"]["before"] == 0.5


def test_tpot_by_hand():
    assert Measurement(ttft=2.0, wall=14.0, peak=0).tpot(new_tokens=4) == 4.0


@pytest.mark.parametrize(
    ("values", "message"), [({"new_tokens": 1}, "2 or more"), ({"rounds": 0}, "1 or")]
)
def test_plans_that_measure_nothing(values, message):
    with pytest.raises(ConfigError, match=message):
        Plan(**values)
