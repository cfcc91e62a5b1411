"""The model that `corematching bench` measures, and its options for other engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from corematching.cli import console

SHAPE_TEXT_TOKENS = 64
FEWER = "give fewer --prompt-tokens"


def open_workload(
    model: str | None,
    shape: str | None,
    dtype: str,
    device: str | None,
    prompt_tokens: int | None,
    new_tokens: int,
) -> Any:
    """The model and its question, one sample at a time: loaded, or a shape with random weights.

    Raises
    ------
    InputError
        Prompt and answer are longer than the model takes.
    """
    from corematching.cli.loading import load_model
    from corematching.inputs import check_room, max_positions
    from corematching.lab.bench import LoadedWorkload, RandomWorkload, build_random, find_shape
    from corematching.named_models import choose_device

    if shape is None:
        loaded = load_model(model, device, dtype)
        limit = max_positions(loaded.model.config, loaded.tokenizer)
        check_room(limit, prompt_tokens or 0, new_tokens, FEWER)  # before the text is written
        made = LoadedWorkload(loaded.name, loaded.model, loaded.processor, 1, prompt_tokens)
        check_room(limit, made.prompt_tokens, new_tokens, FEWER)
        return made
    chosen, target = find_shape(shape), choose_device(device)
    text_tokens = prompt_tokens or SHAPE_TEXT_TOKENS
    limit = max_positions(chosen.make_config())
    check_room(limit, chosen.image_tokens + text_tokens, new_tokens, FEWER)
    kind = read_dtype(dtype)
    console.quieten_libraries()
    with console.waiting(f"filling {chosen.name} with random weights"):
        filled = build_random(chosen, target, kind)
    return RandomWorkload(chosen, filled, 1, text_tokens)


def read_dtype(name: str) -> Any:
    """A shape's dtype; auto is bfloat16."""
    import torch

    from corematching.named_models import check_dtype

    check_dtype(name)
    return torch.bfloat16 if name == "auto" else getattr(torch, name)


def peer_options(adapter: Any, workload: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The options of an adapter."""
    import torch

    from corematching.demo.cache import cache_root

    values = {
        "dtype": str(workload.model.dtype).removeprefix("torch."),
        "device": str(workload.model.device),
        "threads": torch.get_num_threads(),
        "batch": workload.batch,
        "new_tokens": given["new_tokens"],
        "prompt_tokens": workload.prompt_tokens,
        "work": str(cache_root() / "peers" / adapter.name),
    }
    if workload.random_weights:
        text_tokens = given["prompt_tokens"] or SHAPE_TEXT_TOKENS
        return {**values, "shape": workload.name, "text_tokens": text_tokens}
    return {**values, "checkpoint": find_checkpoint(given["model"])}


def find_checkpoint(model: str | None) -> str:
    """The directory of a model's weights."""
    from corematching.named_models import is_scenevlm

    if model is None or is_scenevlm(model):
        from corematching.demo.cache import demo_directory

        return str(demo_directory())
    if Path(model).is_dir():
        return str(Path(model).resolve())
    from huggingface_hub import snapshot_download

    return snapshot_download(model, local_files_only=True)
