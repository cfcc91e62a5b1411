"""Checkpoints that are incomplete, damaged, or bring code of their own."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from corematching.cli.entry import run_command
from corematching.errors import CoreMatchingError, InputError, UnsupportedModelError
from corematching.loading import load_pretrained, load_weights
from corematching.runtime import load
from tests.cli.conftest import picture, tiny_lm, tiny_vlm  # noqa: F401

DOWN = ".layers.{}.mlp.down_proj.weight"


@pytest.fixture
def broken(tiny_vlm, tmp_path):  # noqa: F811
    """A copy of the tiny model to break."""
    return shutil.copytree(tiny_vlm, tmp_path / "model")


def change_weights(folder, change):
    """Let ``change`` edit the dict of a model's tensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def name_of(tensors, layer):
    return next(name for name in tensors if name.endswith(DOWN.format(layer)))


def refused(folder) -> str:
    with pytest.raises(CoreMatchingError) as caught:
        load_pretrained(folder, device="cpu")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800
    return str(caught.value)


def test_whole_model(tiny_vlm, tiny_lm):  # noqa: F811
    model, processor, takes_images = load_pretrained(tiny_vlm, device="cpu")
    assert takes_images and not model.training and processor.image_processor is not None
    assert load_pretrained(tiny_lm, "bfloat16", "cpu")[2] is False


@pytest.mark.parametrize("how", ["load_pretrained", "memory"])
def test_missing_weights_are_named(broken, how):
    def remove(tensors):
        for layer in range(4):
            del tensors[name_of(tensors, layer)]

    change_weights(broken, remove)
    with pytest.raises(InputError, match=r"lacks .*0\.mlp\.down_proj\.weight, .* and 1 more"):
        load_pretrained(broken, device="cpu") if how != "memory" else load(broken, "1GiB")


def test_missing_weights_end_the_command(broken, picture, capsys):  # noqa: F811
    change_weights(broken, lambda tensors: tensors.pop(name_of(tensors, 1)))
    code = run_command(["run", "-m", str(broken), "-i", str(picture), "-q", "What?"])
    said = capsys.readouterr()
    assert code == 2 and said.out == ""
    assert said.err.count("\n") == 1 and "1.mlp.down_proj.weight" in said.err


def test_the_command_shows_weights_that_are_too_many(broken, picture):  # noqa: F811
    change_weights(broken, lambda t: t.update({"model.head.weight": torch.zeros(2)}))
    asked = ["-i", str(picture), "-q", "What?", "--max-new-tokens", "2"]
    line = [sys.executable, "-m", "corematching", "run", "-m", str(broken), *asked]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("model.head.weight") == 1


def test_weights_of_another_shape_are_named(broken):
    change_weights(broken, lambda t: t.update({name_of(t, 0): torch.zeros(3, 5)}))
    assert "0.mlp.down_proj.weight (3, 5), not (32, 64)" in refused(broken)


def test_weights_that_are_too_many_are_logged(broken, caplog):
    extra = {"model.head.weight": torch.zeros(2), "model.position_ids": torch.zeros(2)}
    change_weights(broken, lambda tensors: tensors.update(extra))
    with caplog.at_level(logging.WARNING, "corematching"):
        load_pretrained(broken, device="cpu")
    (record,) = [entry for entry in caplog.records if entry.name.startswith("corematching")]
    assert "model.head.weight" in record.getMessage()
    assert "position_ids" not in record.getMessage()


@pytest.mark.parametrize("size", [0, 5, 100, 5000])
def test_truncated_weights(broken, size):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert "cannot load the weights of" in refused(broken)
    with pytest.raises(InputError, match="safetensors files"):
        load(broken, "1GiB")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"model_type": 3}',
        '{"model_type": "llava", "text_config": 5}',
        '{"model_type": "llama", "hidden_size": 17}',
        '{"model_type": "llama", "num_hidden_layers": "many"}',
        "[" * 100_000,
    ],
)
def test_broken_config(broken, content):
    (broken / "config.json").write_text(content)
    assert str(broken) in refused(broken)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", '{"a": 1}'),
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer_config.json", "[]"),
        ("processor_config.json", "[]"),
        ("processor_config.json", "null"),
    ],
)
def test_broken_processor(broken, file, content):
    (broken / file).write_text(content)
    assert "has no processor that can be loaded" in refused(broken)


def test_missing_image_processor(broken):
    (broken / "processor_config.json").unlink()
    assert "processor" in refused(broken)


OWN_CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import LlamaConfig as OwnConfig, LlamaForCausalLM as OwnModel
"""


@pytest.mark.parametrize("known", [False, True])
def test_code_of_a_checkpoint_is_never_run(tiny_lm, tmp_path, known):  # noqa: F811
    folder = shutil.copytree(tiny_lm, tmp_path / "model")
    mark = tmp_path / "it ran"
    (folder / "own.py").write_text(OWN_CODE.format(mark=str(mark)))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config["model_type"] = "llama" if known else "own"
    (folder / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "corematching", "run", "-m", str(folder), "-q", "What?"]
    done = subprocess.run(
        [*command, "--max-new-tokens", "2"],
        input="y\n" * 9,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert not mark.exists()
    assert done.returncode == (0 if known else 2), done.stderr
    if not known:
        assert done.stderr.count("\n") == 1
        assert "Python code of its own, which is not run" in done.stderr
        with pytest.raises(UnsupportedModelError, match="trust_remote_code=True"):
            load(folder, "1GiB")


def test_code_of_a_processor_is_never_run(broken, tmp_path):
    mark = tmp_path / "it ran"
    (broken / "own.py").write_text(OWN_CODE.format(mark=str(mark)))
    path = broken / "processor_config.json"
    config = json.loads(path.read_text())
    config |= {"auto_map": {"AutoProcessor": "own.OwnConfig"}, "processor_class": "OwnProcessor"}
    path.write_text(json.dumps(config))
    refused(broken)
    assert not mark.exists()


def test_code_of_a_generation_is_never_run(tiny_lm, tmp_path):  # noqa: F811
    folder = shutil.copytree(tiny_lm, tmp_path / "model")
    mark = tmp_path / "it ran"
    (folder / "custom_generate").mkdir()
    code = OWN_CODE.format(mark=str(mark)) + "def generate(*args, **options): raise ValueError\n"
    (folder / "custom_generate" / "generate.py").write_text(code)
    with contextlib.suppress(CoreMatchingError):
        model, tokenizer, _ = load_pretrained(folder, device="cpu")
        model.generate(**tokenizer("What?", return_tensors="pt"), max_new_tokens=2)
    assert not mark.exists()


def test_pickled_code_is_never_run(tiny_lm, tmp_path):  # noqa: F811
    folder = shutil.copytree(tiny_lm, tmp_path / "model")
    mark = tmp_path / "it ran"
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Touch(mark)}, folder / "pytorch_model.bin")
    assert "cannot load the weights" in refused(folder)
    assert not mark.exists()


class Touch:
    """Makes a file where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return type(self.mark).touch, (self.mark,)


def test_errors_of_the_machine_pass():
    class Loader:
        @staticmethod
        def from_pretrained(*args, **options):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        load_weights(Loader, "x")
