"""A vision-language model and its processor."""

from __future__ import annotations

from typing import Any

from corematching.demo import load_demo
from corematching.lab.evaluate.lmms.settings import check_dtype
from corematching.loading import load_pretrained

SCENEVLM = "scenevlm"


def load_pair(
    pretrained: str, dtype: str = "auto", device: str | None = None, attention: str | None = None
) -> tuple[Any, Any]:
    """Load both, the model ready to answer.

    Parameters
    ----------
    pretrained : str
        A directory, a hub id, or "SceneVLM".
    dtype : str
        One of `DTYPES`.
    device : str, optional
        Default: a CUDA device when there is one, else the CPU.
    attention : str, optional
        The attention implementation.

    Raises
    ------
    ConfigError
        The dtype is unknown.
    InputError
        There is no such model, or it is damaged.
    """
    check_dtype(dtype)
    model: Any
    if str(pretrained).lower() == SCENEVLM:
        model, processor = load_demo(None if dtype == "auto" else dtype, device)
    else:
        model, processor, _ = load_pretrained(pretrained, dtype, device)
    if attention is not None:
        model.set_attn_implementation(attention)
    return model, processor
