"""The command end to end, in this process, on a tiny random model."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch
from PIL import Image

from corematching.cli.entry import run_command
from tests.demo.scene_fakes import byte_tokenizer

QUESTION = "How many?"


@pytest.fixture
def ask(tiny_vlm, picture, capsys):
    """Runs `corematching run` on the tiny model; gives (exit code, stdout, stderr)."""

    def run(*arguments, model=tiny_vlm, image=picture):
        images = ("--image", str(image)) if image else ()
        fixed = ("run", "--model", str(model), *images, "--question", QUESTION)
        code = run_command([*fixed, "--max-new-tokens", "6", *arguments])
        return code, *capsys.readouterr()

    return run


def refused(result) -> str:
    """Check that a run was refused by one line, and return it."""
    code, out, err = result
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
    assert "Traceback" not in err
    return err


def test_json_is_one_object(ask):
    code, out, _ = ask("--json", "--keep-ratio", "0.25", "--layer", "1", "--neurons", "top(0.5)")
    assert code == 0
    result = json.loads(out)
    assert list(result) == ["answer", "model", "method", "report"]
    (sample,) = result["report"]["samples"]
    assert sample["image_tokens"] == 16 and sample["kept_tokens"] == 4
    assert sum(sample["keep_mask"]) == 4 and sample["cut_layers"] == [1]
    assert sample["prefill_flops"] < sample["dense_prefill_flops"]
    assert result["method"]["neurons"]["ratio"] == 0.5
    assert result["method"]["keep_ratio"] == 0.25
    old = ask("--json", "--keep", "0.25", "--after", "1", "--neurons", "0.5")
    assert json.loads(old[1])["method"] == result["method"] and "keep_ratio=0.25" in old[2]


def test_one_token_and_all_of_them(ask):
    for options, kept in ((("--keep-tokens", "1"), 1), (("--keep-ratio", "1"), 16)):
        (sample,) = json.loads(ask("--json", *options)[1])["report"]["samples"]
        assert sample["kept_tokens"] == kept


def test_a_method_from_a_file(ask, tmp_path):
    file = tmp_path / "method.json"
    file.write_text('{"name": "fastv", "keep_tokens": 3, "layer": 0}')
    result = json.loads(ask("--json", "--method", f"@{file}")[1])
    assert result["method"] == {"name": "fastv", "keep_ratio": None, "keep_tokens": 3, "layer": 0}
    assert result["report"]["samples"][0]["kept_tokens"] == 3


def test_json_with_compare(ask):
    result = json.loads(ask("--json", "--compare", "--keep-ratio", "0.25")[1])
    assert list(result) == ["answer", "dense_answer", "model", "method", "report"]


def test_keeping_all_answers_as_dense(ask):
    result = json.loads(ask("--json", "--compare", "--keep-ratio", "1", "--neurons", "none")[1])
    assert result["answer"] == result["dense_answer"]


def test_answer_and_table(ask):
    code, out, _ = ask("--keep-ratio", "0.25", "--layer", "0")
    assert code == 0
    assert re.search(r"image tokens +16 +4 +25 %", out)
    assert re.search(r"TTFT +- +[\d.]+ m?s", out)
    for label in ("neurons per step", "prefill FLOPs", "FLOPs per step", "KV cache", "TPOT"):
        assert label in out


def test_compare_shows_both_answers_and_times(ask):
    code, out, _ = ask("--compare")
    assert code == 0
    assert out.startswith("dense:") and "\nsparse:" in out
    assert re.search(r"TTFT +[\d.]+ m?s +[\d.]+ m?s +\d+ %", out)


def test_streamed_answer_is_the_answer(ask):
    answer = json.loads(ask("--json")[1])["answer"]
    streamed = ask()[1].split("\n\n")[0]
    assert answer.split() == streamed.split()


def test_overlay_is_drawn(ask, tmp_path):
    path = tmp_path / "kept.png"
    code, _, err = ask("--overlay", str(path), "--method", "paper")
    assert code == 0 and "overlay:" in err and "only the curve" not in err
    with Image.open(path) as drawn:
        assert drawn.format == "PNG"


def test_two_pictures(ask, picture):
    result = json.loads(ask("--json", "--image", str(picture), "--keep-ratio", "0.5")[1])
    assert result["report"]["samples"][0]["image_tokens"] == 32


def test_model_is_clean_afterwards(ask):
    first, second = (json.loads(ask("--json", "--compare")[1]) for _ in range(2))
    assert first["dense_answer"] == second["dense_answer"]


def test_text_model_runs_without_a_picture(ask, tiny_lm):
    code, out, err = ask("--json", model=tiny_lm, image=None)
    assert code == 0, err
    assert json.loads(out)["report"]["samples"][0]["image_tokens"] == 0


def test_text_model_with_a_picture(ask, tiny_lm):
    assert "text-only model: leave --image out" in refused(ask(model=tiny_lm))


def test_missing_picture(ask, tmp_path):
    assert "no picture at" in refused(ask(image=tmp_path / "none.png"))


def test_broken_picture(ask, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n")
    assert "no picture that can be read" in refused(ask(image=tmp_path / "bad.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--keep-ratio", "1.5"), r"--keep-ratio 1\.5 is outside \(0, 1\]"),
        (("--keep-tokens", "0.5"), "--keep-tokens"),
        (("--keep-ratio", "0.5", "--keep-tokens", "3"), "exclude each other"),
        (("--neurons", "top(0)"), "ratio=0: give a ratio"),
        (("--score", "text-overlp"), "did you mean 'text-overlap'"),
        (("--method", "papper"), "did you mean 'paper'"),
        (("--layer", "9"), "layer"),
        (("--device", "nowhere"), "device 'nowhere' cannot be used"),
        (("--dtype", "float31"), "did you mean 'float32'"),
        (("--max-new-tokens", "0"), "max-new-tokens"),
        (("--keeep", "1"), "--keeep"),
        (("--overlay", "/no/such/folder/a.png"), "no directory"),
    ],
)
def test_bad_options(ask, arguments, message):
    assert re.search(message, refused(ask(*arguments)))


def test_empty_question(ask):
    assert "question is empty" in refused(ask("--question", "  "))


def test_unsupported_architecture(ask, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    assert "`corematching models`" in refused(ask(model=tmp_path))


def test_experts_are_refused_before_anything_runs(ask, tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    tokenizer = byte_tokenizer()
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "expert" in refused(ask("--compare", model=tmp_path, image=None)).lower()


def test_architecture_without_text(ask, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert "'vit', which generates no text" in refused(ask(model=tmp_path))


def test_directory_without_a_model(ask, tmp_path):
    assert "holds no model" in refused(ask(model=tmp_path))


def test_no_such_model_offline(ask, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "no model 'nobody/nothing'" in refused(ask(model="nobody/nothing"))


def test_no_room_on_disk(ask, monkeypatch, tmp_path):
    from corematching.cli import loading

    def fail(*args, **kwargs):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(loading, "load_processor", fail)
    assert "no room on disk" in refused(ask())


def test_models_lists_the_families(capsys):
    assert run_command(["models"]) == 0
    out = capsys.readouterr().out
    assert "LLaVA-1.5" in out and "qwen2_5_vl" in out


def test_unknown_command(capsys):
    assert run_command(["rum"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("multiplies", [True, False])
def test_a_slow_dtype_is_pointed_out(ask, monkeypatch, multiplies):
    check = "_is_mkldnn_bf16_supported"
    monkeypatch.setattr(torch.ops.mkldnn, check, lambda: multiplies)
    code, _, err = ask("--json", "--dtype", "bfloat16", "--device", "cpu")
    assert code == 0
    assert ("--dtype float32" in err) is not multiplies
