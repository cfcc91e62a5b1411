"""The report's numbers against counts made another way."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from corematching.report import Report, SampleReport
from corematching.report_table import write_bytes, write_count, write_flops, write_seconds
from corematching.runtime import attach, detach
from tests.models import build, image_mask, make_inputs
from tests.runtime.families import RandomNeurons, RandomTokens, TestMethod, generate


def run_once(name="llava", batch=1, tokens=True, neurons=False, steps=3, **options):
    """A report of one generate(), and what it ran on."""
    model = build(name)
    seeds = tuple(range(1, batch + 1))
    method = TestMethod(
        RandomTokens((0, 2), seeds, share=0.6) if tokens else None,
        RandomNeurons(seeds) if neurons else None,
    )
    inputs = make_inputs(name, model, batch=batch)
    run = attach(model, method)
    generate(model, inputs, steps, **options)
    detach(model)
    return run.report, method, inputs, model


def test_dense_prefill_flops_equal_torchs_counter():
    report, _, inputs, _ = run_once(name="llama", tokens=False)
    model = build("llama", "eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs, logits_to_keep=1)
    assert report.samples[0].dense_prefill_flops == counter.get_total_flops()
    assert report.samples[0].prefill_flops == report.samples[0].dense_prefill_flops


def test_sparse_prefill_flops_equal_torchs_counter():
    model = build("llava", "eager")
    inputs = make_inputs("llava", model)
    run = attach(model, TestMethod(RandomTokens((0, 2), (1,), share=0.6)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs, logits_to_keep=1)
    detach(model)
    counts = counter.get_flop_counts()
    layers = "LlavaForConditionalGeneration.model.language_model.layers"
    total = sum(sum(counts[f"{layers}.{i}"].values()) for i in range(4))
    head = 2 * 64 * 128
    sample = run.report.samples[0]
    assert sample.prefill_flops == total + head < sample.dense_prefill_flops


def test_vision_flops_equal_torchs_counter_without_attention():
    model = build("llava", "eager")
    inputs = make_inputs("llava", model)
    run = attach(model, TestMethod(RandomTokens((1,), (1,))))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    detach(model)
    counts = counter.get_flop_counts()["LlavaForConditionalGeneration.model.vision_tower"]
    linear = {str(op): flops for op, flops in counts.items() if "bmm" not in str(op)}
    assert run.report.vision_flops == sum(linear.values()) > 0


def test_decode_flops_by_hand():
    report, _, inputs, _ = run_once(name="llama", tokens=False, neurons=True)
    sample, length = report.samples[0], inputs["input_ids"].shape[1]
    attention = 64 * 64 * 2 + 64 * 32 * 2  # two of four key-value heads
    pairs = 2 * 64 * (length + 1)
    kept = round(0.4 * 96)
    assert report.neurons == [96, kept, kept, kept] and report.widths == [96] * 4
    macs = 4 * (attention + pairs) + 3 * 64 * (96 + 3 * kept) + 64 * 128
    assert sample.decode_flops == 2 * macs
    assert sample.dense_decode_flops == 2 * (4 * (attention + pairs + 3 * 64 * 96) + 64 * 128)
    assert report.neuron_retention_ratio == (96 + 3 * kept) / 384


def test_kept_tokens_and_bytes_per_sample():
    report, method, inputs, _ = run_once(batch=2)
    kept = method.tokens.kept_after(image_mask("llava", inputs))
    for row, sample in enumerate(report.samples):
        image = image_mask("llava", inputs)[row]
        assert sample.image_tokens == 16
        assert sample.keep_mask == kept[2][row, image].tolist()
        assert sample.kept_after == [int(kept[i][row, image].sum()) for i in (0, 2)]
        assert sample.kept_tokens == sum(sample.keep_mask) == sample.kept_after[-1]
        first, last = sample.kept_after  # after the layers 0 and 2 of 4
        assert sample.layer_tokens == [16, first, first, last]
        assert sample.layer_token_ratio == (16 + 2 * first + last) / 64
        assert sample.cut_layers == [0, 2] and sample.cuts == [0.5, 0.5] and sample.cut == 0.5
        assert [score == 1.0 for score in sample.scores] == sample.keep_mask
        assert sample.prompt_tokens == int(inputs["attention_mask"][row].sum())
        per_token = 4 * 2 * 2 * 16 * 4  # layers, keys and values, heads, size, bytes
        assert sample.dense_kv_bytes == sample.prompt_tokens * per_token
        gone = 16 - sample.kept_tokens
        assert sample.kv_bytes == (sample.prompt_tokens - gone) * per_token
        assert sample.prefill_flops < sample.dense_prefill_flops
        assert sample.decode_flops < sample.dense_decode_flops
    assert report.samples[0].keep_mask != report.samples[1].keep_mask


def test_what_the_report_says_of_the_run():
    report, method, _, _ = run_once(steps=5)
    assert report.method == method.to_dict() and report.model_type == "llava"
    assert (report.dtype, report.device, report.attention) == ("float32", "cpu", "sdpa")
    assert report.num_layers == 4 and report.drop_layers == [0, 2]
    assert report.decode_steps == 4 and report.samples[0].new_tokens == 5
    assert report.prefill_seconds > 0 and report.decode_seconds > 0 and report.vision_seconds > 0
    assert report.ttft_seconds == report.prefill_seconds + report.vision_seconds
    assert report.tpot_seconds == report.decode_seconds / 4


def test_new_tokens_end_with_the_end_token():
    model = build("llava")
    inputs = make_inputs("llava", model, batch=2)
    run = attach(model, TestMethod(RandomTokens((1,), (1, 2))))
    options = {"max_new_tokens": 8, "do_sample": False}
    new = model.generate(**inputs, **options)[:, -8:].tolist()
    end = new[0][2]
    model.generate(**inputs, **options, eos_token_id=end)
    detach(model)
    expected = [row.index(end) + 1 if end in row else 8 for row in new]
    assert [s.new_tokens for s in run.report.samples] == expected


def test_a_plain_forward_counts_every_row_of_logits():
    model = build("llava")
    inputs = make_inputs("llava", model)
    run = attach(model, TestMethod(RandomTokens((1,), (1,))))
    with torch.no_grad():
        model(**inputs, logits_to_keep=1)
        model(**inputs)
    detach(model)
    one, all_rows = (r.samples[0] for r in run.reports)
    length, gone = one.prompt_tokens, 16 - one.kept_tokens
    head = 2 * 64 * 128
    assert all_rows.dense_prefill_flops - one.dense_prefill_flops == head * (length - 1)
    assert all_rows.prefill_flops - one.prefill_flops == head * (length - gone - 1)
    assert run.report.decode_steps == 0 and run.report.tpot_seconds == 0


def test_without_a_cache_nothing_is_stored():
    model = build("llava")
    inputs = make_inputs("llava", model)
    run = attach(model, TestMethod(RandomTokens((0, 2), (1,), share=0.6)))
    with torch.no_grad():
        model(**inputs, use_cache=False)
    detach(model)
    sample = run.report.samples[0]
    assert sample.kv_bytes == sample.dense_kv_bytes == 0
    assert sample.prefill_flops < sample.dense_prefill_flops


def test_a_sliding_window_bounds_the_bytes():
    report, _, _, _ = run_once(name="mistral_window", tokens=False, neurons=True)
    assert report.samples[0].dense_kv_bytes == 6 * 4 * 2 * 2 * 16 * 4


def test_json_holds_everything_and_no_nan():
    report, _, _, _ = run_once(batch=2, neurons=True)
    report.samples[0].scores[0] = float("nan")
    back = json.loads(report.to_json(indent=1), parse_constant=pytest.fail)
    assert back["samples"][0]["scores"][0] is None
    assert back["samples"][1]["keep_mask"] == report.samples[1].keep_mask
    ratios = (
        "token_retention_ratio",
        "layer_token_ratio",
        "prefill_flops_ratio",
        "decode_flops_ratio",
        "kv_ratio",
    )
    for ratio in ratios:
        assert back[ratio] == getattr(report, ratio)
        assert back["samples"][0][ratio] == getattr(report.samples[0], ratio)
        assert 0 < back[ratio] < 1


def test_ratios_of_nothing_are_one():
    sample = SampleReport(0, 0, [], [], None, [], [], [], 3, 0, 1, 1, 1, 1, 0, 0)
    report = Report({}, "m", "t", "float32", "cpu", "sdpa", 1, [], [4], [4], 0.1, 0, 0, 0)
    report.samples = [sample]
    assert sample.token_retention_ratio == sample.kv_ratio == report.token_retention_ratio == 1
    assert sample.layer_token_ratio == report.layer_token_ratio == 1
    assert report.neuron_retention_ratio == 1 and report.tpot_seconds == 0


def test_the_table_shows_all_samples():
    report, _, _, _ = run_once(batch=2, neurons=True)
    lines = [re.split(r"  +", line) for line in str(report).splitlines()]
    assert lines[0] == ["2 samples", "dense", "sparse", "sparse / dense"]
    cells = {label: values for label, *values in lines[1:]}
    kept = sum(sample.kept_tokens for sample in report.samples)
    assert cells["image tokens"] == ["32", str(kept), f"{100 * kept / 32:.0f} %"]
    assert cells["neurons per step"] == ["384", str(sum(report.neurons)), "55 %"]
    assert cells["TTFT"][0] == cells["TPOT"][0] == "-" and len(cells["TPOT"]) == 2
    assert cells["KV cache"][-1] == f"{100 * report.kv_ratio:.0f} %"
    assert cells["prefill FLOPs"][0].endswith(" MFLOP")
    assert list(cells)[3] == "FLOPs per step" and len(cells) == 7


def test_the_table_takes_measured_times():
    report = Report({}, "m", "t", "float32", "cpu", "sdpa", 1, [], [4], [4], 0.1, 0, 0, 0)
    report.samples = [SampleReport(0, 0, [], [], None, [], [], [], 3, 0, 1, 1, 1, 1, 0, 0)]
    assert str(report).splitlines()[-1].split() == ["TPOT", "-", "-"], "no step has run"
    drawn = report.table(SimpleNamespace(ttft=0.5, tpot=None), SimpleNamespace(ttft=2, tpot=0.04))
    last = drawn.splitlines()[-2:]
    assert last[0].split() == ["TTFT", "2.00", "s", "500.0", "ms", "25", "%"]
    assert last[1].split() == ["TPOT", "40.0", "ms", "-"]
    assert all(line == line.rstrip() for line in drawn.splitlines())


def test_units_of_the_table():
    assert write_flops(999) == "999 FLOP" and write_flops(1.5e12) == "1.5 TFLOP"
    assert write_flops(3e18) == "3000 PFLOP"
    assert write_bytes(0) == "0 B" and write_bytes(3 << 29) == "1.5 GiB"
    assert write_count(1234567) == "1,234,567"
    assert write_seconds(0.0123) == "12.3 ms" and write_seconds(1.234) == "1.23 s"


def test_a_report_s_text_is_short():
    report, _, _, _ = run_once(neurons=True)
    kept = report.samples[0].kept_tokens
    assert repr(report) == (
        f"Report(test on LlavaForConditionalGeneration: 1 sample, image tokens {kept / 16:.0%}, "
        f"neurons 55%, kernel {report.kernel})"
    )
    assert repr(report.samples[0]).startswith(f"SampleReport({kept} of 16 image tokens, ")


def test_a_table_needs_no_rich():
    code = (
        "import sys; sys.modules['rich'] = None\n"
        "from corematching.report import Report\n"
        "print(Report({}, 'm', 't', 'float32', 'cpu', 'sdpa', 1, [], [2], [4], 0.1, 0, 0, 0))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "neurons per step       4         2            50 %" in done.stdout
