"""An engine that answers many chats at a time, and a server around it."""

from corematching.serving.answers import AnswerStream, CompletedAnswer, Completion
from corematching.serving.engine import Engine
from corematching.serving.observer import Observer
from corematching.serving.params import AnswerOptions
from corematching.serving.request import Chunk
from corematching.serving.sampling import TokenLogprob
from corematching.serving.usage import Usage

__all__ = [
    "AnswerOptions",
    "AnswerStream",
    "Chunk",
    "CompletedAnswer",
    "Completion",
    "Engine",
    "Observer",
    "TokenLogprob",
    "Usage",
]
