"""Sampling and streaming of text, without a model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from corematching.serving import AnswerOptions
from corematching.serving.sampling import Defaults, Sampler
from corematching.serving.text import TextStream

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])


def draws(count=300, prompt=(), logits=LOGITS, **options):
    options = {"temperature": 1.0, "seed": 0, **options}
    sampler = Sampler(AnswerOptions(**options), 0, list(prompt), Defaults())
    seen = []
    for _ in range(count):
        sampler.counts.clear()
        seen.append(sampler.choose(logits)[0])
    return seen


def test_frequencies_are_those_of_the_softmax():
    found = torch.tensor(draws(4000)).bincount(minlength=4) / 4000
    torch.testing.assert_close(found, LOGITS.softmax(0), atol=0.03, rtol=0)
    cold = torch.tensor(draws(4000, temperature=0.5)).bincount(minlength=4) / 4000
    torch.testing.assert_close(cold, (2 * LOGITS).softmax(0), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": -1}, {0, 1, 2, 3}),
        ({"top_p": 0.6}, {0}),
        ({"top_p": 0.7}, {0, 1}),
        ({"min_p": 0.2}, {0, 1}),
        ({"min_p": 1.0}, {0}),
        ({"temperature": 0}, {0}),
    ],
)
def test_unlikely_tokens_are_left_out(options, left):
    assert set(draws(**options)) == left


def test_penalties():
    again = Sampler(AnswerOptions(repetition_penalty=4.0), 0, [0, 9], Defaults())
    assert again.choose(LOGITS)[0] == 1  # 2 / 4 < 1
    assert again.choose(LOGITS)[0] == 0  # 1 / 4 < 2 / 4
    there = Sampler(AnswerOptions(presence_penalty=1.5), 0, [0], Defaults())
    assert [there.choose(LOGITS)[0] for _ in range(4)] == [0, 1, 0, 0]
    often = Sampler(AnswerOptions(frequency_penalty=1.5), 0, [], Defaults())
    assert [often.choose(LOGITS)[0] for _ in range(4)] == [0, 1, 0, 2]


def test_logprobs_are_those_of_the_model():
    sampler = Sampler(AnswerOptions(logprobs=1, presence_penalty=2.0), 0, [], Defaults())
    for _ in range(2):
        token, found = sampler.choose(LOGITS)
        assert found.logprob == pytest.approx(float(LOGITS.log_softmax(0)[token]))
        assert found.top[0][0] == 0


def test_defaults_come_from_the_generation_config():
    config = SimpleNamespace(do_sample=True, temperature=0.6, top_p=0.9, top_k=20)
    assert Defaults.of(config) == Defaults(0.6, 0.9, 20)
    config.do_sample = False
    assert Defaults.of(config) == Defaults()
    sampler = Sampler(AnswerOptions(top_k=3), 0, [], Defaults(0.6, 0.9, 20))
    assert (sampler.temperature, sampler.top_p, sampler.top_k) == (0.6, 0.9, 3)


class Letters:
    """A tokenizer whose tokens are bytes of UTF-8."""

    def decode(self, tokens, skip_special_tokens=True):
        return bytes(tokens).decode("utf-8", errors="replace")


def stream(text, *stops):
    made = TextStream(Letters(), stops)
    pieces = []
    for byte in text.encode():
        pieces.append(made.add(byte))
        if made.stopped:
            return pieces, made
    return [*pieces, made.finish()], made


def test_half_characters_wait():
    pieces, _ = stream("aé🙂")
    assert pieces == ["a", "", "é", "", "", "", "🙂", ""]


def test_what_may_become_a_stop_string_waits():
    pieces, made = stream("one END", "END", "EX")
    assert "".join(pieces) == "one " and made.stopped
    pieces, made = stream("one EN", "END")
    assert pieces[-1] == "EN" and "".join(pieces) == "one EN" and not made.stopped
    pieces, made = stream("aab", "ab", "b")
    assert "".join(pieces) == "a"
