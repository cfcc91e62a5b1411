"""One model on PyTorch and on the native engine, and loops that both run."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from corematching.runtime import attach, detach
from tests.runtime.families import BANNED, STEPS, RandomNeurons, RandomTokens, TestMethod

STEP, FFNS = "native steps", "native FFNs"


def make_method(batch=1, tokens=False, neurons=True, compensated=True):
    seeds = tuple(range(1, batch + 1))
    return TestMethod(
        RandomTokens((1,), seeds, share=0.5) if tokens else None,
        RandomNeurons(seeds, compensated) if neurons else None,
    )


def on_both(model, method, run):
    """What ``run(model)`` gives on PyTorch and on the native engine, and the latter's report."""
    results = []
    for engine in ("torch", "native"):
        at_work = attach(model, method, engine)
        try:
            results.append(run(model))
            report = at_work.report
        finally:
            detach(model)
        assert (report.kernel == "torch") == (engine == "torch")
    return (*results, report)


def follow(model, inputs, given):
    """(B, steps, V) logits behind a prompt and given tokens, by a hand-written loop."""
    cache, logits = DynamicCache(config=model.config.get_text_config()), []
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        mask = inputs["attention_mask"]
        for step in range(given.shape[1]):
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], 1)
            positions = mask.sum(1, keepdim=True) - 1
            out = model(
                input_ids=given[:, step : step + 1],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
            )
            logits.append(out.logits[:, -1].float())
    return torch.stack(logits, 1)


def generate_dict(model, inputs, steps=STEPS, **options):
    return model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=False,
        suppress_tokens=BANNED,
        return_dict_in_generate=True,
        **options,
    )
