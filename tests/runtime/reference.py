"""What the sparse model must compute, in the slowest and plainest way.

The dense model runs over the whole sequence for every new token: no cache, nothing shortened.
A dropped token is hidden by an explicit mask of every layer; a dropped neuron is overwritten.
What a token counts for is added to that mask.
It shares no code with the library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Reference:
    """Greedy continuation.

    Attributes
    ----------
    tokens : Tensor
        (B, steps).
    logits : Tensor
        (B, steps, V).
    """

    tokens: Tensor
    logits: Tensor


def continue_greedily(
    model: Any,
    inputs: dict[str, Tensor],
    steps: int,
    kept_after: dict[int, Tensor] | None = None,
    neurons: list[tuple[Tensor, Tensor | None]] | None = None,
    new_token_type: int = 0,
    banned: list[int] | None = None,
    given: Tensor | None = None,
    weights_after: dict[int, Tensor] | None = None,
) -> Reference:
    """Continue a prompt greedily with dropped tokens, dropped neurons, or both.

    Parameters
    ----------
    model
        A dense model with eager attention, so that every layer gets a 4D mask.
    inputs : dict
        The prompt, for ``model(**inputs)``.
    steps : int
        New tokens.
    kept_after : dict
        Layer l to (B, T) bool: prompt tokens that go on to layer l + 1. New tokens see only what
        was kept everywhere, in every layer; for them a sliding window counts no dropped token.
    neurons : list
        Per layer: (B, F) bool, kept neurons, and (B, F) what stands for the others (or None).
        For new tokens only.
    new_token_type : int
        Token type of new tokens, where the family has token types.
    banned : list of int
        Ids that are never chosen.
    given : Tensor
        (B, N) new tokens that are given, in front of the chosen ones.
    weights_after : dict
        Layer l to (B, T): what the prompt's tokens count for from layer l + 1 on; the last of them
        holds for new tokens in all layers.
    """
    prompt = inputs["input_ids"].shape[1]
    sequence = dict(inputs)
    for token in [] if given is None else given.split(1, dim=1):
        sequence = _append(sequence, token, new_token_type)
    tokens, logits = [], []
    for _ in range(steps):
        with torch.no_grad(), ExitStack() as stack:
            valid, choices = inputs["attention_mask"], (kept_after or {}, weights_after)
            stack.enter_context(hidden_tokens(model, valid, *choices))
            stack.enter_context(overwritten_neurons(model, prompt, neurons))
            logits.append(model(**_place(model, sequence), use_cache=False).logits[:, -1])
        allowed = logits[-1].clone()
        allowed[:, banned or []] = -torch.inf
        tokens.append(allowed.argmax(-1, keepdim=True))
        sequence = _append(sequence, tokens[-1], new_token_type)
    return Reference(torch.cat(tokens, 1), torch.stack(logits, 1))


@contextmanager
def hidden_tokens(
    model: Any,
    valid: Tensor,
    kept_after: dict[int, Tensor],
    weights_after: dict[int, Tensor] | None = None,
) -> Iterator[None]:
    """Hide from every layer the columns of the tokens that were dropped before it.

    ``valid`` (B, T) is the prompt's attention mask.
    """
    layers = model.get_decoder().layers
    with ExitStack() as stack:
        for index, layer in enumerate(layers if kept_after else []):
            prompt = valid.bool()
            for after, keep in kept_after.items():
                prompt = prompt & keep if after < index else prompt
            new = valid.bool()
            for keep in kept_after.values():
                new = new & keep
            weights = [torch.ones(valid.shape)] * 2
            for after, given in (weights_after or {}).items():
                weights = [given if after < index else weights[0], given]
            hook = _masking_hook(prompt, new, _window(layer), *(w.log() for w in weights))
            handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def overwritten_neurons(
    model: Any, prompt: int, neurons: list[tuple[Tensor, Tensor | None]] | None
) -> Iterator[None]:
    """Overwrite what new tokens' dropped neurons give to the down projection."""
    with ExitStack() as stack:
        for layer, choice in zip(model.get_decoder().layers, neurons or [], strict=False):
            handle = find_down(layer).register_forward_pre_hook(_overwriting_hook(prompt, *choice))
            stack.callback(handle.remove)
        yield


def _masking_hook(
    seen_by_prompt: Tensor,
    seen_by_new: Tensor,
    window: int | None,
    added_for_prompt: Tensor,
    added_for_new: Tensor,
) -> Callable:
    """All (B, T): the prompt's tokens that its own rows, and rows of new tokens, may see (bool).

    And what is added to their scores.
    """
    prompt = seen_by_prompt.shape[1]

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        mask = kwargs["attention_mask"]  # (B, 1, T', T') additive
        assert mask.dim() == 4 and mask.is_floating_point(), "needs eager attention"
        hidden = args[0] if args else kwargs["hidden_states"]
        batch, length = hidden.shape[:2]
        mask = mask.expand(batch, 1, length, length).clone()
        lowest = torch.finfo(mask.dtype).min
        columns = F.pad(seen_by_prompt, (0, length - prompt), value=True)
        mask[:, :, :prompt].masked_fill_(~columns[:, None, None], lowest)
        present = F.pad(seen_by_new, (0, length - prompt), value=True)
        rank = present.long().cumsum(1)  # (B, T'), counts what is present
        distance = rank[:, prompt:, None] - rank[:, None]
        causal = torch.arange(length) <= torch.arange(prompt, length)[:, None]
        allowed = present[:, None] & causal
        if window is not None:
            allowed = allowed & (distance < window)
        mask[:, 0, prompt:] = torch.where(allowed, 0.0, lowest)
        for rows, added in (slice(prompt), added_for_prompt), (slice(prompt, None), added_for_new):
            part = mask[:, :, rows, :prompt]
            part += torch.where(part > lowest / 2, added[:, None, None], 0.0)
        return args, {**kwargs, "attention_mask": mask}

    return hook


def _window(layer: Any) -> int | None:
    """The layer's sliding window; Mistral's attention has it in its configuration only."""
    attention = getattr(layer, "self_attn", None)
    if attention is None:
        return None
    holder = attention if hasattr(attention, "sliding_window") else attention.config
    return getattr(holder, "sliding_window", None)


def _overwriting_hook(prompt: int, keep: Tensor, mean: Tensor | None) -> Callable:
    def hook(module: nn.Module, args: tuple) -> tuple:
        activations = args[0].clone()  # (B, T, F)
        filler = torch.zeros_like(activations[:, :1]) if mean is None else mean[:, None]
        new = activations[:, prompt:]
        activations[:, prompt:] = torch.where(keep[:, None], new, filler.to(new))
        return (activations, *args[1:])

    return hook


def find_down(layer: nn.Module) -> nn.Module:
    return layer.mlp.down_proj if hasattr(layer.mlp, "down_proj") else layer.mlp.dense_4h_to_h


def _place(model: Any, sequence: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs with position ids that count no padding, where attention depends on them."""
    if getattr(model.config.get_text_config(), "model_type", "") != "ministral3":
        return sequence
    places = (sequence["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return {**sequence, "position_ids": places}


def _append(sequence: dict[str, Tensor], token: Tensor, token_type: int) -> dict[str, Tensor]:
    """The inputs with one more token per sample."""
    longer = dict(sequence)
    longer["input_ids"] = torch.cat([sequence["input_ids"], token], 1)
    ones = torch.ones_like(token)
    longer["attention_mask"] = torch.cat([sequence["attention_mask"], ones], 1)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in sequence:
            types = torch.full_like(token, token_type)
            longer[name] = torch.cat([sequence[name], types], 1)
    return longer
