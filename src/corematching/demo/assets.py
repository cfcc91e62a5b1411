"""The part of SceneVLM that the package ships: vision tower, projector and LoRA factors.

``scenevlm.safetensors`` holds tensors under ``vision_tower.``, ``projector.`` and
``lora.<linear>.A`` / ``lora.<linear>.B``, with ``<linear>`` named relative to the language model
(``layers.0.self_attn.q_proj``); a merged weight is ``W + scale * B @ A``. Its metadata hold
``scale`` and ``config``, the same JSON as in ``scenevlm.json`` beside it, which adds ``sha256``.

To keep the package small, matrices are stored as int8 with one float32 factor per row, or per
column where those are fewer, under ``<name>.scale``; `SceneAssets.tensors` gives them back in
float32.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corematching.errors import InputError

WEIGHTS_NAME = "scenevlm.safetensors"
CONFIG_NAME = "scenevlm.json"
SCALE = ".scale"
REQUIRED = ("vision_config", "projector_hidden_act", "image_token", "image_processor")
REINSTALL = "reinstall the package: `pip install --force-reinstall --no-deps corematching`"

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class SceneAssets:
    """The shipped part of the model.

    Attributes
    ----------
    directory : Path
        The folder of `WEIGHTS_NAME` and `CONFIG_NAME`.
    config : dict
        ``vision_config`` (of `CLIPVisionConfig`), ``projector_hidden_act``,
        ``vision_feature_layer``, ``vision_feature_select_strategy``, ``image_token``,
        ``image_token_id``, ``image_processor`` (of `CLIPImageProcessor`), ``chat_template``,
        ``sha256`` of the weights.
    """

    directory: Path
    config: dict[str, Any]

    @classmethod
    def read(cls, directory: Path | str | None = None) -> SceneAssets:
        """Read and check the shipped files.

        Parameters
        ----------
        directory : path, optional
            Default: the package's own ``demo/data``.

        Raises
        ------
        InputError
            A file is missing, damaged, or lacks a part.
        """
        folder = Path(directory) if directory else Path(__file__).parent / "data"
        try:
            config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
            digest = sha256_of(folder / WEIGHTS_NAME)
        except FileNotFoundError as error:
            raise InputError(f"SceneVLM's file {error.filename} is missing: {REINSTALL}") from error
        except json.JSONDecodeError as error:
            raise InputError(
                f"SceneVLM's file {folder / CONFIG_NAME} is damaged: {REINSTALL}"
            ) from error
        missing = [name for name in (*REQUIRED, "sha256") if name not in config]
        if missing:
            raise InputError(f"{folder / CONFIG_NAME} lacks {', '.join(missing)}: {REINSTALL}")
        if config["sha256"] != digest:
            raise InputError(
                f"SceneVLM's file {folder / WEIGHTS_NAME} is damaged (checksum differs): "
                f"{REINSTALL}"
            )
        return cls(folder, config)

    @property
    def weights_path(self) -> Path:
        return self.directory / WEIGHTS_NAME

    @property
    def num_bytes(self) -> int:
        return self.weights_path.stat().st_size

    @property
    def chat_template(self) -> str:
        return self.config.get("chat_template") or CHAT_TEMPLATE

    @cached_property
    def lora_scale(self) -> float:
        from safetensors import safe_open

        with safe_open(self.weights_path, framework="pt") as file:
            metadata = file.metadata() or {}
        if "scale" not in metadata:
            raise InputError(f"{self.weights_path} has no 'scale' in its metadata: {REINSTALL}")
        return float(metadata["scale"])

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        stored = load_file(self.weights_path)
        return {
            name: expand(tensor, stored[name + SCALE]) if name + SCALE in stored else tensor
            for name, tensor in stored.items()
            if not name.endswith(SCALE)
        }

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name starts with ``prefix``, named without it."""
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }


def write_assets(
    directory: Path | str, tensors: dict[str, Tensor], config: dict[str, Any], scale: float
) -> SceneAssets:
    """Write the two files of `SceneAssets` and read them back.

    Parameters
    ----------
    directory : path
        Created when missing.
    tensors : dict
        Named as this module's first lines say.
    config : dict
        As `SceneAssets.config`; ``sha256`` is filled in here.
    scale : float
        The factor of ``B @ A`` (alpha / r).
    """
    from safetensors.torch import save_file

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in config.items() if key != "sha256"}
    metadata = {"format": "pt", "scale": repr(float(scale)), "config": json.dumps(config)}
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        if value.ndim > 1:
            value, stored[name + SCALE] = squeeze(value)
        stored[name] = value
    save_file(stored, folder / WEIGHTS_NAME, metadata=metadata)
    config["sha256"] = sha256_of(folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return SceneAssets.read(folder)


def squeeze(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Round to 255 steps between plus and minus the largest magnitude of each row or column.

    Parameters
    ----------
    tensor : Tensor
        (rows, ...); more than two dimensions are rounded by row.

    Returns
    -------
    values, scale : Tensor
        (rows, ...) int8 and float32 factors that broadcast against it: (rows, 1, ...), or
        (1, columns) of a matrix that has fewer columns than rows.
    """
    by_column = tensor.ndim == 2 and tensor.shape[1] < tensor.shape[0]
    others = 0 if by_column else tuple(range(1, tensor.ndim))
    scale = tensor.float().abs().amax(others, keepdim=True) / 127
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return (tensor.float() / scale).round().to(torch.int8), scale


def expand(values: Tensor, scale: Tensor) -> Tensor:
    """The inverse of `squeeze`, float32 of the shape of ``values``."""
    return values.float() * scale


def sha256_of(path: Path | str) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
