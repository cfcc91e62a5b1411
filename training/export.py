"""Write what the package ships of SceneVLM from the checkpoint of stage 3.

    python export.py --tune runs/tune/last.pt --out DIR

``DIR`` is ``src/corematching/demo/data`` for the shipped model; `corematching.demo.assemble` turns
it into a standard checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from corematching.demo.assets import CHAT_TEMPLATE, write_assets
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tensors = torch.load(args.tune, map_location="cpu")["model"]
    assets = write_assets(args.out, tensors, make_settings(), scale=1.0)
    print(f"{assets.weights_path}: {assets.num_bytes / 1e6:.1f} MB")
