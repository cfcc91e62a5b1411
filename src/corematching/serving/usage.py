"""The tokens of a request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Usage:
    """The tokens of a request.

    Attributes
    ----------
    prompt_tokens : int
        Of the prompt before any was dropped, image tokens included.
    completion_tokens : int
        Of all answers, end tokens included.
    image_tokens, kept_image_tokens : int
        Of the prompt, and those that decoding attends to.
    kv_bytes : int
        Keys and values of the prompt's kept tokens.
    """

    prompt_tokens: int
    completion_tokens: int
    image_tokens: int
    kept_image_tokens: int
    kv_bytes: int
