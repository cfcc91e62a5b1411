"""The model class for lmms-eval: over a stand-in for lmms-eval, and in the real one."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from corematching.errors import ConfigError
from corematching.lab.evaluate import SceneQA, evaluate, make_methods
from corematching.lab.evaluate.lmms import manifest
from corematching.lab.evaluate.lmms.turns import user_turn
from tests.lab.evaluate.conftest import PLAN
from tests.lab.evaluate.test_lmms_chat import BLUE, GREEN, RED, SPARSE

INSTALLED = importlib.util.find_spec("lmms_eval") is not None


@dataclass
class Request:
    """What lmms-eval hands over, as far as our classes read it."""

    args: tuple


@dataclass
class CacheHook:
    seen: list = field(default_factory=list)

    def add_partial(self, name, request, result):
        self.seen.append((name, request, result))


class Base:
    """A stand-in for ``lmms_eval.api.model.lmms``."""

    def __init__(self):
        self._rank, self._world_size = 0, 1
        self.cache_hook, self.task_dict = CacheHook(), {}
        self.rank = 0

    def clean(self):
        del self.model


@dataclass
class Result:
    text: str
    token_counts: object = None


@pytest.fixture
def classes(monkeypatch):
    """Our two classes over a stand-in for lmms-eval, whether it is installed or not."""
    logged: list[dict] = []
    modules = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {
            "GenerationResult": Result,
            "TokenCounts": lambda *counts: counts,
        },
        "lmms_eval.api.model": {"lmms": Base},
        "lmms_eval.models": {},
        "lmms_eval.models.model_utils": {},
        "lmms_eval.models.model_utils.gen_metrics": {
            "log_metrics": lambda **given: logged.append(given)
        },
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "corematching.lab.evaluate.lmms.model", raising=False)
    module = importlib.import_module("corematching.lab.evaluate.lmms.model")
    yield module, logged
    sys.modules.pop("corematching.lab.evaluate.lmms.model", None)


DOCS = [
    {"text": "How many pigs are there in the whole picture?", "image": [RED]},
    {"text": "Why?", "image": []},
    {"text": "Who is it?", "image": [BLUE]},
    {"text": "Is it <image> or <image>?", "image": [GREEN, RED]},
]


def simple_requests(kwargs):
    return [
        Request((doc["text"], given, lambda d: d["image"], i, "task", "test"))
        for i, (doc, given) in enumerate(zip(DOCS, kwargs, strict=True))
    ]


def to_messages(doc):
    return user_turn(doc["text"], doc["image"])


def chat_requests(kwargs):
    return [
        Request((doc["text"], to_messages, given, i, "task", "test"))
        for i, (doc, given) in enumerate(zip(DOCS, kwargs, strict=True))
    ]


class TestClasses:
    def make(self, classes, kind, tiny, **options):
        module, _ = classes
        model = getattr(module, kind)(
            **{"pretrained": str(tiny), "dtype": "float32", "device": "cpu", **options}
        )
        model.task_dict = {"task": {"test": DOCS}}
        return model

    def test_order_batches_and_log(self, classes, tiny_vlm, monkeypatch):
        model = self.make(classes, "CoreMatchingChat", tiny_vlm, method=SPARSE, batch_size="2")
        sizes: list[tuple[int, int]] = []
        answer = model.responder.answer
        monkeypatch.setattr(
            model.responder,
            "answer",
            lambda chats, settings: (
                sizes.append((len(chats), settings.options["max_new_tokens"]))
                or answer(chats, settings)
            ),
        )
        short, long = {"max_new_tokens": 3}, {"max_new_tokens": 5}
        results = model.generate_until(chat_requests([long, short, long, long]))
        assert sorted(sizes) == [(1, 3), (1, 5), (2, 5)]
        assert [result.token_counts[1] for result in results] == [5, 3, 5, 5]
        texts = [result.text for result in results]
        singles = self.make(classes, "CoreMatchingSimple", tiny_vlm, method=SPARSE)
        again = singles.generate_until(simple_requests([long, short, long, long]))
        assert [result.text for result in again] == texts
        logged = classes[1][0]
        assert logged["total_gen_tokens"] == 18
        assert logged["additional_metrics"]["image_tokens_kept"] == 0.25
        assert [entry[1][0] for entry in model.cache_hook.seen] == [
            doc["text"] for doc in (DOCS[2], DOCS[3], DOCS[0], DOCS[1])
        ]

    def test_log_likelihoods(self, classes, tiny_vlm):
        model = self.make(classes, "CoreMatchingSimple", tiny_vlm, method="dense", batch_size=4)
        place = (lambda d: d["image"], 0, "task", "test")
        requests = [
            Request(("What?", " pig", *place)),
            Request(("What?", lambda doc: " " + doc["text"][:3], *place)),
            Request(("", " pig")),
        ]
        results = model.loglikelihood(requests)
        assert all(value < 0 for value, _ in results)
        alone = [model.loglikelihood([request])[0][0] for request in requests]
        assert [value for value, _ in results] == pytest.approx(alone, abs=1e-3)

    def test_what_is_not_there_says_so(self, classes, tiny_vlm):
        model = self.make(classes, "CoreMatchingChat", tiny_vlm)
        with pytest.raises(NotImplementedError, match="force_simple"):
            model.loglikelihood(chat_requests([{}] * 4))
        with pytest.raises(NotImplementedError, match="multi_round"):
            model.generate_until_multi_round([])
        assert model.device.type == "cpu"
        model.clean()
        assert model.responder is None

    def test_wrong_arguments(self, classes, tiny_vlm):
        for wrong in ({"method": "no such"}, {"dtype": "int3"}, {"batch_size": "auto"}):
            with pytest.raises(ConfigError):
                self.make(classes, "CoreMatchingChat", tiny_vlm, **wrong)


@pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed")
class TestRealHarness:
    def test_registered(self):
        from lmms_eval.models import get_model

        assert get_model("corematching").is_simple is False
        assert get_model("corematching", force_simple=True).is_simple is True
        assert manifest().model_id == "corematching"

    @pytest.mark.parametrize("force_simple", [False, True])
    def test_scores_as_our_own_command(self, subject, split, tmp_path, force_simple, monkeypatch):
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.tasks import TaskManager

        text = SPARSE.replace(";", ",")
        task = SceneQA.load(split)
        board = evaluate(subject, task, make_methods([text]), tmp_path / "run", PLAN)
        wanted = {entry["method"]: entry["accuracy"]["value"] for entry in board["methods"]}
        rows = [
            {"id": q.id, "image": str(q.image), "family": q.family}
            | {"question": q.question, "answer": q.answer}
            for q in task.questions
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "sceneqa.jsonl").write_text(lines)
        subject.model.save_pretrained(tmp_path / "model")
        subject.processor.save_pretrained(tmp_path / "model")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        folder = Path(__file__).parents[3] / "examples" / "lmms_eval"
        manager = TaskManager(
            "ERROR", include_path=str(folder), include_defaults=False, model_name="corematching"
        )
        for method, expected in (("dense", wanted["dense"]), (SPARSE, wanted[text])):
            results = simple_evaluate(
                model="corematching",
                model_args=f"pretrained={tmp_path / 'model'},method={method},dtype=float32",
                tasks=["sceneqa"],
                task_manager=manager,
                batch_size="4",
                device="cpu",
                gen_kwargs=f"max_new_tokens={PLAN.max_new_tokens}",
                force_simple=force_simple,
                bootstrap_iters=0,
            )
            assert results["results"]["sceneqa"]["accuracy,none"] == pytest.approx(expected)
