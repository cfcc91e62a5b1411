"""Methods over a task, in this process, on a tiny random model."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from contextlib import closing

import pytest
import torch

from corematching.errors import ConfigError, InputError
from corematching.evaluate import (
    Crew,
    Plan,
    SceneQA,
    Subject,
    evaluate,
    make_methods,
    pick_questions,
    respond,
)
from corematching.evaluate import answer as answer_module
from corematching.evaluate.answer import answer_batch, split_batches
from corematching.evaluate.store import AnswerFile
from corematching.methods import method_by_name, method_names
from corematching.runtime import is_attached
from tests.evaluate.conftest import PLAN, write_split

SPARSE = "corematching:keep_ratio=0.25,layer=1,neurons=top(0.5,dense_first=1,dense_last=1)"
TEXTS = [SPARSE, "oracle:layer=1", "random:keep_ratio=1.0,neuron_ratio=1"]


def without_times(board):
    """A board without what differs from run to run."""
    content = json.loads(json.dumps(board))
    for entry in content["methods"]:
        for name in ("vision_seconds", "prefill_seconds", "decode_seconds"):
            entry.pop(name)
    return content


def by_method(board):
    return {entry["method"]: entry for entry in board["methods"]}


@pytest.fixture(scope="module")
def board(subject, split, tmp_path_factory):
    out = tmp_path_factory.mktemp("board")
    seen = []
    made = evaluate(
        subject, SceneQA.load(split), make_methods(TEXTS), out, PLAN, lambda *a: seen.append(a), "x"
    )
    return made, out, seen


def test_board_has_every_method_dense_first(board):
    made, out, _ = board
    assert [entry["method"] for entry in made["methods"]] == ["dense", *TEXTS]
    assert json.loads((out / "board.json").read_text()) == made
    assert made["command"].startswith("x --method ")


def test_dense_is_the_reference(board):
    dense = by_method(board[0])["dense"]
    assert dense["accuracy"]["value"] == 0.5
    assert dense["of_dense"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert dense["agreement"] == 1 and dense["kl"] == 0
    assert dense["tokens_kept"] == {"mean": 1, "p5": 1, "p95": 1} and dense["neurons_kept"] == 1
    assert dense["prefill_flops"] == dense["dense_prefill_flops"]
    assert dense["families"]["exists"]["questions"] == 4


def test_keeping_all_answers_as_dense(board):
    entry = by_method(board[0])["random:keep_ratio=1.0,neuron_ratio=1"]
    assert entry["agreement"] == 1 and entry["kl"] == pytest.approx(0, abs=1e-7)
    assert entry["accuracy"]["value"] == 0.5


def test_sparse_figures(board):
    entry = by_method(board[0])[SPARSE]
    assert entry["tokens_kept"] == {"mean": 0.25, "p5": 0.25, "p95": 0.25}
    assert entry["neurons_kept"] == 0.75
    assert 0.25 < entry["layer_tokens"] < 1
    assert entry["kl"] > 1e-5 and entry["agreement"] < 1
    assert entry["accuracy"]["value"] < 0.5
    for name in ("prefill_flops", "decode_flops", "kv_bytes"):
        assert 0 < entry[name] < entry[f"dense_{name}"]


def test_oracle_keeps_what_the_boxes_cover(board):
    entry = by_method(board[0])["oracle:layer=1"]
    assert 0 < entry["tokens_kept"]["mean"] < 0.5
    assert entry["neurons_kept"] == 1


def test_markdown_states_how_it_was_made(board):
    text = (board[1] / "board.md").read_text()
    for fact in ("x --method", "model: tiny", "float32", "machine:", "12 questions", "`dense`"):
        assert fact in text
    assert text.count("| --- |") == 3


def test_pictures_are_drawn(board):
    for name in ("tokens.png", "neurons.png"):
        assert (board[1] / name).read_bytes().startswith(b"\x89PNG")


def test_progress_counts_to_the_end(board):
    made, _, seen = board
    assert [call for call in seen if call[1] == call[2]] == [
        (entry["method"], 12, 12, entry["accuracy"]["value"]) for entry in made["methods"]
    ]


def test_same_again_asks_nothing(board, subject, task, monkeypatch):
    made, out, _ = board

    def refuse(*args):
        raise AssertionError("asked again")

    monkeypatch.setattr(respond, "answer_batch", refuse)
    assert evaluate(subject, task, make_methods(TEXTS), out, PLAN, None, "x") == made


def test_interrupted_run_gives_the_same(board, subject, task, tmp_path, monkeypatch):
    calls = []

    def stop(*args):
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return answer_batch(*args)

    monkeypatch.setattr(respond, "answer_batch", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(subject, task, make_methods(TEXTS), tmp_path, PLAN, None, "x")
    for path in (tmp_path / "answers").iterdir():
        path.write_bytes(path.read_bytes()[:-20])
    again = evaluate(subject, task, make_methods(TEXTS), tmp_path, PLAN, None, "x")
    assert without_times(again) == without_times(board[0])


def test_batch_size_changes_no_answer(board, subject, task, tmp_path):
    plan = dataclasses.replace(PLAN, batch=1)
    singles = evaluate(subject, task, make_methods(TEXTS), tmp_path, plan, None, "x")
    for one, other in zip(singles["methods"], board[0]["methods"], strict=True):
        for name in ("accuracy", "agreement", "tokens_kept", "prefill_flops", "new_tokens"):
            assert one[name] == other[name]
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-3, abs=1e-6)
    for path in (tmp_path / "answers").iterdir():
        other = AnswerFile(board[1] / "answers" / path.name).read()
        assert {i: a.text for i, a in AnswerFile(path).read().items()} == {
            i: a.text for i, a in other.items()
        }


def test_shared_prompts_change_no_answer(board, subject, task, tmp_path):
    plan = dataclasses.replace(PLAN, share=True)
    texts = [*TEXTS, "griffin", "fastv:keep_ratio=0.25,layer=1", "cats"]
    asked = []
    shared = evaluate(
        subject, task, make_methods(texts), tmp_path / "shared", plan, lambda *a: asked.append(a[0])
    )
    single = evaluate(subject, task, make_methods(texts), tmp_path / "single", PLAN)
    for one, other in zip(shared["methods"], single["methods"], strict=True):
        assert one["vision_seconds"] == one["prefill_seconds"] == 0 < one["decode_seconds"]
        for name in ("accuracy", "agreement", "tokens_kept", "prefill_flops", "kv_bytes"):
            assert one[name] == other[name], one["method"]
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-3, abs=1e-6)
    first = asked.index(TEXTS[0])
    assert asked[first : first + 6] == texts, "a batch goes to all methods before the next one"
    assert "| - | - |" in (tmp_path / "shared" / "board.md").read_text()


def test_more_methods_join_the_board(subject, task, tmp_path):
    evaluate(subject, task, make_methods(["oracle:layer=1"]), tmp_path, PLAN)
    made = evaluate(
        subject,
        task,
        make_methods(["random:keep_ratio=0.5,layer=1,neuron_ratio=1"]),
        tmp_path,
        PLAN,
    )
    assert len(made["methods"]) == 3


@pytest.mark.parametrize(
    ("change", "named"), [({"seed": 1}, "seed=0"), ({"limit": 3}, "questions=12")]
)
def test_other_settings_are_refused(board, subject, task, change, named):
    plan = dataclasses.replace(PLAN, **change)
    with pytest.raises(InputError, match=rf"made with {named}.*give another --out"):
        evaluate(subject, task, {}, board[1], plan)


def test_other_weights_are_refused(board, subject, task):
    copy = Subject("tiny", subject.model, subject.processor)
    before = copy.digest
    weight = subject.model.lm_head.weight
    kept = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] += 1
    try:
        changed = Subject("tiny", subject.model, subject.processor)
        assert changed.digest != before
        with pytest.raises(InputError, match="made with weights="):
            evaluate(changed, task, {}, board[1], PLAN)
    finally:
        with torch.no_grad():
            weight[0, 0] = kept


def test_two_runs_in_one_directory(board, subject, task):
    from filelock import FileLock

    with FileLock(board[1] / ".lock"), pytest.raises(InputError, match="another run is at work"):
        evaluate(subject, task, {}, board[1], PLAN)


def test_sample_is_seeded(task):
    ids = [[q.id for q in pick_questions(task, 5, seed)] for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2] and ids[0] == sorted(ids[0]) and len(ids[0]) == 5
    assert len(pick_questions(task, None, 0)) == len(pick_questions(task, 99, 0)) == 12


def test_batches_are_sorted_by_family_and_length(subject, tmp_path):
    task = SceneQA.load(write_split(tmp_path))
    batches = split_batches(subject, task, task.questions, 4)
    assert [{q.family for q in batch} for batch in batches] == [{"exists"}, {"count"}, {"read"}]


def test_families_that_no_one_knows_come_last(tmp_path):
    folder = write_split(tmp_path)
    file = folder / "questions.jsonl"
    file.write_text(file.read_text().replace('"count"', '"colour"'))
    assert SceneQA.load(folder).families == ["exists", "read", "colour"]


def test_batches_are_padded_on_the_left(subject):
    image = answer_module.Image.new("RGB", (64, 64))
    inputs = subject.encode(["Why?", "How many of them?"], [image, image])
    mask = inputs["attention_mask"]
    assert mask[1].all() and not mask[0, 0] and mask[0, -1]


def test_a_tokenizer_without_padding_pads_with_the_end(subject):
    image = answer_module.Image.new("RGB", (64, 64))
    prompts = ["Why?", "How many of them?"]
    usual = subject.encode(prompts, [image, image])
    tokenizer = subject.tokenizer
    before = tokenizer.pad_token
    tokenizer.pad_token = None
    try:
        inputs = subject.encode(prompts, [image, image])
        assert tokenizer.pad_token == tokenizer.eos_token
    finally:
        tokenizer.pad_token = before
    assert torch.equal(inputs["attention_mask"], usual["attention_mask"])


def test_inputs_are_prepared_once_for_all_methods(subject, task, monkeypatch):
    calls = []

    def encode(*args):
        calls.append(args)
        return answer_module.encode_batch(*args)

    monkeypatch.setattr(respond, "encode_batch", encode)
    methods = make_methods([SPARSE])
    with closing(respond.Respondent(subject, task, methods, PLAN)) as respondent:
        respondent._room = 1 << 20
        replies = respondent.answer_all(
            [respond.Assignment(text, 0, task.questions[:3], None) for text in methods]
        )
        assert [reply.text for reply in replies] == list(methods) and len(calls) == 1
    assert not is_attached(subject.model)


def test_every_method_reaches_a_worker():
    for name in method_names():
        method = method_by_name(name)
        copy = pickle.loads(pickle.dumps(method))
        assert copy.to_dict() == method.to_dict()


def test_a_worker_that_cannot_load_is_reported(task, tmp_path, subject):
    methods = make_methods([])
    with (
        Crew(1, os.abort, task, methods, PLAN) as crew,
        pytest.raises(InputError, match="fewer --jobs"),
    ):
        evaluate(subject, task, methods, tmp_path, PLAN, crew=crew)


def test_bad_plans():
    with pytest.raises(ConfigError, match="batch=0"):
        Plan(batch=0)
    with pytest.raises(ConfigError, match="seed=-1"):
        Plan(seed=-1)


def test_unknown_method():
    with pytest.raises(ConfigError, match="did you mean 'oracle'"):
        make_methods(["orakel"])


def test_text_only_processor_is_refused(subject):
    with pytest.raises(InputError, match="takes no pictures"):
        Subject("text", subject.model, subject.processor.tokenizer)


def test_missing_picture_is_refused(tmp_path):
    folder = write_split(tmp_path)
    (folder / "images" / "0.png").unlink()
    with pytest.raises(InputError, match="no picture"):
        SceneQA.load(folder)
