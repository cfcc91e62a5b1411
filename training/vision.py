"""Stage 1: teach a CLIP-style ViT to say what every patch shows, and where that thing stands.

    python vision.py --sprites SPRITES --out runs/vision [--steps 4200] [--batch 32]

Resumes from the last checkpoint in ``--out``. Writes ``log.jsonl`` beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import CLIPVisionConfig, CLIPVisionModel

from classes import OBJECTS
from scenes import (
    CLASSES,
    GRID,
    LETTERS,
    PATCH,
    SIZE,
    Composer,
    label_letters,
    label_patches,
)

FIRST_WORD = 1 + len(OBJECTS)  # class ids from here on are words


def make_config() -> CLIPVisionConfig:
    """The tower: 256 wide, 6 layers, 14 x 14 patches of 16 pixels."""
    return CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        hidden_act="gelu",
    )


class PatchTeacher(nn.Module):
    """The tower with the heads that only training needs."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.tower = CLIPVisionModel._from_config(config, attn_implementation="eager")
        self.norm = nn.LayerNorm(config.hidden_size)
        self.name = nn.Linear(config.hidden_size, len(CLASSES))
        self.geometry = nn.Linear(config.hidden_size, 4)
        self.centre = nn.Linear(config.hidden_size, 1)
        self.letters = nn.Linear(config.hidden_size, len(LETTERS))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Class logits (B, P, C), geometry (B, P, 4), is-centre (B, P), letters (B, P, 26)."""
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states
        patches = self.norm(hidden[-1][:, 1:])
        spelt = F.layer_norm(hidden[-3][:, 1:], patches.shape[-1:])
        centres = self.centre(patches).squeeze(-1)
        return self.name(patches), self.geometry(patches), centres, self.letters(spelt)


def encode_patches(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """(B, 3, S, S) -> (B, P, d): the features that the projector reads (last layer, no CLS)."""
    return tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]


def normalise(images: Tensor) -> Tensor:
    """(B, S, S, 3) uint8 -> (B, 3, S, S) float in [-1, 1], as the image processor does."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


class PatchStream(IterableDataset):
    """Endless batches of training scenes with patch labels."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args, self.seed = args, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        info = torch.utils.data.get_worker_info()
        rng = np.random.default_rng((self.seed, info.id if info else 0))
        composer = Composer(self.args.sprites, signs=self.args.signs)
        while True:
            scenes = [composer.draw(rng) for _ in range(self.args.batch)]
            labels, geometry = zip(*(label_patches(scene) for scene in scenes), strict=True)
            yield (
                torch.from_numpy(np.stack([scene.image for scene in scenes])),
                torch.from_numpy(np.stack(labels)),
                torch.from_numpy(np.stack(geometry)),
                torch.from_numpy(np.stack([label_letters(scene) for scene in scenes])),
            )


def mark_centres(geometry: Tensor, labels: Tensor) -> Tensor:
    """(B, P) float, 1 where the patch holds the centre of the item it shows."""
    cells = (geometry[..., :2] * GRID).long().clamp(max=GRID - 1)
    own = torch.arange(GRID * GRID, device=labels.device)
    return ((cells[..., 1] * GRID + cells[..., 0] == own) & (labels > 0)).float()


def compute_losses(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """The weighted loss, and what to log."""
    images, labels, geometry, letters = batch
    with torch.autocast("cpu", torch.bfloat16):
        names, places, centres, spelt = model(normalise(images))
    shown, signs = labels > 0, labels >= FIRST_WORD
    weight = torch.full((len(CLASSES),), 1.0)
    weight[0] = 0.25
    name_loss = F.cross_entropy(names.float().flatten(0, 1), labels.flatten(), weight)
    place_loss = F.l1_loss(places.float()[shown], geometry[shown])
    target = mark_centres(geometry, labels)
    centre_loss = F.binary_cross_entropy_with_logits(
        centres.float()[shown], target[shown], pos_weight=torch.tensor(5.0)
    )
    letter_loss = F.binary_cross_entropy_with_logits(spelt.float()[signs], letters[signs].float())
    hits = names.argmax(-1) == labels
    log = {
        "name_loss": name_loss.item(),
        "place_error": place_loss.item(),
        "centre_loss": centre_loss.item(),
        "letter_loss": letter_loss.item(),
        "object_accuracy": hits[shown & ~signs].float().mean().item(),
        "word_accuracy": hits[signs].float().mean().item(),
        "background_accuracy": hits[~shown].float().mean().item(),
    }
    return name_loss + 3 * place_loss + 0.3 * centre_loss + 3 * letter_loss, log


def schedule_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return float(peak * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * progress))))


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    model = PatchTeacher(make_config())
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    step, checkpoint = 0, args.out / "last.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    elif args.start is not None:
        model.load_state_dict(torch.load(args.start)["model"], strict=False)
    for layer in model.tower.encoder.layers:
        layer.compile(dynamic=False)
    stream = PatchStream(args, args.seed + step)
    batches = iter(DataLoader(stream, batch_size=None, num_workers=1, prefetch_factor=4))
    started = time.time()
    totals: dict[str, float] = {}
    with (args.out / "log.jsonl").open("a") as log_file:
        while step < args.steps:
            for group in optimizer.param_groups:
                group["lr"] = schedule_rate(step, args.steps, args.rate)
            loss, log = compute_losses(model, next(batches))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            for key, value in log.items():
                totals[key] = totals.get(key, 0.0) + value / args.log_every
            if step % args.log_every == 0:
                row = {"step": step, "scenes": step * args.batch, "seconds": time.time() - started}
                row |= {key: round(value, 4) for key, value in totals.items()}
                print(json.dumps(row), file=log_file, flush=True)
                totals = {}
            if step % args.save_every == 0 or step == args.steps:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state | {"step": step}, checkpoint.with_suffix(".tmp"))
                checkpoint.with_suffix(".tmp").replace(checkpoint)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sprites", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="checkpoint to take the weights of")
    parser.add_argument("--steps", type=int, default=4200)
    parser.add_argument("--signs", type=float, default=1.0, help="signs per scene")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--save-every", type=int, default=500)
    train(parser.parse_args())
