"""Models and their processors from a directory or the Hugging Face Hub, whole or not at all.

A checkpoint is data: its Python code is never run. Missing weights and weights of another shape
are errors; transformers would draw them at random.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from corematching.errors import InputError, UnsupportedModelError, first_line, translating

logger = logging.getLogger(__name__)

SHOWN = 3
RECOMPUTED = ("position_ids", "inv_freq")
"""Suffixes of buffers in old checkpoints that new models compute."""
COMPLETE = "check that the model is complete, or delete it from the cache and download it again"
OWN_CODE = (
    "'{name}' comes with Python code of its own, which is not run: choose a model whose "
    "architecture transformers has itself (see `corematching models`), or, if you trust the code, "
    "load the model yourself with trust_remote_code=True and put a method on it"
)


def load_pretrained(
    name: str | Path, dtype: Any = "auto", device: Any = None
) -> tuple[Any, Any, bool]:
    """Load a model that generates text, and its processor or tokenizer.

    Parameters
    ----------
    name : str or Path
        A directory or an id on the Hugging Face Hub.
    dtype : torch.dtype or str
        Default: as stored.
    device : torch.device or str, optional
        Default: a CUDA device when there is one, else the CPU.

    Returns
    -------
    (PreTrainedModel, ProcessorMixin or PreTrainedTokenizer, bool)
        The model in eval mode; a tokenizer for text-only models; whether it takes pictures.

    Raises
    ------
    InputError
        There is no such model, or a part of it is missing or damaged.
    UnsupportedModelError
        The model is no causal language model, with or without pictures, or transformers does not
        know it.
    """
    from corematching.devices import default_device

    loader, takes_images = choose_loader(name, read_config(name))
    processor = load_processor(name, takes_images)
    target = device or default_device()
    model = load_weights(loader, name, dtype=dtype)
    return model.to(target), processor, takes_images


def read_config(name: str | Path) -> Any:
    """Read a model's config.

    Raises
    ------
    InputError, UnsupportedModelError
        As `load_pretrained`.
    """
    from transformers import AutoConfig

    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise InputError(
            f"the directory '{name}' holds no model (no config.json): give one that does"
        )
    with translating(f"the config of '{name}' is damaged", "download or save it again"):
        try:
            return AutoConfig.from_pretrained(name, trust_remote_code=False)
        except OSError as error:
            raise _no_model(name, error) from error
        except (ValueError, KeyError) as error:
            if "trust_remote_code" in str(error):
                raise UnsupportedModelError(OWN_CODE.format(name=name)) from error
            raise UnsupportedModelError(
                f"'{name}' has an architecture that transformers does not know "
                f"({first_line(error)}): see `corematching models` for those that work"
            ) from error


def _no_model(name: str | Path, error: OSError) -> InputError:
    if Path(name).is_dir():
        return InputError(f"cannot read the config of '{name}' ({first_line(error)}): repair it")
    return InputError(
        f"no model '{name}': no such directory, and the Hugging Face Hub has none or cannot be "
        "reached; check the name and the network, or leave --model out to use SceneVLM"
    )


def choose_loader(name: str | Path, config: Any) -> tuple[Any, bool]:
    """The auto class for a config, and whether it takes pictures.

    Raises
    ------
    UnsupportedModelError
        The architecture generates no text.
    """
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


def load_weights(loader: Any, name: str | Path, fix: str = COMPLETE, **options: Any) -> Any:
    """Load a model, in eval mode, and check that no weight is missing.

    Parameters
    ----------
    loader : class
        With ``from_pretrained``.
    name : str or Path
    fix : str
        The advice for a file that cannot be read.
    **options
        For ``from_pretrained``.

    Raises
    ------
    InputError
        A file is missing or damaged, or the weights are not all of the model's.
    """
    with translating(f"cannot load the weights of '{name}'", fix):
        model, info = loader.from_pretrained(
            name,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **options,
        )
    check_weights(name, info)
    return model.eval()


def check_weights(name: str | Path, info: Mapping[str, Any]) -> None:
    """Check a checkpoint's weights; log superfluous ones.

    Parameters
    ----------
    name : str or Path
    info : mapping
        The loading info of ``from_pretrained(..., output_loading_info=True)``.

    Raises
    ------
    InputError
        Weights are missing or do not fit; the message names them.
    """
    fix = "download or save the whole model again"
    missing = info["missing_keys"]
    if missing:
        raise InputError(f"'{name}' lacks {_list(missing)}: {fix}")
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        shown = [f"{key} {tuple(found)}, not {tuple(due)}" for key, found, due in mismatched]
        raise InputError(f"weights of '{name}' do not fit its config: {_list(shown)}: {fix}")
    if info.get("error_msgs"):
        raise InputError(f"cannot load the weights of '{name}' ({info['error_msgs'][0]}): {fix}")
    extra = [key for key in info["unexpected_keys"] if not key.endswith(RECOMPUTED)]
    if extra:
        logger.warning(
            "'%s' holds weights that its architecture has no place for, and which are left out: %s",
            name,
            _list(extra),
        )


def load_processor(name: str | Path, takes_images: bool = True, **options: Any) -> Any:
    """The processor of a vision-language model, the tokenizer of a text model.

    Raises
    ------
    InputError
        There is none, it is damaged, or it needs a package that is not installed.
    UnsupportedModelError
        It needs the checkpoint's own Python code.
    """
    from transformers import AutoProcessor, AutoTokenizer

    kind = "processor" if takes_images else "tokenizer"
    loader: Any = AutoProcessor if takes_images else AutoTokenizer
    with translating(f"'{name}' has no {kind} that can be loaded", "save one beside the weights"):
        try:
            processor = loader.from_pretrained(name, trust_remote_code=False, **options)
        except ImportError as error:
            raise InputError(
                f"the {kind} of '{name}' needs a package that is not installed: {first_line(error)}"
            ) from error
        except ValueError as error:
            if "trust_remote_code" in str(error):
                raise UnsupportedModelError(OWN_CODE.format(name=name)) from error
            raise
    parts = ("image_processor", "tokenizer") if takes_images else ()
    for part in parts:
        if getattr(processor, part, None) is None:
            raise InputError(
                f"the processor of '{name}' has no {part}: save a whole one beside the weights"
            )
    return processor


def _list(names: Collection[str]) -> str:
    """The first few of some names, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return f"{', '.join(ordered[:SHOWN])}{more}"
