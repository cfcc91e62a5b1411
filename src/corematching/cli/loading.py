"""Models by name: SceneVLM, a directory, or an id on the Hugging Face Hub."""

from __future__ import annotations

import os
import socket
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corematching.cli import console
from corematching.errors import InputError, UnsupportedModelError, unknown_name

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
    from corematching.runtime import load

    target = choose_device(device)
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    if name is None or name.lower() == SCENEVLM.lower():
        return load_scenevlm(target, dtype)
    go_offline_without_network(name)
    console.quieten_libraries()
    config = read_config(name)
    loader, takes_images = choose_loader(name, config)
    processor = load_processor(name, takes_images)
    with console.waiting(f"loading {name}"):
        try:
            if memory is not None:
                model = load(name, memory, dtype=dtype, device=target)
            else:
                model = loader.from_pretrained(name, dtype=dtype).to(target).eval()
        except (OSError, ImportError, ValueError) as error:
            raise InputError(
                f"cannot load the weights of '{name}' ({first_line(error)}): check that the model "
                "is complete, or delete it from the cache and download it again"
            ) from error
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


def read_config(name: str) -> Any:
    """Read a model's config, from a directory or from the hub."""
    from transformers import AutoConfig

    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise InputError(
            f"the directory '{name}' holds no model (no config.json): give one that does"
        )
    try:
        return AutoConfig.from_pretrained(name)
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"'{name}' has an architecture that transformers does not know "
            f"({first_line(error)}): see `corematching models` for those that work"
        ) from error
    except OSError as error:
        raise InputError(
            f"no model '{name}': no such directory, and the Hugging Face Hub has none or cannot be "
            "reached; check the name and the network, or leave --model out to use SceneVLM"
        ) from error


def choose_loader(name: str, config: Any) -> tuple[Any, bool]:
    """The auto class for a config, and whether it takes pictures."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText, True
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM, False
    raise UnsupportedModelError(
        f"'{name}' is a '{config.model_type}', which generates no text: see `corematching models` "
        "for the architectures that work"
    )


def load_processor(name: str, takes_images: bool) -> Any:
    """The processor of a vision-language model, the tokenizer of a text model."""
    from transformers import AutoProcessor, AutoTokenizer

    try:
        return (AutoProcessor if takes_images else AutoTokenizer).from_pretrained(name)
    except ImportError as error:
        raise InputError(
            f"the processor of '{name}' needs a package that is not installed: {first_line(error)}"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"'{name}' has no {'processor' if takes_images else 'tokenizer'} that can be loaded "
            f"({first_line(error)}): save one beside the weights"
        ) from error


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


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without its full stop."""
    text = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].rstrip(".:")[:200]
