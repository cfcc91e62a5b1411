"""Round 3, for a CPU: the tower of an exported model reads small and touching things better.

    python sharpen.py --start DIR --sprites SPRITES --out runs/sharpen --minutes 100

Heads learn to name and place things from the tower's features as they are, as in ``probe.py``, and
are then frozen; the tower learns to serve them better, on scenes with more and smaller things, each
thing counted nearly alike. Patches that the heads named right before stay near where they were, so
that the projector and the language model, which know the features as they were, go on reading them.
Resumes from the last checkpoint in ``--out``; that holds the running average of the weights, which
is what ``export.py --tower`` and ``probe.py --tower`` take.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel

import attention  # noqa: F401 - registers "patches"
from conversations import MANY
from probe import Heads, load_tower, see_scenes, teach
from scenes import Composer, Scene
from schedule import Schedule
from vision import (
    PatchStream,
    encode_patches,
    judge_patches,
    load_batches,
    mix_precision,
    normalise,
    reuse_batches,
    save,
    take,
)

PER_ITEM = 0.75  # see vision.weigh_patches
FARTHEST = 9.0  # squared deviations of a feature from where it was count up to here
KEPT_EVERY = 4  # steps; looking at the old features costs as much as a third of a step
AVERAGED = 0.998  # of the running average stays at each step


class HardStream(PatchStream):
    """Scenes with smaller things, mostly with many, or with several of a kind."""

    skew = 1.3

    def draw(self, composer: Composer, rng: np.random.Generator) -> Scene:
        while True:
            scene = composer.draw(rng)
            names = [item.name for item in scene.objects]
            hard = len(names) >= MANY or len(set(names)) < len(names)
            if hard or rng.random() < 0.3:
                return scene


class Sharpener:
    """The tower that learns, the one it began as, and the frozen heads between them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, device = args, torch.device(args.device)
        self.checkpoint = args.out / "last.pt"
        self.old = load_tower(args.start).to(device)
        self.tower = load_tower(args.tower or args.start).to(device)
        self.tower.requires_grad_(True).post_layernorm.requires_grad_(False)
        if device.type == "cpu":
            self.tower.set_attn_implementation("patches")
        self.average = {name: value.clone() for name, value in self.tower.state_dict().items()}
        self.spread = torch.ones(())
        self.heads = Heads(self.old.config.hidden_size).to(device)

    def prepare(self) -> None:
        """Teach the heads on the features as they are, and see how far those spread."""
        seen = see_scenes(self.old, self.args)
        teach(self.heads, seen, self.args)
        features = torch.cat([batch[0].flatten(0, 1) for batch in seen[:12]])
        self.spread = features.float().std(0)

    def compute_loss(self, batch: list[Tensor], step: int) -> tuple[Tensor, list[Tensor]]:
        """The loss of one batch; to log: its parts by name, place and centre, and the way gone."""
        images, labels, geometry = batch[:3]
        pixels = normalise(images)
        with mix_precision(images.device):
            features = encode_patches(self.tower, pixels).float()
        parts = judge_patches(self.heads(features), labels, geometry, PER_ITEM, centre_weight=1.0)
        gone = torch.zeros(())
        if step % KEPT_EVERY == 0:
            with torch.no_grad(), mix_precision(images.device):
                before = encode_patches(self.old, pixels).float()
            right = self.heads(before)[0].argmax(-1) == labels
            gone = ((features - before) / self.spread).square().clamp(max=FARTHEST)
            gone = KEPT_EVERY * (gone * right.unsqueeze(-1)).mean()
        name_loss, place_loss, centre_loss = parts
        loss = name_loss + 5 * place_loss + 0.5 * centre_loss + self.args.keep * gone
        return loss, [part.detach() for part in (*parts, gone)]

    def follow(self, step: int) -> None:
        """Let the running average follow, quickly in the first steps."""
        share = 1 - min(AVERAGED, (step + 1) / (step + 20))
        for name, value in self.tower.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, share)

    def save(self, optimizer: torch.optim.Optimizer, schedule: Schedule) -> None:
        averaged = {f"tower.{name}": value for name, value in self.average.items()}
        more = {"raw": self.tower.state_dict(), "heads": self.heads.state_dict()}
        save(self.checkpoint, averaged, optimizer, schedule, spread=self.spread, **more)

    def load_state(self, state: dict[str, Any]) -> None:
        self.tower.load_state_dict(state["raw"])
        self.heads.load_state_dict(state["heads"])
        self.average, self.spread = take(state["model"], "tower."), state["spread"]


def make_optimizer(tower: CLIPVisionModel) -> torch.optim.Optimizer:
    """AdamW that lets only matrices decay."""
    learnt = [p for p in tower.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learnt if p.ndim > 1], "weight_decay": 0.02},
        {"params": [p for p in learnt if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    sharpener, schedule = Sharpener(args), Schedule(10**9, args.minutes)
    optimizer = make_optimizer(sharpener.tower)
    if sharpener.checkpoint.exists():
        state = torch.load(sharpener.checkpoint, map_location=args.device)
        sharpener.load_state(state)
        optimizer.load_state_dict(state["optimizer"])
        schedule.resume(state)
    else:
        sharpener.prepare()
    sharpener.heads.requires_grad_(False)
    stream = HardStream(args.sprites, args.batch, 0.5, args.seed + 100 + schedule.step)
    drawn = (
        [part.to(args.device) for part in batch] for batch in load_batches(stream, args.workers)
    )
    batches = reuse_batches(drawn, times=2, most=400, seed=args.seed)
    logged: list[list[Tensor]] = []
    with (args.out / "log.jsonl").open("a") as log_file:
        while not schedule.done:
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(args.rate)
            loss, parts = sharpener.compute_loss(next(batches), schedule.step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(sharpener.tower.parameters(), 1.0)
            optimizer.step()
            sharpener.follow(schedule.step)
            schedule.advance()
            logged.append(parts)
            if schedule.step % args.log_every == 0:
                means = torch.tensor([[float(part) for part in parts] for parts in logged]).mean(0)
                row = {
                    "step": schedule.step,
                    "scenes": schedule.step * args.batch,
                    "seconds": round(schedule.elapsed, 1),
                }
                names = ("name_loss", "place_loss", "centre_loss", "gone")
                row |= {k: round(v, 4) for k, v in zip(names, means.tolist(), strict=True)}
                print(json.dumps(row), file=log_file, flush=True)
                logged = []
            if schedule.step % args.save_every == 0:
                sharpener.save(optimizer, schedule)
    sharpener.save(optimizer, schedule)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start", type=Path, required=True, help="folder of an exported model")
    parser.add_argument("--tower", type=Path, help="checkpoint of an earlier run to go on from")
    parser.add_argument("--sprites", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True, help="of the tower's training")
    parser.add_argument("--scenes", type=int, default=5000, help="that the heads learn on")
    parser.add_argument("--steps", type=int, default=1500, help="of the heads")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1.3e-4)
    parser.add_argument(
        "--keep", type=float, default=1.0, help="weight of keeping features where they were right"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw scenes")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=200)
    train(parser.parse_args())
