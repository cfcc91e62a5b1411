"""One prompt through the model with the method: what is left of it, ready to be decoded.

Shapes: T tokens of the prompt, K stored ones, G key-value heads, D head dimension, V tokens of the
vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from corematching.cache.pruned_cache import pruned_prompt_of
from corematching.errors import AlreadyInstalledError
from corematching.methods.base import BaseMethod
from corematching.protocol import NeuronChoice
from corematching.runtime import Run
from corematching.runtime.prefill.prompt import read_prompt
from corematching.serving.features import FeatureCache

T = TypeVar("T")
POLL_SECONDS = 0.005
FIRST_POSITIONS = {"paligemma": 1}
"""The position of the first token, by model type, where it is not 0."""


@dataclass
class Prompt:
    """A prompt that the model has read.

    Attributes
    ----------
    cache : Any
        Its keys and values.
    logits : Tensor
        (V,) float, of the first token of the answer.
    position : int
        Of the first token of the answer: T, plus what the model's rotary embedding adds.
    kept : int
        K.
    log_counts : Tensor or None
        (1, K) float32, logarithms of what the tokens count for.
    neurons : dict
        The neuron choices, by layer.
    windowed : bool
        Whether a layer's attention sees only so many columns back.
    """

    cache: Any
    logits: Tensor
    position: int
    kept: int
    log_counts: Tensor | None
    neurons: dict[int, NeuronChoice]
    windowed: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether every layer sees and keeps all its tokens as (1, G, K, D), of one shape."""
        layers = self.cache.layers
        if self.windowed or any(type(layer) is not DynamicLayer for layer in layers):
            return False
        kinds = {(tuple(x.shape), x.dtype, x.device) for y in layers for x in (y.keys, y.values)}
        return len(kinds) == 1


class PromptReader:
    """Runs prompts through a model.

    Parameters
    ----------
    run : Run
        The method on the model.
    features : FeatureCache
        Of pictures that were seen before.
    """

    def __init__(self, run: Run, features: FeatureCache) -> None:
        self.run, self.features = run, features

    def count_tokens(self, inputs: Mapping[str, Any]) -> tuple[int, int]:
        """Tokens of a prompt, and how many of them are image tokens."""
        length = int(inputs["input_ids"].shape[1])
        kwargs = dict(inputs)
        _, image = read_prompt(self.run.model, kwargs, self.run.spec.image_ids, length)
        return length, int(image.sum())

    def read(self, inputs: Mapping[str, Any], method: BaseMethod | None) -> Prompt:
        """Read a prompt, with another method than the installed one where one is given.

        Parameters
        ----------
        inputs : mapping
            What the processor gave, of one sample without padding.
        method : BaseMethod or None
        """
        model: Any = self.run.model
        other = nullcontext() if method is None else self.run.substitute(method)
        with other, self.features.use(method or self.run.method):
            out = when_free(
                lambda: model.generate(
                    **inputs,
                    max_new_tokens=1,
                    do_sample=False,
                    num_beams=1,
                    num_return_sequences=1,
                    use_cache=True,
                    cache_implementation=None,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            )
        cache, length = out.past_key_values, int(inputs["input_ids"].shape[1])
        memory = pruned_prompt_of(cache)
        dropped = 0 if memory is None else int(memory.dropped)
        deltas = getattr(model.base_model, "rope_deltas", None)
        ahead = int(deltas.flatten()[0]) if isinstance(deltas, Tensor) else 0
        ahead += FIRST_POSITIONS.get(model.config.model_type, 0)
        return Prompt(
            cache=cache,
            logits=out.logits[0][0].float(),
            position=length + ahead,
            kept=length - dropped,
            log_counts=None if memory is None else memory.log_counts,
            neurons={} if memory is None else dict(memory.neurons),
            windowed=has_windows(self.run.spec.config),
        )


def has_windows(config: Any) -> bool:
    """Whether any layer of a text model attends to less than all tokens before."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None


def when_free(call: Callable[[], T]) -> T:
    """Run something on the model once no other thread uses it.

    The runtime refuses a second run before it changes anything.
    """
    while True:
        try:
            return call()
        except AlreadyInstalledError:
            time.sleep(POLL_SECONDS)


def forward(model: Any, tokens: list[int], positions: list[int], **kwargs: Any) -> Tensor:
    """(B, V), the logits of one token for each row.

    Parameters
    ----------
    model : PreTrainedModel
    tokens, positions : list of int
        One for each row.
    **kwargs
        The cache, and its mask.
    """
    device = model.device
    ids = torch.tensor(tokens, device=device)[:, None]
    places = torch.tensor(positions, device=device)[:, None]
    out = when_free(lambda: model(input_ids=ids, position_ids=places, use_cache=True, **kwargs))
    logits: Tensor = out.logits[:, -1]
    return logits
