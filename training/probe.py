"""What a vision tower knows of each thing in a picture, apart from any language model.

    python probe.py --sprites SPRITES --tower DIR_OR_CHECKPOINT [--split DIR]

Heads for "what" and "where" learn on the tower's features of training scenes; the tower stays as
it is. Printed is, by the things' size, how many of their patches are named and placed right on
other training scenes. With ``--split`` the things of its pictures are counted from the heads'
answers alone: the share of pictures where all are found and nothing else.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionModel

from corematching.demo.assets import SceneAssets
from corematching.demo.sceneqa import load_sceneqa
from corematching.devices import product_dtype
from scenes import CLASSES, SIZE
from vision import (
    FIRST_WORD,
    PatchStream,
    encode_patches,
    judge_patches,
    load_batches,
    make_config,
    mix_precision,
    normalise,
    take,
)

BATCH = 16
APART = 0.6  # of a thing's size: patches whose centres differ by more show different things
LEAST = 1.5  # patches of a thing, so many are wanted of a small one


class Heads(nn.Module):
    """Class, geometry and is-centre of every patch from a tower's features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.name = nn.Linear(width, len(CLASSES))
        self.geometry = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4))
        self.centre = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of (B, P, d) features: class logits (B, P, C), geometry (B, P, 4), centres (B, P)."""
        x = self.norm(features.float())
        return self.name(x), self.geometry(x), self.centre(x).squeeze(-1)


def load_tower(path: Path) -> CLIPVisionModel:
    """The tower of an exported model's folder, or of a checkpoint of stage 1 or 3."""
    tower = CLIPVisionModel._from_config(make_config(), attn_implementation="sdpa")
    if path.is_dir():
        state = SceneAssets.read(path).under("vision_tower.")
    else:
        saved = torch.load(path, map_location="cpu")["model"]
        prefix = "tower." if any(key.startswith("tower.") for key in saved) else "vision_tower."
        state = take(saved, prefix)
    tower.load_state_dict(state)
    return tower.eval().requires_grad_(False)


@torch.no_grad()
def see(tower: CLIPVisionModel, images: Tensor) -> Tensor:
    """(B, S, S, 3) uint8 -> (B, P, d) features."""
    device = tower.device
    with mix_precision(device):
        features = encode_patches(tower, normalise(images.to(device)))
    return features.to(product_dtype(device, torch.bfloat16))


def see_scenes(tower: CLIPVisionModel, args: argparse.Namespace) -> list[tuple[Tensor, ...]]:
    """Batches of features, labels and geometry of training scenes."""
    drawn = load_batches(PatchStream(args.sprites, BATCH, 0.4, args.seed), workers=1)
    seen = []
    for _ in range(args.scenes // BATCH):
        images, labels, geometry, _ = next(drawn)
        seen.append((see(tower, images), labels.to(tower.device), geometry.to(tower.device)))
    return seen


def teach(heads: Heads, seen: list[tuple[Tensor, ...]], args: argparse.Namespace) -> None:
    """Train the heads, every thing counted nearly alike."""
    optimizer = torch.optim.AdamW(heads.parameters(), lr=2e-3, weight_decay=0.01)
    rng = np.random.default_rng(args.seed)
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        features, labels, geometry = seen[rng.integers(len(seen))]
        name_loss, place_loss, centre_loss = judge_patches(
            heads(features), labels, geometry, per_item=0.75, centre_weight=1.0
        )
        loss = name_loss + 5 * place_loss + centre_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def judge_by_size(heads: Heads, seen: list[tuple[Tensor, ...]]) -> dict[int, tuple[float, ...]]:
    """By size in tens of pixels: objects, patches named, objects not at all, patches misplaced.

    The last three are shares; misplaced is a centre off by more than half of the object's size.
    """
    rows: dict[int, list[tuple[float, ...]]] = defaultdict(list)
    for features, labels, geometry in seen:
        names, places, _ = (part.cpu() for part in heads(features))
        geometry, labels = geometry.cpu(), labels.cpu()
        hits = names.argmax(-1) == labels
        off = (places - geometry)[..., :2].abs().amax(-1)
        for scene in range(len(labels)):
            things = defaultdict(list)
            for patch in (labels[scene] > 0).nonzero().flatten().tolist():
                key = (int(labels[scene, patch]), *geometry[scene, patch].tolist())
                things[key].append(patch)
            for (label, *box), patches in things.items():
                if label >= FIRST_WORD:
                    continue
                size, right = max(box[2:]), hits[scene, patches].float().mean().item()
                wrong = (off[scene, patches] > size / 2).float().mean().item()
                rows[min(int(size * SIZE) // 10 * 10, 90)].append((right, right == 0, wrong))
    return {size: (len(of), *np.mean(of, 0)) for size, of in sorted(rows.items())}


@torch.no_grad()
def count_objects(heads: Heads, features: Tensor) -> Counter[str]:
    """What is in one picture, (P, d), and how often: patches of one class with one centre."""
    names, places, centres = (part[0].cpu() for part in heads(features.unsqueeze(0)))
    chances = names.softmax(-1)
    labels = chances.argmax(-1)
    things: list[list] = []  # class, centre, extent, patches
    shown = (labels > 0).nonzero().flatten()
    for patch in shown[centres[shown].argsort(descending=True)].tolist():
        label, place = int(labels[patch]), places[patch]
        if label >= FIRST_WORD:
            continue
        for thing in things:
            far = ((thing[1] - place[:2]).abs() / thing[2].clamp(min=0.08)).max()
            if thing[0] == label and far < APART:
                thing[3] += float(chances[patch, label])
                break
        else:
            things.append([label, place[:2], place[2:], float(chances[patch, label])])
    patches = labels.numel()
    return Counter(
        CLASSES[label]
        for label, _, extent, size in things
        if size >= LEAST * max(0.5, 0.1 * patches * float(extent.prod()))
    )


def judge_split(tower: CLIPVisionModel, heads: Heads, split: Path) -> tuple[int, int]:
    """How many of the pictures that a split asks descriptions of are counted right, of how many."""
    asked = {row.image: row.items for row in load_sceneqa(split) if row.family == "describe"}
    right = 0
    for path, items in asked.items():
        image = torch.from_numpy(np.array(Image.open(path).convert("RGB")))
        found = count_objects(heads, see(tower, image[None])[0])
        right += found == Counter(item.name for item in items if not item.is_word)
    return right, len(asked)


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    tower = load_tower(args.tower).to(args.device)
    seen = see_scenes(tower, args)
    held = max(1, len(seen) // 4)
    heads = Heads(tower.config.hidden_size).to(args.device)
    teach(heads, seen[held:], args)
    print("pixels  objects  patches named  not at all  misplaced")
    for size, (count, named, missed, wrong) in judge_by_size(heads, seen[:held]).items():
        print(f"{size:5d}+  {count:7d}  {named:13.1%}  {missed:10.1%}  {wrong:9.1%}")
    if args.split:
        right, asked = judge_split(tower, heads, args.split)
        print(f"all objects of a picture found, and no other: {right} of {asked} pictures")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sprites", type=Path, required=True)
    parser.add_argument("--tower", type=Path, required=True)
    parser.add_argument("--split", type=Path, help="folder of a split, to count its objects")
    parser.add_argument("--scenes", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    main(parser.parse_args())
