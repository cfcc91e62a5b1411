"""What both ways to run llama.cpp have in common."""

import hashlib
import random
from pathlib import Path

from gguf_text import read_text_config, write_text_part


def convert(options):
    """The GGUF file of a checkpoint's text part, written once."""
    checkpoint = Path(options["checkpoint"])
    stamps = [(f.name, f.stat().st_mtime_ns) for f in sorted(checkpoint.glob("*.safetensors"))]
    key = hashlib.sha256(repr((str(checkpoint), stamps)).encode()).hexdigest()[:12]
    target = Path(options["work"]) / f"{key}-{options['dtype']}.gguf"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text_part(checkpoint, options["dtype"], target)
    return target


def make_body(request, vocabulary):
    """A completion request of random token ids, exactly as long as asked, with no caching."""
    draw = random.Random(request["number"])
    high = min(vocabulary, 30_000)
    ids = [draw.randrange(100, high) for _ in range(request["prompt_tokens"])]
    return {
        "prompt": ids,
        "n_predict": request["new_tokens"],
        "max_tokens": request["new_tokens"],
        "ignore_eos": True,
        "temperature": 0,
        "top_k": 1,
        "cache_prompt": False,
    }


def check_counts(made, read, request):
    """Refuse times of anything but what was asked for."""
    if (made, read) != (request["new_tokens"], request["prompt_tokens"]):
        raise RuntimeError(
            f"{read} prompt tokens and {made} new ones instead of {request['prompt_tokens']} and "
            f"{request['new_tokens']}"
        )


def vocabulary_of(options):
    """Tokens in the vocabulary."""
    return read_text_config(options["checkpoint"])["vocab_size"]


def context_of(options):
    """Tokens that the longest request needs, rounded up."""
    return -(-(options["prompt_tokens"] + options["new_tokens"] + 1) // 256) * 256
