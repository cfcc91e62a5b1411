"""Write what the package ships of SceneVLM from a checkpoint of stage 3, or of round 3.

    python export.py --tune runs/tune/last.pt --out DIR
    python export.py --tower runs/sharpen/last.pt --start DIR --out DIR

The second takes all but the vision tower from an exported model.
``DIR`` is ``src/corematching/demo/data`` for the shipped model; `corematching.demo.assemble` turns
it into a standard checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from corematching.demo.assets import CHAT_TEMPLATE, SceneAssets, write_assets
from scenes import VIEW
from vision import make_config

IMAGE_TOKEN_ID = 6  # a token of SmolLM2's vocabulary that no text uses


def make_settings() -> dict:
    """The model's settings beside its weights."""
    config = make_config()
    keys = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "image_size", "patch_size", "hidden_act",
    )  # fmt: skip
    return {
        "vision_config": {key: getattr(config, key) for key in keys},
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "image_token": "<image>",
        "image_token_id": IMAGE_TOKEN_ID,
        "image_processor": {
            "do_resize": True,
            "size": {"height": VIEW, "width": VIEW},
            "do_center_crop": False,
            "do_rescale": True,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
        "chat_template": CHAT_TEMPLATE,
    }


def read_tensors(args: argparse.Namespace) -> dict[str, Tensor]:
    """All that is shipped, from one checkpoint, or from one and an exported model."""
    trained = torch.load(args.tune or args.tower, map_location="cpu")["model"]
    if args.tune:
        return trained
    tower = {f"vision_{name}": tensor for name, tensor in trained.items()}
    return SceneAssets.read(args.start).tensors | tower


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", type=Path, help="checkpoint of stage 3")
    parser.add_argument("--tower", type=Path, help="checkpoint of sharpen.py")
    parser.add_argument("--start", type=Path, help="exported model that --tower goes with")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if bool(args.tune) == bool(args.tower and args.start):
        parser.error("name what to export: --tune CHECKPOINT, or --tower CHECKPOINT --start DIR")
    assets = write_assets(args.out, read_tensors(args), make_settings(), scale=1.0)
    print(f"{assets.weights_path}: {assets.num_bytes / 1e6:.1f} MB")
