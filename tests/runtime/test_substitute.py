"""Prompts that another method reads than the installed one."""

from __future__ import annotations

import threading

import pytest
import torch

from corematching import CoreMatching, Dense, TopNeurons, VisionZip
from corematching.cache.pruned_cache import pruned_prompt_of
from corematching.errors import ConfigError
from tests.models import build, make_inputs


def generate(model, inputs):
    return model.generate(
        **inputs,
        max_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )


@pytest.mark.parametrize("other", [CoreMatching(0.25), CoreMatching(0.1), Dense()])
def test_a_prompt_is_read_as_if_the_other_method_were_installed(other):
    model = build("llava")
    inputs = make_inputs("llava", model)
    with torch.inference_mode():
        with other(model, engine="torch"):
            expected = generate(model, inputs)
        with CoreMatching(0.5)(model, engine="torch") as run:
            own = generate(model, inputs)
            with run.substitute(other):
                found = generate(model, inputs)
            again = generate(model, inputs)
    torch.testing.assert_close(torch.cat(found.logits), torch.cat(expected.logits))
    assert torch.equal(torch.cat(again.logits), torch.cat(own.logits))
    if other.tokens is None:
        assert pruned_prompt_of(found.past_key_values) is None


def test_only_this_thread_has_it():
    model = build("llava")
    with CoreMatching(0.5)(model, engine="torch") as run, run.substitute(Dense()):
        seen = []
        thread = threading.Thread(target=lambda: seen.append(run._session.method))
        thread.start()
        thread.join()
        assert run._session.method == Dense() and seen == [CoreMatching(0.5)]
    assert run.method == CoreMatching(0.5)


@pytest.mark.parametrize(
    "other",
    [CoreMatching(neurons=TopNeurons(0.4)), CoreMatching(proportional=True), VisionZip()],
    ids=["neurons", "weights", "vision tower"],
)
def test_what_needs_another_installation_is_refused(other):
    model = build("llava")
    installed = CoreMatching(neurons=None, proportional=False)
    with installed(model, engine="torch") as run:
        with pytest.raises(ConfigError, match="install it instead"), run.substitute(other):
            pass
        assert run._session.method is installed
