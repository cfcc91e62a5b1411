"""Models by name: SceneVLM, a directory, or an id on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from corematching.errors import InputError, unknown_name
from corematching.inputs import tokenizer_of

SCENEVLM = "SceneVLM"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LoadedModel:
    """A model with its processor or tokenizer.

    Attributes
    ----------
    name : str
        As the user gave it.
    model : PreTrainedModel
    processor : ProcessorMixin or PreTrainedTokenizer
        A tokenizer for text-only models.
    takes_images : bool
    """

    name: str
    model: Any
    processor: Any
    takes_images: bool

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return tokenizer_of(self.processor)


def load_named(
    name: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    memory: str | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> LoadedModel:
    """Load a model, in eval mode, and its processor.

    Parameters
    ----------
    name : str, optional
        "SceneVLM", which the package ships (the default), a directory, or a hub id.
    device : str, optional
        Default: a CUDA device when there is one, else the CPU.
    dtype : str
        One of `DTYPES`.
    memory : str, optional
        Load the model without its FFNs, which stay outside this much memory; SceneVLM is loaded
        whole.
    progress : callable, optional
        As in `load_demo`.

    Raises
    ------
    ConfigError
        There is no such dtype.
    InputError
        There is no such model, or the device or its processor cannot be used.
    UnsupportedModelError
        The model is no causal language model, with or without images.
    """
    from corematching.loading import choose_loader, load_pretrained, load_processor, read_config

    check_dtype(dtype)
    target = choose_device(device)
    if name is None or is_scenevlm(name):
        from corematching.demo import load_demo

        chosen = None if dtype == "auto" else dtype
        return LoadedModel(SCENEVLM, *load_demo(chosen, target, progress=progress), True)
    if memory is None:
        return LoadedModel(name, *load_pretrained(name, dtype, target))
    from corematching.offload.load import load

    _, takes_images = choose_loader(name, read_config(name))
    processor = load_processor(name, takes_images)
    model = load(name, memory, dtype=dtype, device=target)
    return LoadedModel(name, model, processor, takes_images)


def is_scenevlm(name: str) -> bool:
    """Whether a name means SceneVLM."""
    return name.lower() == SCENEVLM.lower()


def check_dtype(dtype: str) -> None:
    """Check for a dtype of `DTYPES`."""
    if dtype not in DTYPES:
        raise unknown_name("dtype", str(dtype), DTYPES)


def choose_device(device: str | None) -> str:
    """Check a device, or choose one.

    Raises
    ------
    InputError
        The device cannot be used here.
    """
    import torch

    from corematching.devices import default_device

    if device is None:
        return default_device()
    try:
        torch.empty(0, device=torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device '{device}' cannot be used here: try --device cpu") from error
    return device
