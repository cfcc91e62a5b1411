"""Loads a model larger than memory, without its FFNs."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn

from corematching.devices import default_device
from corematching.errors import InputError, MemoryCapError
from corematching.loading import choose_loader, load_weights, read_config
from corematching.model.ffn import find_ffn
from corematching.offload.guard import WeightGuard
from corematching.offload.memory import bytes_of
from corematching.offload.offload import loaded_outside, loaded_outside_error
from corematching.offload.source import FileSource, Source, open_checkpoint, pin
from corematching.sizes import format_size, parse_size

SAFETENSORS = "its weights must be whole safetensors files, model.save_pretrained(...) writes them"
WRAPPED = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa")
"""Methods that accelerate replaces on a model that it dispatches to devices."""


def load(
    path: str | Path,
    memory: str | int,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
) -> Any:
    """Load a model without its FFNs, which stay in its files (on a GPU: in pinned host memory).

    The model runs under the cap with a method only, ``with CoreMatching()(model) as run``.

    Parameters
    ----------
    path : str or Path
        A directory or an id on the Hugging Face Hub, with safetensors files.
    memory : str or int
        Cap on the model's device memory, such as ``"12GiB"``.
    dtype : torch.dtype or str
        The weights' dtype; default: as stored.
    device : torch.device or str, optional
        Default: a CUDA device when there is one, else the CPU.

    Returns
    -------
    PreTrainedModel
        In eval mode.

    Raises
    ------
    ConfigError
        ``memory`` is no size.
    MemoryCapError
        Not even the rest of the model fits under the cap.
    UnsupportedModelError
        The model has no dense FFNs, or does not generate text.
    InputError
        There is no such model, or its weights are not in safetensors files.
    """
    cap = parse_size("memory", memory)
    target = torch.device(device or default_device())
    loader, empty = _build_empty(path, dtype)
    outside = _linear_names(empty)
    _check_rest(empty, outside, cap)
    device_map = {name: "disk" for name, _ in empty.named_children()}
    model = load_weights(loader, path, SAFETENSORS, dtype=dtype, device_map=device_map)
    stored = _find_sources(model)
    _clear(model)
    moved = {f"{name}.weight" for name in outside}
    _load_rest(model, {n: s for n, s in stored.items() if n not in moved}, target)
    sources: dict[str, Source] = {name: stored[name] for name in moved}
    if target.type != "cpu":
        own = dict(model.named_parameters())
        sources = {name: pin(stored[name], own[name].dtype) for name in moved}
    find_ffn(model.get_decoder().layers[0]).register_forward_pre_hook(_check_ffn_weights)
    loaded_outside[model] = (sources, cap)
    absent = [weight for weight in model.parameters() if weight.is_meta]
    make_error = functools.partial(loaded_outside_error, type(model).__name__)
    WeightGuard(model, absent, make_error).install()
    return model


def _build_empty(path: str | Path, dtype: torch.dtype | str) -> tuple[Any, nn.Module]:
    """A model's auto class, and the model with empty weights."""
    config = read_config(path)
    loader, _ = choose_loader(path, config)
    kind = dtype if dtype != "auto" else (config.dtype or torch.float32)
    kind = getattr(torch, kind) if isinstance(kind, str) else kind
    with init_empty_weights(include_buffers=False):
        empty = loader.from_config(config, dtype=kind)
    empty.tie_weights()
    return loader, empty


def _linear_names(model: Any) -> list[str]:
    """The names of the linear layers of the decoder layers' FFNs."""
    layers = getattr(model.get_decoder(), "layers", ())
    inside = {
        id(m) for layer in layers for m in find_ffn(layer).modules() if isinstance(m, nn.Linear)
    }
    return [name for name, module in model.named_modules() if id(module) in inside]


def _check_rest(empty: Any, outside: list[str], cap: int) -> None:
    moved = {id(p) for name in outside for p in empty.get_submodule(name).parameters()}
    rest = {id(p): p for p in empty.parameters() if id(p) not in moved}
    need = sum(p.numel() * p.element_size() for p in rest.values()) + bytes_of(empty.buffers())
    if need > cap:
        raise MemoryCapError(
            f"what stays in memory beside the FFNs takes {format_size(need)}, more than memory="
            f"{format_size(cap)}: raise the cap, or load the model in a smaller dtype"
        )


def _find_sources(model: nn.Module) -> dict[str, FileSource]:
    """Each weight's source in the files, by its name in the model."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    maps = (getattr(hook, "weights_map", None) for hook in hooks)
    index = next(weights for weights in maps if weights is not None).dataset.index
    files = open_checkpoint({entry["safetensors_file"] for entry in index.values()})
    return {
        name: files[entry["safetensors_file"], entry["weight_name"]]
        for name, entry in index.items()
    }


def _clear(model: Any) -> None:
    """Remove accelerate's hooks: the weights are streamed another way here."""
    remove_hook_from_submodules(model)
    for module in model.modules():
        vars(module).pop("forward", None)
    for name in WRAPPED:
        vars(model).pop(name, None)
    with contextlib.suppress(AttributeError):
        del model.hf_device_map


def _load_rest(model: Any, sources: dict[str, FileSource], device: torch.device) -> None:
    """Read the weights that stay in memory; tied weights stay tied."""
    model.tie_weights()
    made: dict[Tensor, nn.Parameter] = {}
    for path, owner in model.named_modules():
        for name, old in [*owner._parameters.items(), *owner._buffers.items()]:
            source = sources.get(f"{path}.{name}" if path else name)
            if old is None or source is None:
                continue
            if old not in made:
                host = torch.empty(tuple(old.shape), dtype=old.dtype)
                source.copy_to(host)
                made[old] = nn.Parameter(host.to(device), requires_grad=False)
            if name in owner._parameters:
                owner._parameters[name] = made[old]
            else:
                owner._buffers[name] = made[old].data
        for name, buffer in owner._buffers.items():
            owner._buffers[name] = None if buffer is None else buffer.to(device)


def _check_ffn_weights(ffn: nn.Module, _: Any) -> None:
    """Raise InputError if a model runs without its FFNs."""
    if any(parameter.is_meta for parameter in ffn.parameters()):
        raise InputError(
            "this model was loaded without its FFNs and runs with a method only: "
            "with CoreMatching()(model): ..."
        )
