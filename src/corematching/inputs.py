"""Checks of a user's input: text without control tokens, prompts within the model's length."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from corematching.errors import InputError

SCALED = ("linear", "dynamic", "yarn")
"""Rotary embeddings that reach further than the config's positions, by a factor."""
UNLIMITED = 10**9
"""A tokenizer without a limit names a number above this one."""
_MARKS = re.compile(r"_(token|tag)$")


@dataclass(frozen=True)
class Controls:
    """The texts that a tokenizer or a processor reads as control tokens.

    Attributes
    ----------
    exact : Pattern or None
        Finds them; None where there are none.
    alike : Pattern or None
        Finds them in folded text, for any normalisation of the tokenizer.
    ids : frozenset of int
    """

    exact: re.Pattern[str] | None
    alike: re.Pattern[str] | None
    ids: frozenset[int]


_known: WeakKeyDictionary[Any, Controls] = WeakKeyDictionary()


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor; a tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def plain_text(processor: Any, text: str) -> str:
    """A user's text with nothing in it that acts as a control token.

    A special token that is typed out, such as ``<image>`` or ``<|im_end|>``, gets a space behind
    its first character and is read as plain words. Other text stays unchanged.

    Parameters
    ----------
    processor : ProcessorMixin or PreTrainedTokenizer
    text : str
        A question, before it goes into the chat template.

    Raises
    ------
    InputError
        The tokenizer still reads a special token in the text.
    """
    controls = _controls_of(processor)
    if controls.exact is None or controls.alike is None or not controls.alike.search(_fold(text)):
        return text
    plain = controls.exact.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
    tokenizer = tokenizer_of(processor)
    ids = tokenizer(plain, add_special_tokens=False)["input_ids"]
    left = controls.ids.intersection(ids)
    if left:
        token = tokenizer.convert_ids_to_tokens(min(left))
        raise InputError(
            f"the question holds what the model reads as its special token '{token}': write it "
            "another way"
        )
    return plain


def _controls_of(processor: Any) -> Controls:
    if processor not in _known:
        tokenizer = tokenizer_of(processor)
        names = sorted(set(_special_texts(processor, tokenizer)), key=len, reverse=True)
        unknown = getattr(tokenizer, "unk_token", None)
        vocabulary = tokenizer.get_vocab()
        ids = {vocabulary[name] for name in names if name in vocabulary and name != unknown}
        folded = {_fold(name): None for name in names}
        _known[processor] = Controls(_any_of(names), _any_of(folded), frozenset(ids))
    return _known[processor]


def _special_texts(processor: Any, tokenizer: Any) -> Iterator[str]:
    """Texts of two characters or more; a single one cannot be taken apart."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    marks = (value for name, value in vars(processor).items() if _MARKS.search(name))
    texts = [
        *tokenizer.all_special_tokens,
        *(token.content for token in added if token.special),
        *(str(mark) for mark in marks if mark),
    ]
    yield from (text for text in texts if len(text.strip()) > 1)


def _any_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    parts = [re.escape(text) for text in texts]
    return re.compile("|".join(parts)) if parts else None


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def max_positions(config: Any, tokenizer: Any = None) -> int | None:
    """The most positions of a model, prompt and answer together.

    Parameters
    ----------
    config : PreTrainedConfig
        Of the whole model.
    tokenizer : PreTrainedTokenizer, optional
        Consulted where the config has no limit.

    Returns
    -------
    int or None
        None where neither has one.
    """
    text = config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    if isinstance(limit, int) and limit > 0:
        return max([limit, *(int(reach) for reach in _reaches(text, limit))])
    stated = getattr(tokenizer, "model_max_length", None)
    return stated if isinstance(stated, int) and 0 < stated < UNLIMITED else None


def _reaches(text: Any, limit: int) -> Iterator[float]:
    """The reach of scaled rotary embeddings, for each kind of layer."""
    ropes = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [rope for rope in ropes.values() if isinstance(rope, Mapping)]
    for rope in nested or [ropes]:
        factor = rope.get("factor")
        if rope.get("rope_type", rope.get("type")) in SCALED and factor:
            yield factor * (rope.get("original_max_position_embeddings") or limit)


def check_length(model: Any, tokens: int, new_tokens: int = 1, tokenizer: Any = None) -> None:
    """Check the length of a prompt before anything runs.

    Parameters
    ----------
    model : PreTrainedModel
    tokens : int
        Of the prompt, those of its pictures included.
    new_tokens : int
        The longest answer.
    tokenizer : PreTrainedTokenizer, optional
        See `max_positions`.

    Raises
    ------
    InputError
        Prompt and answer together exceed the model's positions.
    """
    limit = max_positions(model.config, tokenizer)
    check_room(limit, tokens, new_tokens)


SHORTER = "ask something shorter, or show fewer or smaller pictures"


def check_room(limit: int | None, tokens: int, new_tokens: int = 1, fix: str = SHORTER) -> None:
    """As `check_length`, for a known limit, or None; ``fix`` is the advice."""
    if limit is None or tokens + new_tokens <= limit:
        return
    if tokens >= limit:
        raise InputError(
            f"the prompt has {tokens:,} tokens, the model takes {limit:,} at most: {fix}"
        )
    raise InputError(
        f"the prompt has {tokens:,} tokens and the answer up to {new_tokens:,}, the model takes "
        f"{limit:,} at most: {fix}, or ask for {limit - tokens:,} new tokens at most"
    )


def longest_prompt(inputs: Mapping[str, Any]) -> int:
    """The number of tokens of a batch's longest prompt, padding left out."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return int(inputs["input_ids"].shape[1])
    return int(mask.sum(1).max())
