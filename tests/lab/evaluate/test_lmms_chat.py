"""Chat requests, their settings and the answers to them, without lmms-eval."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from corematching.chat import encode, pictures_of, render
from corematching.errors import ConfigError, InputError
from corematching.lab.evaluate.lmms.responder import Responder
from corematching.lab.evaluate.lmms.settings import (
    Settings,
    StopAtText,
    cut_at,
    read_batch_size,
    read_method,
    read_settings,
    read_until,
)
from corematching.lab.evaluate.lmms.turns import read_turns, user_turn
from corematching.methods import method_from_text

SPARSE = "corematching:keep_ratio=0.25;layer=1;neurons=top(0.5;dense_first=1;dense_last=1)"
RED, GREEN, BLUE = (Image.new("RGB", (64, 64), color) for color in ("red", "green", "blue"))


def colors(turns):
    return [picture.getpixel((0, 0)) for picture in pictures_of(turns)]


def kinds(turns):
    return [part.get("text", "IMAGE") for turn in turns for part in turn["content"]]


@pytest.fixture
def responder(subject) -> Responder:
    return Responder(subject.model, subject.processor, read_method("dense"))


class TestArguments:
    @pytest.mark.parametrize(
        "text",
        [
            "random:keep_ratio=0.2;neuron_ratio=0.5",
            "random:keep_ratio=0.2,neuron_ratio=0.5",
            "'random:keep_ratio=0.2,neuron_ratio=0.5'",
            '"random:keep_ratio=0.2;neuron_ratio=0.5"',
        ],
    )
    def test_method_takes_another_separator(self, text):
        assert read_method(text) == method_from_text("random:keep_ratio=0.2,neuron_ratio=0.5")

    def test_unknown_method_names_the_nearest(self):
        with pytest.raises(ConfigError, match="corematching"):
            read_method("corematchin")

    def test_batch_size(self):
        assert read_batch_size("8") == 8
        for wrong in ("auto", 0, None):
            with pytest.raises(ConfigError, match="whole number"):
                read_batch_size(wrong)

    def test_greedy_at_temperature_zero(self):
        settings = read_settings({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0})
        assert settings.options["max_new_tokens"] == 16
        assert settings.options["do_sample"] is False
        assert settings.options["temperature"] is None and settings.options["top_p"] is None

    def test_temperature_samples_unless_told_not_to(self):
        warm = {"temperature": 0.2, "top_p": 0.9}
        options = read_settings(warm).options
        assert options["do_sample"] and options["temperature"] == 0.2 and options["top_p"] == 0.9
        assert "top_k" not in options
        assert not read_settings({**warm, "do_sample": False}).options["do_sample"]

    def test_length_has_a_default_and_a_bound(self):
        assert read_settings({}).options["max_new_tokens"] == 1024
        assert read_settings({"max_gen_toks": 7}).options["max_new_tokens"] == 7
        with pytest.raises(ConfigError, match="max_new_tokens=0"):
            read_settings({"max_new_tokens": 0})

    def test_until_drops_the_filler(self):
        assert read_until(["ASSISTANT:", "\n\n", ""]) == ("ASSISTANT:",)
        assert read_until("</s>") == ("</s>",)
        assert read_settings({"until": None}).until == ()
        with pytest.raises(ConfigError, match="until"):
            read_until(3)

    def test_what_generate_does_not_know_is_named(self, caplog):
        with caplog.at_level("INFO"):
            read_settings({"image_aspect_ratio": "original"})
        assert "image_aspect_ratio" in caplog.text


class TestPictures:
    def test_without_a_place_they_come_first(self):
        turns = user_turn("What?", [RED, BLUE])
        assert kinds(turns) == ["IMAGE", "IMAGE", "What?"]
        assert colors(turns) == [(255, 0, 0), (0, 0, 255)]

    def test_places_are_filled_in_order(self):
        turns = user_turn("A <image> and <image>?", [RED, BLUE])
        assert kinds(turns) == ["A ", "IMAGE", " and ", "IMAGE", "?"]
        assert colors(turns) == [(255, 0, 0), (0, 0, 255)]

    def test_numbers_choose_and_a_second_mention_is_text(self):
        turns = user_turn("<image 2> or <image 1>, <image 2>?", [RED, BLUE])
        assert kinds(turns) == ["IMAGE", " or ", "IMAGE", ", <image 2>?"]
        assert colors(turns) == [(0, 0, 255), (255, 0, 0)]

    def test_numbered_and_free_places_do_not_share(self):
        turns = user_turn("<image> <image 1>", [RED, BLUE])
        assert colors(turns) == [(0, 0, 255), (255, 0, 0)]

    def test_those_left_over_come_first_and_empty_places_go(self):
        assert kinds(user_turn("x <image>", [RED, BLUE])) == ["IMAGE", "x ", "IMAGE"]
        assert kinds(user_turn("x <image> y <image 3>", [])) == ["x  y <image 3>"]

    def test_paths_and_other_modes(self, tmp_path):
        GREEN.convert("RGBA").save(tmp_path / "green.png")
        turns = user_turn("?", [str(tmp_path / "green.png"), GREEN.convert("RGBA")])
        assert colors(turns) == [(0, 128, 0)] * 2
        assert all(picture.mode == "RGB" for picture in pictures_of(turns))

    @pytest.mark.parametrize("visual", ["no-such.mp4", b"bytes", {"array": [0]}])
    def test_other_media_are_refused(self, visual):
        with pytest.raises(InputError, match="pictures and text only"):
            user_turn("?", [visual])

    def test_messages(self):
        turns = read_turns(
            [
                {"role": "system", "content": "Be short."},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "A"},
                        {"type": "image", "url": RED},
                        {"type": "text", "text": "B"},
                    ],
                },
            ]
        )
        assert [turn["role"] for turn in turns] == ["system", "user"]
        assert kinds(turns) == ["Be short.", "A", "IMAGE", "B"]
        with pytest.raises(InputError, match="video"):
            read_turns([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}])


class TestStopping:
    def test_cut_at_the_first(self):
        assert cut_at("a pig\nQ: and", ["Q:", "\n"]) == "a pig"
        assert cut_at("a pig", ["Q:"]) == "a pig"

    def test_stops_on_new_text_only(self, subject):
        tokenizer = subject.tokenizer
        ids = torch.tensor([tokenizer("xyab")["input_ids"], tokenizer("abxy")["input_ids"]])
        start = ids.shape[1] - 2
        assert StopAtText(tokenizer, ["ab"], start)(ids, None).tolist() == [True, False]
        assert StopAtText(tokenizer, ["ya"], start)(ids, None).tolist() == [False, False]

    def test_an_answer_ends_in_front_of_a_stop(self, responder):
        chat = user_turn("How many?", [RED])
        options = read_settings({"max_new_tokens": 12}).options
        (whole,) = responder.answer([chat], Settings((), options))
        end = whole.text[4:6]
        (cut,) = responder.answer([chat], Settings((end,), options))
        assert cut.text == whole.text[: whole.text.index(end)]
        assert cut.new_tokens < whole.new_tokens == 12


class TestAnswers:
    def test_mixed_batch_gives_what_each_gives_alone(self, responder):
        settings = read_settings({"max_new_tokens": 6})
        chats = [
            user_turn("How many pigs are there in the picture?", [RED]),
            user_turn("No picture at all?", []),
            user_turn("Compare.", [BLUE, GREEN]),
            user_turn("Nor here?", []),
        ]
        together = [said.text for said in responder.answer(chats, settings)]
        alone = [responder.answer([chat], settings)[0].text for chat in chats]
        assert together == alone and len(set(together)) > 1

    def test_shares_are_counted(self, subject):
        responder = Responder(subject.model, subject.processor, read_method(SPARSE))
        responder.answer([user_turn("What?", [RED])], read_settings({"max_new_tokens": 3}))
        shares = responder.totals.shares()
        assert shares["image_tokens_kept"] == 0.25
        assert 0 < shares["prefill_flops_share"] < 1 and 0 < shares["kv_bytes_share"] < 1

    @pytest.mark.parametrize("method", ["dense", SPARSE])
    def test_an_answer_scores_what_it_was_given(self, subject, method, monkeypatch):
        monkeypatch.setattr(subject.model.generation_config, "suppress_tokens", None)
        responder = Responder(subject.model, subject.processor, read_method(method))
        chats = [user_turn("What?", [RED]), user_turn("Who is in this picture?", [BLUE])]
        output, _ = responder._generate(
            encode(subject.model, subject.processor, chats[:1]),
            max_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = output.sequences[0, -4:].tolist()
        log_probs = torch.cat(output.logits).float().log_softmax(-1)
        wanted = float(log_probs[range(4), tokens].sum())
        rows = {"said": tokens, "other": [*tokens[:3], (tokens[3] + 1) % 200]}
        monkeypatch.setattr(responder, "_tokens_of", lambda prompt, text: rows[text])
        said, other, _ = responder.score([chats[0], chats[0], chats[1]], ["said", "other", "other"])
        assert said == (pytest.approx(wanted, abs=1e-3), True)
        assert other[0] < said[0] and not other[1]

    def test_dense_score_is_the_sum_of_log_probabilities(self, responder, subject):
        chat, text = user_turn("What?", [RED]), " pig"
        inputs = encode(subject.model, subject.processor, [chat])
        tokens = responder._tokens_of(render(subject.processor, chat), text)
        assert subject.tokenizer.decode(tokens) == text
        ids = torch.cat([inputs["input_ids"], torch.tensor([tokens])], 1)
        rest = {"pixel_values": inputs["pixel_values"], "attention_mask": torch.ones_like(ids)}
        with torch.inference_mode():
            logits = subject.model(input_ids=ids, **rest).logits[0, -len(tokens) - 1 : -1]
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(tokens).unsqueeze(1)).sum()
        ((scored, _),) = responder.score([chat], [text])
        assert scored == pytest.approx(float(wanted), abs=1e-3)

    def test_empty_continuation_is_refused(self, responder):
        with pytest.raises(InputError, match="empty text"):
            responder.score([user_turn("What?", [RED])], [""])
