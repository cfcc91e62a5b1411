"""Stage 1: teach a CLIP-style ViT to say what every patch shows, and where that thing stands.

    python vision.py --sprites SPRITES --out runs/vision [--minutes 2.5] [--device cuda]

Drawing a scene takes the processors longer than a step on it takes a GPU, so with ``--reuse 4``
only every fourth batch is new and the others are drawn from those before it. Resumes from the last
checkpoint in ``--out``. ``--start`` begins with the tower of an exported model; the new heads then
learn alone at first. Writes ``log.jsonl`` beside it.
"""

from __future__ import annotations

import argparse
import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import CLIPVisionConfig, CLIPVisionModel

from classes import OBJECTS
from corematching.demo.assets import SceneAssets
from corematching.devices import product_dtype
from scenes import (
    CLASSES,
    GRID,
    LETTERS,
    PATCH,
    SIZE,
    VIEW,
    Composer,
    Scene,
    label_letters,
    label_patches,
)
from schedule import Schedule

HEADS_ALONE = 0.05  # of the run
FIRST_WORD = 1 + len(OBJECTS)  # class ids from here on are words


def make_config() -> CLIPVisionConfig:
    """The tower: 256 wide, 6 layers, 24 x 24 patches of 14 pixels, as many as LLaVA-1.5 has."""
    return CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=VIEW,
        patch_size=PATCH,
        hidden_act="gelu",
    )


class PatchTeacher(nn.Module):
    """The tower with the heads that only training needs."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.tower = CLIPVisionModel._from_config(config, attn_implementation="sdpa")
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


def mix_precision(device: torch.device) -> torch.autocast:
    """Products in bfloat16 where the device is quick at them."""
    dtype = product_dtype(device, torch.bfloat16)
    return torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16)


def take(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, named without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def encode_patches(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """(B, 3, V, V) -> (B, P, d): the features that the projector reads (last layer, no CLS)."""
    return tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]


def normalise(images: Tensor) -> Tensor:
    """(B, S, S, 3) uint8 -> (B, 3, V, V) float in [-1, 1], as the image processor does."""
    pixels = images.permute(0, 3, 1, 2).float()
    pixels = F.interpolate(pixels, (VIEW, VIEW), mode="bicubic", antialias=True)
    return pixels.clamp(0, 255) / 127.5 - 1


class PatchStream(IterableDataset):
    """Endless batches of training scenes with patch labels."""

    skew = 0.8  # of the objects' sizes, see `Composer`

    def __init__(self, sprites: Path, batch: int, signs: float, seed: int) -> None:
        self.sprites, self.batch, self.signs, self.seed = sprites, batch, signs, seed

    def draw(self, composer: Composer, rng: np.random.Generator) -> Scene:
        """One scene to train on."""
        return composer.draw(rng)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        info = torch.utils.data.get_worker_info()
        rng = np.random.default_rng((self.seed, info.id if info else 0))
        composer = Composer(self.sprites, signs=self.signs, skew=self.skew)
        while True:
            scenes = [self.draw(composer, rng) for _ in range(self.batch)]
            labels, geometry = zip(*(label_patches(scene) for scene in scenes), strict=True)
            yield (
                torch.from_numpy(np.stack([scene.image for scene in scenes])),
                torch.from_numpy(np.stack(labels)),
                torch.from_numpy(np.stack(geometry)),
                torch.from_numpy(np.stack([label_letters(scene) for scene in scenes])),
            )


def load_batches(stream: IterableDataset, workers: int) -> Iterator[tuple[Tensor, ...]]:
    """Batches drawn by so many processes beside this one."""
    pinned = torch.cuda.is_available()
    loader = DataLoader(
        stream, batch_size=None, num_workers=workers, prefetch_factor=4, pin_memory=pinned
    )
    return iter(loader)


def reuse_batches(
    drawn: Iterator[list[Tensor]], times: int, most: int, seed: int
) -> Iterator[list[Tensor]]:
    """Each drawn batch and, after it, ``times - 1`` earlier ones, of the ``most`` last."""
    rng, kept = np.random.default_rng(seed), deque(maxlen=most)
    for batch in drawn:
        yield batch
        kept.append(batch)
        for _ in range(times - 1):
            yield kept[rng.integers(len(kept))]


def mark_centres(geometry: Tensor, labels: Tensor) -> Tensor:
    """(B, P) float, 1 where the patch holds the centre of the item it shows."""
    cells = (geometry[..., :2] * GRID).long().clamp(max=GRID - 1)
    own = torch.arange(GRID * GRID, device=labels.device)
    return ((cells[..., 1] * GRID + cells[..., 0] == own) & (labels > 0)).float()


def weigh_patches(labels: Tensor, geometry: Tensor, per_item: float) -> tuple[Tensor, Tensor]:
    """How much each patch counts, and its place, for the items to count more alike.

    Small items have few patches, so that a mean over patches hardly hears of them. A patch of an
    item with n patches counts n ** -per_item, rescaled to a mean of 1 over those that show
    something (others: 1); its place counts 1 / size ** per_item more, the size in quarters of the
    picture.

    Returns
    -------
    weights, places : Tensor
        (B, P) float each; all ones where ``per_item`` is 0.
    """
    if not per_item:
        return torch.ones_like(geometry[..., 0]), torch.ones_like(geometry[..., 0])
    centre = geometry[..., :2]
    same = (centre.unsqueeze(1) == centre.unsqueeze(2)).all(-1)
    same &= labels.unsqueeze(1) == labels.unsqueeze(2)
    shown = labels > 0
    weights = same.sum(-1).float().pow(-per_item)
    weights = torch.where(shown, weights / average(weights, shown).clamp(min=1e-6), 1.0)
    size = geometry[..., 2:].amax(-1).clamp(min=24 / SIZE)
    return weights, torch.where(shown, weights * (4 * size).pow(-per_item), 1.0)


def average(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of (B, P) values where chosen; reads nothing back from the device."""
    return (values.float() * chosen).sum() / chosen.sum().clamp(min=1)


def judge_patches(
    patches: tuple[Tensor, Tensor, Tensor],
    labels: Tensor,
    geometry: Tensor,
    per_item: float,
    centre_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of the names, the places and the centres that heads give for patches.

    Patches are class logits (B, P, C), geometry (B, P, 4), is-centre (B, P); a centre counts
    ``centre_weight`` times as much as another patch.
    """
    names, places, centres = (part.float() for part in patches)
    shown = labels > 0
    counts, placing = weigh_patches(labels, geometry, per_item)
    naming = F.cross_entropy(names.transpose(1, 2), labels, reduction="none")
    off = (places - geometry).abs().mean(-1)
    centring = F.binary_cross_entropy_with_logits(
        centres,
        mark_centres(geometry, labels),
        pos_weight=torch.tensor(centre_weight, device=labels.device),
        reduction="none",
    )
    return (
        average(naming, torch.where(shown, counts, 0.25)),
        average(off * placing, shown),
        average(centring * counts, shown),
    )


def compute_losses(
    model: nn.Module, batch: list[Tensor], per_item: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted loss, and what to log."""
    images, labels, geometry, letters = batch
    with mix_precision(images.device):
        names, places, centres, spelt = model(normalise(images))
    names, shown, signs = names.float(), labels > 0, labels >= FIRST_WORD
    name_loss, place_loss, centre_loss = judge_patches(
        (names, places, centres), labels, geometry, per_item, centre_weight=12.0
    )
    off = (places.float() - geometry).abs().mean(-1)
    spelling = F.binary_cross_entropy_with_logits(spelt.float(), letters.float(), reduction="none")
    letter_loss = average(spelling.mean(-1), signs)
    hits = names.argmax(-1) == labels
    log = {
        "name_loss": name_loss,
        "place_error": average(off, shown),
        "centre_loss": centre_loss,
        "letter_loss": letter_loss,
        "object_accuracy": average(hits, shown & ~signs),
        "word_accuracy": average(hits, signs),
        "background_accuracy": average(hits, ~shown),
    }
    loss = name_loss + 3 * place_loss + 0.3 * centre_loss + 3 * letter_loss
    return loss, {key: value.detach() for key, value in log.items()}


def make_optimizer(model: PatchTeacher) -> torch.optim.Optimizer:
    """AdamW that lets only matrices decay, the tower's and the heads' apart."""
    tower = set(model.tower.parameters())
    groups = [
        {
            "params": [p for p in model.parameters() if (p.ndim > 1, p in tower) == (matrix, of)],
            "weight_decay": 0.05 if matrix else 0.0,
            "of_tower": of,
        }
        for matrix in (True, False)
        for of in (True, False)
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    model = PatchTeacher(make_config()).to(args.device)
    optimizer, schedule = make_optimizer(model), Schedule(args.steps, args.minutes)
    checkpoint = args.out / "last.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=args.device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.resume(state)
    elif args.start:
        model.tower.load_state_dict(SceneAssets.read(args.start).under("vision_tower."))
    for layer in model.tower.encoder.layers:
        layer.compile(dynamic=False)
    stream = PatchStream(args.sprites, args.batch, args.signs, args.seed + schedule.step)
    drawn = (
        [part.to(args.device, non_blocking=True) for part in batch]
        for batch in load_batches(stream, args.workers)
    )
    batches = reuse_batches(drawn, args.reuse, args.kept, args.seed)
    logged: list[dict[str, Tensor]] = []
    with (args.out / "log.jsonl").open("a") as log_file:
        while not schedule.done:
            tower_waits = args.start and schedule.progress < HEADS_ALONE
            for group in optimizer.param_groups:
                waits = tower_waits and group["of_tower"]
                group["lr"] = 0.0 if waits else schedule.rate(args.rate)
            loss, log = compute_losses(model, next(batches), args.per_item)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.advance()
            logged.append(log)
            if schedule.step % args.log_every == 0:
                step, seconds = schedule.step, round(schedule.elapsed, 1)
                row = {"step": step, "scenes": step * args.batch, "seconds": seconds}
                for key in log:
                    row[key] = round(torch.stack([old[key] for old in logged]).mean().item(), 4)
                print(json.dumps(row), file=log_file, flush=True)
                logged = []
            if schedule.step % args.save_every == 0:
                save(checkpoint, model.state_dict(), optimizer, schedule)
    save(checkpoint, model.state_dict(), optimizer, schedule)


def save(
    checkpoint: Path,
    model: dict,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    **more: Any,
) -> None:
    """Write a checkpoint whole or not at all."""
    state = {"model": model, "optimizer": optimizer.state_dict()} | schedule.state() | more
    torch.save(state, checkpoint.with_suffix(".tmp"))
    checkpoint.with_suffix(".tmp").replace(checkpoint)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sprites", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="folder of an exported model to go on from")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, help="end after so long, if that comes first")
    parser.add_argument("--signs", type=float, default=1.5, help="signs per scene")
    parser.add_argument(
        "--per-item", type=float, default=0.0, metavar="P",
        help="0: every patch counts the same; 1: every item does, however small, and its place in "
        "its own size",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--reuse", type=int, default=1, help="steps per drawn batch")
    parser.add_argument("--kept", type=int, default=1000, help="batches kept for them")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw scenes")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--save-every", type=int, default=500)
    train(parser.parse_args())
