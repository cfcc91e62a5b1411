"""Turn the shipped parts and a language model into one standard checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corematching.demo.assets import REINSTALL, SceneAssets
from corematching.demo.language import LanguageSource
from corematching.errors import InputError

logger = logging.getLogger(__name__)

Progress = Callable[[str, float], None]
OPTIONAL_TOWER_KEYS = ("post_layernorm.weight", "post_layernorm.bias")


def assemble(
    assets: SceneAssets | Path | str,
    language: LanguageSource | Path | str,
    out_dir: Path | str,
    progress: Progress | None = None,
) -> Path:
    """Write a directory that ``AutoModelForImageTextToText`` and ``AutoProcessor`` load.

    Parameters
    ----------
    assets : SceneAssets or path
        Vision tower, projector and LoRA factors.
    language : LanguageSource or path
        The language model that the factors are merged into.
    out_dir : path
        Created when missing.
    progress : callable, optional
        Called as ``progress(step, done)`` with ``done`` in [0, 1].

    Raises
    ------
    InputError
        A part is missing or does not fit the others.
    """
    parts = assets if isinstance(assets, SceneAssets) else SceneAssets.read(assets)
    source = language if isinstance(language, LanguageSource) else LanguageSource.at(language)
    tell = progress or (lambda step, done: logger.info("%s (%.0f %%)", step, 100 * done))
    out = Path(out_dir)

    tell("reading the language model", 0.0)
    text_model, tokenizer = source.load()
    tell("merging LoRA", 0.4)
    merge_lora(text_model.model, parts)
    tokenizer, image_token_id = name_image_token(tokenizer, parts, out)
    name_ends(tokenizer, text_model.config)
    tell("adding the vision tower", 0.6)
    model = join(text_model, parts, image_token_id)
    tell("writing the checkpoint", 0.7)
    model.save_pretrained(out)
    build_processor(tokenizer, parts).save_pretrained(out)
    tell("done", 1.0)
    return out


def merge_lora(text_model: Any, assets: SceneAssets) -> None:
    """Add ``scale * B @ A`` to every linear layer that the factors name, in float32."""
    import torch

    factors = assets.under("lora.")
    names = sorted({name.removesuffix(".A").removesuffix(".B") for name in factors})
    linears = dict(text_model.named_modules())
    for name in names:
        if name not in linears or f"{name}.A" not in factors or f"{name}.B" not in factors:
            raise InputError(f"SceneVLM's LoRA factors for '{name}' do not fit: {REINSTALL}")
        weight = linears[name].weight
        update = factors[f"{name}.B"].float() @ factors[f"{name}.A"].float()  # (out, in)
        if update.shape != weight.shape:
            raise InputError(
                f"SceneVLM's LoRA factors for '{name}' have shape {tuple(update.shape)}, the "
                f"language model's weight {tuple(weight.shape)}: {REINSTALL}"
            )
        with torch.no_grad():
            merged = weight.float() + assets.lora_scale * update
            weight.copy_(merged.to(weight.dtype))


def name_image_token(tokenizer: Any, assets: SceneAssets, scratch: Path) -> tuple[Any, int]:
    """Rename a spare token of the vocabulary to the image token, so that its size stays.

    Returns
    -------
    (tokenizer, int)
        The tokenizer with the new name and the token's id.
    """
    from transformers import AutoTokenizer

    name = assets.config["image_token"]
    token_id = assets.config.get("image_token_id", tokenizer.get_vocab().get(name))
    spare = None if token_id is None else tokenizer.convert_ids_to_tokens(int(token_id))
    if spare is None:
        raise InputError(f"the language model has no token for '{name}': {REINSTALL}")
    scratch.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(scratch)
    path = scratch / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    if spare in vocabulary:
        vocabulary[name] = vocabulary.pop(spare)
    for entry in content["added_tokens"]:
        if entry["id"] == token_id:
            entry.update(content=name, special=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    renamed = AutoTokenizer.from_pretrained(scratch, trust_remote_code=False)
    if renamed.convert_tokens_to_ids(name) != token_id:
        raise InputError(f"cannot give token {token_id} the name '{name}': {REINSTALL}")
    return renamed, int(token_id)


def name_ends(tokenizer: Any, config: Any) -> None:
    """Let the tokenizer end and pad with the tokens that the language model's config has.

    Some versions of transformers read a GGUF file's tokenizer without a padding token, and with
    another end token than the file names.
    """
    for name in ("eos_token", "pad_token"):
        token_id = getattr(config, f"{name}_id", None)
        if isinstance(token_id, int) and getattr(tokenizer, f"{name}_id") != token_id:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))


def join(text_model: Any, assets: SceneAssets, image_token_id: int) -> Any:
    """Build the LLaVA model around a language model, in the language model's dtype."""
    import torch
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    settings = assets.config
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**settings["vision_config"]),
        text_config=text_model.config,
        image_token_index=image_token_id,
        projector_hidden_act=settings["projector_hidden_act"],
        vision_feature_layer=settings.get("vision_feature_layer", -1),
        vision_feature_select_strategy=settings.get("vision_feature_select_strategy", "default"),
        tie_word_embeddings=text_model.config.tie_word_embeddings,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    dtype = text_model.dtype
    tower = type(model.model.vision_tower)(config.vision_config)
    projector = type(model.model.multi_modal_projector)(config)
    tower_state = {
        name.removeprefix("vision_model."): tensor
        for name, tensor in assets.under("vision_tower.").items()
    }
    load_part(tower, tower_state, "vision tower", OPTIONAL_TOWER_KEYS)
    load_part(projector, assets.under("projector."), "projector")
    model.model.vision_tower = tower.to(dtype)
    model.model.multi_modal_projector = projector.to(dtype)
    model.model.language_model = text_model.model
    model.lm_head = text_model.lm_head
    model.generation_config = text_model.generation_config
    return model.eval()


def load_part(
    module: Any, state: dict[str, Any], what: str, optional: tuple[str, ...] = ()
) -> None:
    """Load a state dict, refusing one that does not fit."""
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise InputError(f"SceneVLM's {what} does not fit its config: {REINSTALL}") from error
    wrong = [name for name in missing if not name.endswith(optional or ("\0",))] + list(unexpected)
    if wrong:
        raise InputError(f"SceneVLM's {what} lacks or has too much: {wrong[:3]}: {REINSTALL}")


def build_processor(tokenizer: Any, assets: SceneAssets) -> Any:
    """The LLaVA processor: image to pixels, question to tokens with one token per patch."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    settings = assets.config
    tokenizer.image_token = settings["image_token"]
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(**settings["image_processor"]),
        tokenizer=tokenizer,
        patch_size=settings["vision_config"]["patch_size"],
        vision_feature_select_strategy=settings.get("vision_feature_select_strategy", "default"),
        chat_template=assets.chat_template,
        image_token=settings["image_token"],
        num_additional_image_tokens=1,
    )
