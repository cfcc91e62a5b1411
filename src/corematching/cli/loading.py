"""Models by name: SceneVLM, a directory, or an id on the Hugging Face Hub."""

from __future__ import annotations

import os
import socket
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corematching.cli import console
from corematching.errors import InputError, unknown_name

SCENEVLM = "SceneVLM"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LoadedModel:
    """A model with what prepares its input.

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
        return getattr(self.processor, "tokenizer", self.processor)


def load_model(
    name: str | None,
    device: str | None = None,
    dtype: str = "auto",
    memory: str | None = None,
) -> LoadedModel:
    """Load a model and its processor.

    Parameters
    ----------
    name : str, optional
        A directory or a hub id; default: SceneVLM.
    device : str, optional
        Default: a CUDA device when there is one, else the CPU.
    dtype : str
        One of `DTYPES`.
    memory : str, optional
        Load the model without its FFNs, which stay outside this much memory; SceneVLM is loaded
        whole.

    Raises
    ------
    InputError
        There is no such model, or the device or its processor cannot be used.
    UnsupportedModelError
        The model is no causal language model, with or without images.
    """
    from corematching.devices import multiplies
    from corematching.loading import choose_loader, load_pretrained, load_processor, read_config
    from corematching.runtime import load

    target = choose_device(device)
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    if name is None or name.lower() == SCENEVLM.lower():
        return load_scenevlm(target, dtype)
    go_offline_without_network(name)
    console.quieten_libraries()
    with console.waiting(f"loading {name}"):
        if memory is None:
            model, processor, takes_images = load_pretrained(name, dtype, target)
        else:
            _, takes_images = choose_loader(name, read_config(name))
            processor = load_processor(name, takes_images)
            model = load(name, memory, dtype=dtype, device=target)
    if not multiplies(target, model.dtype):
        console.note(
            f"this processor multiplies no {str(model.dtype).removeprefix('torch.')}: "
            "--dtype float32 is several times faster if the memory holds it"
        )
    return LoadedModel(name, model, processor, takes_images)


def load_scenevlm(device: str, dtype: str) -> LoadedModel:
    """Load the model that the package ships."""
    from corematching.demo import load_demo

    console.quieten_libraries()
    console.hide_library_bars()
    with console.stepping("assembling SceneVLM (once)") as progress:
        chosen = None if dtype == "auto" else dtype
        model, processor = load_demo(chosen, device, progress=progress)
    return LoadedModel(SCENEVLM, model, processor, takes_images=True)


def choose_device(device: str | None) -> str:
    """Check a device, or choose one."""
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device '{device}' cannot be used here: try --device cpu") from error
    return device


def go_offline_without_network(name: str) -> None:
    """Spare the user half a minute of retries when the hub's name cannot even be looked up."""
    proxied = any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"))
    if Path(name).is_dir() or proxied or os.environ.get("HF_HUB_OFFLINE"):
        return
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        socket.getaddrinfo(urllib.parse.urlparse(endpoint).hostname, 443)
    except OSError:
        from huggingface_hub import constants

        constants.HF_HUB_OFFLINE = True
