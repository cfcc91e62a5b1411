"""The body of a chat request, as OpenAI's clients send it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from corematching.serving.http.errors import ApiError
from corematching.serving.params import AnswerOptions

IGNORED = frozenset(
    "user metadata store service_tier parallel_tool_calls prompt_cache_key prompt_cache_retention "
    "safety_identifier verbosity reasoning_effort reasoning".split()
)
"""Fields that change nothing here."""
NOTHING: dict[str, list[Any]] = {
    "tools": [[]],
    "functions": [[]],
    "tool_choice": ["none", "auto"],
    "function_call": ["none", "auto"],
    "logit_bias": [{}],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "background": [False],
    "include": [[]],
    "previous_response_id": [],
    "conversation": [],
    "prompt": [],
    "text": [{}, {"format": {"type": "text"}}],
    "truncation": ["disabled"],
}
"""Fields that are taken with these values only."""


class ImageUrl(BaseModel):
    """Where a picture is."""

    model_config = ConfigDict(strict=True)

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class TextPart(BaseModel):
    """A text."""

    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: str


class ImagePart(BaseModel):
    """A picture."""

    model_config = ConfigDict(strict=True)

    type: Literal["image_url"]
    image_url: ImageUrl


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class StreamOptions(BaseModel):
    """What a stream holds besides the answer."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = False
    continuous_usage_stats: Literal[False] | None = False
    include_obfuscation: bool | None = False


class ChatRequest(BaseModel):
    """A chat and how to answer it.

    ``keep_ratio`` is this server's own: the ratio of image tokens to keep, or "dense". ``top_k``,
    ``min_p``, ``repetition_penalty`` and ``ignore_eos`` are as in vLLM.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    ignore_eos: bool | None = None
    keep_ratio: float | str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def options(self) -> AnswerOptions:
        """The options of the answer.

        Raises
        ------
        ApiError
            A field is unknown, not supported, or does not fit another one.
        ConfigError
            A value is out of range.
        """
        check_extra(self.model_extra)
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true", "top_logprobs", "invalid_value")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream=true", "stream_options")
        same = (
            "temperature top_p top_k min_p seed stop n repetition_penalty presence_penalty "
            "frequency_penalty ignore_eos keep_ratio"
        )
        given: dict[str, Any] = {name: getattr(self, name) for name in same.split()}
        given["max_tokens"] = (
            self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        )
        given["logprobs"] = (self.top_logprobs or 0) if self.logprobs else None
        return AnswerOptions(**{name: value for name, value in given.items() if value is not None})


def check_extra(fields: Mapping[str, Any] | None) -> None:
    """Refuse fields that would change the answer, and unknown ones.

    Raises
    ------
    ApiError
        It names the field.
    """
    for name, value in (fields or {}).items():
        if name in IGNORED or value is None or value in NOTHING.get(name, []):
            continue
        what = "is not supported" if name in NOTHING else "is no known field"
        raise ApiError(400, f"{name} {what}: leave it out", name, "unsupported_parameter")
