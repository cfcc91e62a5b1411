"""What the tests of models under a cap on memory share."""

from __future__ import annotations

import torch
from torch import nn

from corematching.methods import CoreMatching
from tests.models import HIDDEN, LAYERS, WIDTH

CAP = "16MiB"
DENSE_FIRST = 1
STREAMED = LAYERS - DENSE_FIRST
LAYER_BYTES = 3 * HIDDEN * WIDTH * 4
FAMILIES = ("llava", "qwen2_5_vl", "gemma3", "llama")
TABLES = [name for name in vars(nn.Module()) if name.endswith("_hooks")]


def method(name="llava", **changes):
    tokens = {"token_score": None} if name == "llama" else {"keep": 0.5, "layer": 1}
    plain = {"beta": 0.5, "dense_first": DENSE_FIRST, "dense_last": 0, "firing": None}
    return CoreMatching(**{**tokens, **plain, **changes})


def answer(model, inputs, steps=5, **options):
    """Sequences and the logits of every step."""
    with torch.inference_mode():
        out = model.generate(
            **inputs,
            max_new_tokens=steps,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
    return [out.sequences, *out.logits]


def in_memory(model, inputs, chosen, **options):
    """The same run with all weights in memory, on the same decode path."""
    with chosen(model, "torch"):
        return answer(model, inputs, **options)


def same(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


def middle(model):
    return model.get_decoder().layers[2].mlp.up_proj


def snapshot(model):
    """The parameters, as objects and as numbers, and what else a method could leave on a model."""
    return list(model.parameters()), _numbers(model), _traces(model)


def unchanged(model, before):
    objects, numbers, traces = before
    kept = all(now is then for now, then in zip(model.parameters(), objects, strict=True))
    return kept and same(_numbers(model), numbers) and _traces(model) == traces


def _numbers(model):
    with torch.no_grad():
        return [x.clone() for x in (*model.parameters(), *model.buffers()) if not x.is_meta]


def _traces(model):
    found = {}
    for path, module in model.named_modules():
        hooks = [len(getattr(module, table)) for table in TABLES]
        found[path] = sorted(vars(module)), sorted(module._parameters), hooks
    for path, parameter in model.named_parameters():
        found[f"parameter {path}"] = (
            type(parameter), parameter.dtype, parameter.device, parameter.requires_grad,
            sorted(vars(parameter)), parameter.is_contiguous(),
        )  # fmt: skip
    return found
